"""Writes what containers read at their start. May be repeated: secrets that exist are kept, the rest is rewritten."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kit.nats_access import (
    ADMINISTRATOR,
    NODE_PREFIX,
    SEED_SUFFIX,
    SERVICES,
    TENANT_PREFIX,
    User,
    generate_keys,
    user_names,
    users_of,
)
from kit.nats_server import ServerConfig, file_store_limit_bytes
from services.local.access import write_context
from services.local.state import StateFolder, read_json, write_private
from services.provision.settings import ProvisionSettings

SEED_FILE: Final = "seed.nk"
CONFIG_FILE: Final = "config.json"
NATS_PORT: Final = 4222
MONITOR_PORT: Final = 8222
# Root in its container: limits on GPU memory are root's to set.
ROOT_SERVICES: Final = ("nodeagent",)


def write_all(settings: ProvisionSettings) -> StateFolder:
    """Keys, the NATS server's configuration, each container's secrets, and the context for the host."""
    folder = StateFolder(Path(settings.state_dir))
    folder.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    public_keys = generate_keys(folder.keys, user_names(nodes=[settings.node], tenants=[settings.tenant]))
    write_context(
        folder,
        nats_url=f"nats://127.0.0.1:{settings.host_nats_port}",
        gateway_port=settings.host_gateway_port,
        tenant=settings.tenant,
        label=settings.label,
    )
    write_nats(settings, users_of(public_keys))
    write_secrets(settings, folder)
    write_client(settings, folder)
    return folder


def write_nats(settings: ProvisionSettings, users: list[User]) -> None:
    """The server's file, and its store's owner."""
    store = Path(settings.nats_store_dir)
    _give(store, settings.user_id)
    config = ServerConfig(
        store_directory=store,
        host="0.0.0.0",  # noqa: S104  (inside the container; compose publishes it on loopback)
        port=NATS_PORT,
        monitor_port=MONITOR_PORT,
        users=users,
        max_file_store_bytes=file_store_limit_bytes(store),
        server_name=f"sublet-{settings.node}",
    )
    path = Path(settings.nats_config_dir) / "nats.conf"
    _write(path, config.text())
    _give(path, settings.user_id)


def write_secrets(settings: ProvisionSettings, folder: StateFolder) -> None:
    """Each container gets its own and no other."""
    token = _token(folder.path / "holder-token.json")
    users = {name: name for name in (*SERVICES, ADMINISTRATOR)} | {"nodeagent": f"{NODE_PREFIX}{settings.node}"}
    configs: dict[str, Mapping[str, Any]] = {
        "holder": {"holder": {"token": token}},
        "gateway": {"gateway": {"holder_token": token}},
    }
    for name in {**users, **configs}:
        target = Path(settings.secrets_dir) / name
        owner = 0 if name in ROOT_SERVICES else settings.user_id
        _make(target, owner)
        if name in users:
            _copy(folder.keys / f"{users[name]}{SEED_SUFFIX}", target / SEED_FILE, owner)
        if name in configs:
            write_private(target / CONFIG_FILE, configs[name])
            _give(target / CONFIG_FILE, owner)
    client = StateFolder(Path(settings.secrets_dir) / "client")
    _make(client.path, settings.user_id)
    _make(client.keys, settings.user_id)
    seed = f"{TENANT_PREFIX}{settings.tenant}{SEED_SUFFIX}"
    _copy(folder.keys / seed, client.keys / seed, settings.user_id)
    _copy(folder.context, client.context, settings.user_id)


def write_client(settings: ProvisionSettings, folder: StateFolder) -> None:
    """The context by which `sublet` on the host finds this installation, and curl's options with the key."""
    owner = Path(settings.client_owner_of).stat()
    client = Path(settings.client_dir)
    own = client / "docker"
    context = read_json(folder.context)
    seed = f"{TENANT_PREFIX}{settings.tenant}{SEED_SUFFIX}"
    _make(own, owner.st_uid, owner.st_gid)
    _copy(folder.keys / seed, own / seed, owner.st_uid, owner.st_gid)
    curl = own / "curl"
    _write(curl, f'header = "Authorization: Bearer {context["api_key"]}"\nheader = "Content-Type: application/json"\n')
    _give(curl, owner.st_uid, owner.st_gid)
    write_private(client / "context.json", {**context, "nkey_seed_path": f"{own.name}/{seed}"})
    for path in (client, client / "context.json"):
        _give(path, owner.st_uid, owner.st_gid)


def _token(path: Path) -> str:
    """Made once and kept: gateways and holder need not be restarted together."""
    token = str(read_json(path).get("token") or secrets.token_hex(16))
    write_private(path, {"token": token})
    return token


def _make(folder: Path, user_id: int, group_id: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    _give(folder, user_id, group_id)


def _copy(source: Path, target: Path, user_id: int, group_id: int | None = None) -> None:
    _write(target, source.read_text(encoding="ascii"))
    _give(target, user_id, group_id)


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and never readable for others."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
        file.write(text)
    new.replace(path)


def _give(path: Path, user_id: int, group_id: int | None = None) -> None:
    os.chown(path, user_id, user_id if group_id is None else group_id)


def describe(settings: ProvisionSettings) -> str:
    """For the log of the set-up: where things are, and no secret."""
    facts = {
        "gateway": f"http://127.0.0.1:{settings.host_gateway_port}/v1",
        "events": f"nats://127.0.0.1:{settings.host_nats_port}",
        "gpus": settings.label,
        "context": ".sublet/context.json",
    }
    return json.dumps(facts)

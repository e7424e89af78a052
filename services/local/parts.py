"""The processes of a stack: with which settings each runs, when it counts as ready, and in which order they start."""

import json
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kit.bus import BusError
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR, NODE_PREFIX, SEED_SUFFIX, generate_keys, read_seed, user_names, users_of
from kit.nats_server import (
    NatsServerError,
    ServerConfig,
    ensure_streams,
    file_store_limit_bytes,
    find_server_binary,
)
from kit.nats_wire import ApiError
from kit.supervisor import ProcessSpec, ReadyCheck, holds
from services.local.settings import StackSettings
from services.local.state import StackError, StateFolder

ROOT: Final = Path(__file__).resolve().parents[2]
"""Where child processes find `services` and `engines`."""
NATS: Final = "nats"
HOLDER: Final = "holder"
GATEWAY: Final = "gateway"
RUNNERS: Final = ("nodeagent", "placement", "swapper", "autoscaler")
"""Services with a health server of their own."""
PARTS: Final = (NATS, HOLDER, *RUNNERS, GATEWAY)
"""In the order of their start; they stop in the reverse order."""
INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "CC", "LD_LIBRARY_PATH")
INHERITED_PREFIXES: Final = ("SUBLET_", "OTEL_", "CUDA_", "NVIDIA_")
DRAIN_S: Final = 2.0
"""Running answers may go on so long after a stop signal: a person waits."""
ENGINE_GRACE_S: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that the processes' settings follow from."""

    settings: StackSettings
    folder: StateFolder
    ports: Mapping[str, int]
    gpu_environment: Mapping[str, str]
    """What makes a process use the software GPU; empty for real ones."""
    holder_token: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def nats_url(self) -> str:
        return f"nats://127.0.0.1:{self.ports[NATS]}"

    @property
    def users(self) -> list[str]:
        return user_names(nodes=[self.settings.node], tenants=[self.settings.tenant])

    def user_of(self, service: str) -> str:
        return f"{NODE_PREFIX}{self.settings.node}" if service == "nodeagent" else service


def process_specs(plan: Plan) -> list[ProcessSpec]:
    """Every part, in the order of its start. Writes keys and the NATS server's configuration."""
    return [_nats(plan), *(_service(plan, name) for name in PARTS[1:])]


# ---- NATS -----------------------------------------------------------------------------------------------------------


def _nats(plan: Plan) -> ProcessSpec:
    folder = plan.folder
    config = ServerConfig(
        store_directory=folder.nats / "store",
        port=plan.ports[NATS],
        users=users_of(generate_keys(folder.keys, plan.users)),
        max_file_store_bytes=file_store_limit_bytes(folder.nats),
        server_name=f"sublet-{plan.settings.node}",
    )
    config_path = folder.nats / "nats-server.conf"
    config_path.write_text(config.text(), encoding="utf-8")
    try:
        binary = find_server_binary()
    except NatsServerError as error:
        raise StackError(str(error)) from error
    return ProcessSpec(
        name=NATS,
        arguments=(str(binary), "-c", str(config_path)),
        environment=_inherited(),
        log_path=folder.logs / f"{NATS}.log",
        depends_on_ready=_streams_exist(plan),
    )


def _streams_exist(plan: Plan) -> Callable[[], Awaitable[bool]]:
    """Ready means: it answers, and holds every stream. Creates them, again after each restart."""

    async def check() -> bool:
        if not await holds(f"tcp://127.0.0.1:{plan.ports[NATS]}"):
            return False
        seed = read_seed(plan.folder.keys, ADMINISTRATOR)
        try:
            async with NatsBus(plan.nats_url, seed, ADMINISTRATOR, connect_timeout_s=2.0) as bus:
                await ensure_streams(bus)
        except ApiError as error:
            if not error.is_transient:
                raise StackError(f"the NATS server does not take a stream: {error}") from error
            return False
        except BusError:
            return False
        return True

    return check


# ---- services -------------------------------------------------------------------------------------------------------


def _service(plan: Plan, name: str) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        arguments=(sys.executable, "-m", "services", name),
        environment={
            **_inherited(),
            **plan.gpu_environment,
            **plan.settings.environment,
            **_variables(name, {**_settings(plan, name), **plan.settings.service_settings.get(name, {})}),
            **(_broker_variables(plan) if name == HOLDER else {}),
        },
        log_path=plan.folder.logs / f"{name}.log",
        depends_on_ready=_ready_check(plan, name),
        stop_grace_s={HOLDER: ENGINE_GRACE_S + 3.0, GATEWAY: DRAIN_S + 3.0}.get(name, 5.0),
    )


def _settings(plan: Plan, name: str) -> dict[str, object]:
    """The stack's own choices for a service; everything else is its default."""
    state, ports = plan.folder.service(name), plan.ports
    seed_path = plan.folder.keys / f"{plan.user_of(name)}{SEED_SUFFIX}"
    match name:
        case "holder":
            return {
                "state_dir": state,
                "socket_path": _socket(plan),
                "port": ports[name],
                "token": plan.holder_token,
                "stop_grace_s": ENGINE_GRACE_S,
            }
        case "gateway":
            return {
                "port": ports[name],
                "nats_url": plan.nats_url,
                "nkey_seed_file": seed_path,
                "holder_token": plan.holder_token,
                "drain_s": DRAIN_S,
            }
    connection: dict[str, object] = {
        "nats_url": plan.nats_url,
        "nkey_seed_file": seed_path,
        "health_port": ports[name],
    }
    if name != "nodeagent":
        return connection
    return {
        **connection,
        "node": plan.settings.node,
        "state_dir": state,
        "holder_socket": _socket(plan),
        "holder_url": f"http://127.0.0.1:{ports[HOLDER]}",
        "host_budget_bytes": plan.settings.phantom_host_bytes if plan.gpu_environment else 0,
        "cold_start_s": plan.settings.cold_start_s,
    }


def _broker_variables(plan: Plan) -> dict[str, str]:
    """The memory broker is the holder's child and gets its settings through it."""
    chosen: dict[str, object] = {"arena_dir": plan.folder.runtime / "arena"}
    if plan.gpu_environment:
        chosen["host_budget_bytes"] = plan.settings.phantom_host_bytes
    return _variables("broker", chosen | dict(plan.settings.service_settings.get("broker", {})))


def _socket(plan: Plan) -> Path:
    return plan.folder.runtime / "holder.sock"


def _ready_check(plan: Plan, name: str) -> ReadyCheck:
    if name == HOLDER:
        return f"unix://{_socket(plan)}"
    return f"http://127.0.0.1:{plan.ports[name]}/readyz"


def _variables(service: str, settings: Mapping[str, object]) -> dict[str, str]:
    """As `kit.settings` reads them."""
    return {
        f"SUBLET_{service.upper()}_{name.upper()}": json.dumps(value)
        if isinstance(value, (dict, list, bool))
        else str(value)
        for name, value in settings.items()
    }


def _inherited() -> dict[str, str]:
    """What every part gets from whoever started the stack: where programs are, and settings; nothing else."""
    taken = {
        name: value for name, value in os.environ.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**taken, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}

"""How clients of this host's stack get in: the context file, and one API key for development."""

import hashlib
import secrets
from typing import Final

from kit.bus import BusError
from kit.nats_access import TENANT_PREFIX
from schemas.inbox import KeyCreateRequested, Verdict
from services.local.state import StackError, StateFolder, read_json, write_private
from services.local.tenant import tenant_of

KEY_PREFIX: Final = "sk-sublet-"
KEY_EXISTS: Final = "SUB-KEY-002"
"""Placement's answer to a key id that it knows: then this very key was accepted before."""


def write_context(folder: StateFolder, *, nats_url: str, gateway_port: int, tenant: str, label: str) -> str:
    """The file by which `sublet` finds this stack. The API key in it is made once and kept; returns the key."""
    api_key = str(read_json(folder.context).get("api_key") or KEY_PREFIX + secrets.token_urlsafe(32))
    write_private(
        folder.context,
        {
            "nats_url": nats_url,
            "nkey_seed_path": f"{folder.keys.name}/{TENANT_PREFIX}{tenant}.nk",
            "tenant": tenant,
            "gateway_url": f"http://127.0.0.1:{gateway_port}",
            "api_key": api_key,
            "label": label,
        },
    )
    return api_key


async def publish_key(folder: StateFolder, *, nats_url: str, tenant: str, api_key: str) -> None:
    """Have the key's hash accepted, through the inbox like any client. Harmless to repeat."""
    key_hash = hashlib.sha256(api_key.encode()).hexdigest()
    key_id = f"key-{key_hash[:12]}"
    command = KeyCreateRequested(command_id=f"up-{key_id}", key_id=key_id, key_hash=key_hash, name="development")
    try:
        async with tenant_of(folder, nats_url=nats_url, name=tenant) as client:
            answer = await client.command(command)
    except BusError as error:
        raise StackError(f"the development key could not be published: {error}") from error
    if answer.verdict is Verdict.REJECTED and answer.code != KEY_EXISTS:
        raise StackError(f"the development key was rejected: {answer.message}")

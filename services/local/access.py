"""How clients of this host's stack get in: the context file, and one API key for development."""

import hashlib
import secrets
from typing import Final

import anyio
import msgspec

from kit.bus import BusError, Received
from kit.bus_nats import NatsBus
from kit.nats_access import TENANT_PREFIX, read_seed
from kit.nats_wire import tenant_inbox
from schemas.catalogue import encode
from schemas.inbox import CommandAnswered, KeyCreateRequested, Verdict
from schemas.messages import answer_subject, command_subject
from services.local.state import StackError, StateFolder, read_json, write_private

KEY_PREFIX: Final = "sk-sublet-"
ANSWER_WAIT_S: Final = 15.0
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
    user = f"{TENANT_PREFIX}{tenant}"
    answered = anyio.Event()
    answers: list[CommandAnswered] = []

    def receive(received: Received) -> None:
        answers.append(msgspec.json.decode(received.body, type=CommandAnswered))
        answered.set()

    try:
        async with (
            NatsBus(nats_url, read_seed(folder.keys, user), user, inbox_prefix=tenant_inbox(tenant)) as bus,
            bus.subscribe(answer_subject(tenant, command.command_id), receive),
        ):
            # An id of this attempt's own: a repeated one would be stored once, and answered only once.
            unique = f"{command.command_id}-{secrets.token_hex(4)}"
            await bus.publish_stored(command_subject(tenant, command), encode(command), id=unique)
            with anyio.move_on_after(ANSWER_WAIT_S):
                await answered.wait()
    except BusError as error:
        raise StackError(f"the development key could not be published: {error}") from error
    if not answers:
        raise StackError(f"placement did not answer within {ANSWER_WAIT_S:g} s; see its log")
    if answers[0].verdict is Verdict.REJECTED and answers[0].code != KEY_EXISTS:
        raise StackError(f"the development key was rejected: {answers[0].message}")

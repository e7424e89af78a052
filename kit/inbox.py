"""A stranger's message as an input: a command, or what is known of one that cannot be read."""

from typing import Any

import msgspec

from kit.bus import Stored
from kit.outcomes import UnreadableCommand
from kit.processor import Delivery
from schemas.catalogue import UNDECODABLE, UnknownVersion, UnreadableMessage, decode
from schemas.messages import Command


def inbox_delivery(stored: Stored, *, now_s: float) -> Delivery:
    """An inbox message as an input: the command, or what is known of one that cannot be read."""
    tenant = stored.subject.split(".")[2]
    command: Any
    try:
        command = decode(stored.body)
        if not isinstance(command, Command):
            raise UnreadableMessage(f"'{type(command).__name__}' is not a command")
    except (UnreadableMessage, UnknownVersion) as error:
        # A fact in an unknown version stops a service; a stranger's command must not be able to.
        command = UnreadableCommand(command_id=_command_id_in(stored), reason=str(error))
    return Delivery(input=command, now_s=now_s, inbox_seq=stored.seq, tenant=tenant, traceparent=stored.traceparent)


class _Nameable(msgspec.Struct):
    command_id: str = ""


def _command_id_in(stored: Stored) -> str:
    try:
        named = msgspec.json.decode(stored.body, type=_Nameable).command_id
    except UNDECODABLE:
        named = ""
    return named or stored.id or f"inbox-{stored.seq}"

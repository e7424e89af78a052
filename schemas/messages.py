"""The kinds of message, and how a class becomes a tag and a subject.

A class is one message. Its tag is ``<domain>.<name>.v<N>``; in subjects ``_`` stands for ``.``. Adding an event is one
class in one file: the catalogue, the subject, the decoder, the schema and the docs follow from it.
"""

import hashlib
from typing import Any, ClassVar, Final

from msgspec import Struct

SHARD_COUNT: Final = 64
"""Facts that a node agent must see are spread over this many subjects, so that an agent reads only its own part."""

NODE_WRITER: Final = "node"
"""Writer of facts whose prefix also names the node: ``node.<node>``."""


class Message(Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=False):
    """Base of everything on the wire. JSON; readers ignore fields that they do not know."""


class Fact(Message, frozen=True, kw_only=True):
    """Durable history, appended by one writer under its own prefix. The body holds all that a fold needs."""

    writer: ClassVar[str] = ""
    is_sharded: ClassVar[bool] = False


class Order(Message, frozen=True, kw_only=True):
    """A fleeting instruction to one node agent. Refused by its receiver when the writer's epoch is stale."""

    writer: ClassVar[str] = ""
    """Who alone sends it: whose epoch it carries."""
    goes_ahead: ClassVar[bool] = False
    """True: leaves before its fact is acknowledged; its receiver's own fact states what happened."""

    node: str
    writer_epoch: int
    deadline_ms: int


class Signal(Message, frozen=True, kw_only=True):
    """A fleeting observation: it changes state only through the facts that it leads to."""


class Command(Message, frozen=True, kw_only=True):
    """A wish of an outsider, published to the inbox. `command_id` makes repeating it harmless."""

    command_id: str


class Query(Message, frozen=True, kw_only=True):
    """A question answered from acknowledged state by request and reply."""

    service: ClassVar[str] = ""
    is_per_node: ClassVar[bool] = False


def tag_of(kind: type[Message] | Message) -> str:
    """The wire tag of a message class, for example ``nodes.lease_granted.v1``."""
    tag = kind.__struct_config__.tag
    assert isinstance(tag, str), kind
    return tag


def token_of(kind: type[Message] | Message) -> str:
    """The tag as one subject token, for example ``nodes_lease_granted_v1``."""
    return tag_of(kind).replace(".", "_")


def shard_of(node: str) -> int:
    """The shard (0 to 63) of facts meant for this node. Stable for ever: a change would hide history from agents."""
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:4], "big") % SHARD_COUNT


def prefix_of(writer: str) -> str:
    """The subject prefix that this writer alone may append under, as a wildcard."""
    return f"sublet.fact.{writer}.>"


def fact_subject(writer: str, fact: Fact) -> str:
    """Where a fact is appended. Keys are in the body, so that the number of subjects stays small."""
    subject = f"sublet.fact.{writer}.{token_of(fact)}"
    if fact.is_sharded:
        node: str = fact.node  # type: ignore[attr-defined]  # Sharded facts name their node; an architecture test checks it.
        return f"{subject}.{shard_of(node)}"
    return subject


def started_filter(writer: str) -> str:
    """The subject filter of one writer's `WriterStarted`, for those that obey its orders."""
    return f"sublet.fact.{writer}.history_writer_started_v1"


def fact_filter(kind: type[Fact], node: str | None = None) -> str:
    """The subject filter that selects all facts of a class; of a sharded one, only the given node's shard."""
    writer = f"{NODE_WRITER}.*" if kind.writer == NODE_WRITER else kind.writer
    subject = f"sublet.fact.{writer}.{token_of(kind)}"
    if not kind.is_sharded:
        return subject
    return f"{subject}.{'*' if node is None else shard_of(node)}"


def order_subject(order: Order) -> str:
    return f"sublet.order.{order.node}.{token_of(order)}"


def signal_subject(signal: Signal | type[Signal]) -> str:
    return f"sublet.signal.{token_of(signal)}"


def command_subject(tenant: str, command: Command | type[Command]) -> str:
    return f"sublet.in.{tenant}.{token_of(command)}"


def answer_subject(tenant: str, command_id: str) -> str:
    return f"sublet.out.{tenant}.{command_id}"


def query_subject(tenant: str, query: Query | type[Query], node: str | None = None) -> str:
    verb = token_of(query)
    service = f"{query.service}.{node or '*'}" if query.is_per_node else query.service
    return f"sublet.query.{tenant}.{service}.{verb}"


def message_subject(writer: str, message: Message) -> str:
    """The subject of any outgoing message that needs no tenant."""
    if isinstance(message, Fact):
        return fact_subject(writer, message)
    if isinstance(message, Order):
        return order_subject(message)
    assert isinstance(message, Signal), message
    return signal_subject(message)


def fields_of(message: Message) -> dict[str, Any]:
    """The fields by name, shallow; for logs and descriptions."""
    return {name: getattr(message, name) for name in message.__struct_fields__}

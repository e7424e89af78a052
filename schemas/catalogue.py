"""Every message, found from its class: the catalogue needs no list that could go stale."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, Final

import msgspec

import schemas
from schemas.messages import Command, Fact, Message, Order, Query, Signal, tag_of
from schemas.upcasting import upcast

_NOT_VOCABULARY = {"schemas.__main__", "schemas.generate", "schemas.catalogue"}


class UnknownVersion(Exception):
    """A known message in a version that this build does not know: an upgrade in the wrong order. Stop, do not guess."""

    def __init__(self, tag: str) -> None:
        super().__init__(f"message '{tag}' has a version that this build does not know; upgrade this service first")
        self.tag = tag


class UnreadableMessage(Exception):
    """The body is no message of ours; `reason` is one sentence for whoever sent it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _subclasses(kind: type[Message]) -> Iterator[type[Message]]:
    for child in kind.__subclasses__():
        if child.__struct_config__.tag not in (None, child.__name__):
            yield child
        yield from _subclasses(child)


def _load(kind: type[Message]) -> dict[str, type[Any]]:
    for module in pkgutil.iter_modules(schemas.__path__, "schemas."):
        if module.name not in _NOT_VOCABULARY:
            importlib.import_module(module.name)
    return {tag_of(child): child for child in sorted(_subclasses(kind), key=tag_of)}


FACTS: Final[dict[str, type[Fact]]] = _load(Fact)
ORDERS: Final[dict[str, type[Order]]] = _load(Order)
SIGNALS: Final[dict[str, type[Signal]]] = _load(Signal)
COMMANDS: Final[dict[str, type[Command]]] = _load(Command)
QUERIES: Final[dict[str, type[Query]]] = _load(Query)
MESSAGES: Final[dict[str, type[Message]]] = _load(Message)


class _Envelope(msgspec.Struct):
    type: str = ""


_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)
_DECODERS: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    tag: msgspec.json.Decoder(kind) for tag, kind in MESSAGES.items()
}
_DECODERS_BY_TAG: Final[dict[bytes, tuple[str, msgspec.json.Decoder[Any] | None]]] = {
    tag.encode(): (tag, decoder) for tag, decoder in _DECODERS.items()
}
_UNKNOWN: Final[tuple[str, msgspec.json.Decoder[Any] | None]] = ("", None)
_TAG_START: Final = b'{"type":"'
_TAG_AT: Final = len(_TAG_START)


def _without_version(tag: str) -> str:
    return tag.rpartition(".v")[0]


UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises for bytes of a stranger: no JSON, another shape, no UTF-8, nested too deeply."""

_FAMILIES: Final = {_without_version(tag) for tag in MESSAGES}


def decode(body: bytes | memoryview) -> Message:
    """The message in these bytes, brought to its newest version.

    Raises `UnreadableMessage` for anything that is no message of ours, and `UnknownVersion` for a known message in an
    unknown version.
    """
    # Most bodies are ours and begin with their tag: no need to look through all of it for the type first.
    tag, decoder = _leading(body)
    if decoder is None:
        try:
            tag = _ENVELOPE.decode(body).type
        except UNDECODABLE as error:
            raise UnreadableMessage(f"not a JSON object with a 'type': {error}") from error
        decoder = _DECODERS.get(tag)
    if decoder is None:
        newer = upcast(tag, body)
        if newer is not None:
            return decode(newer)
        if _without_version(tag) in _FAMILIES:
            raise UnknownVersion(tag)
        raise UnreadableMessage(f"unknown message type '{tag}'" if tag else "the object has no 'type'")
    try:
        message: Message = decoder.decode(body)
    except UNDECODABLE as error:
        raise UnreadableMessage(f"{tag}: {error}") from error
    return message


def _leading(body: bytes | memoryview) -> tuple[str, msgspec.json.Decoder[Any] | None]:
    """Tag and decoder of a body that begins with its tag, as ours do."""
    if not isinstance(body, bytes) or body[:_TAG_AT] != _TAG_START:
        return _UNKNOWN
    return _DECODERS_BY_TAG.get(body[_TAG_AT : body.find(b'"', _TAG_AT)], _UNKNOWN)


def encode(message: msgspec.Struct) -> bytes:
    """The JSON that travels."""
    return _ENCODER.encode(message)


_ENCODER: Final = msgspec.json.Encoder()

"""A writer's state at one place in its history, as bytes: a start folds only what came after.

Pure: what is in a snapshot, whether one fits, and how it becomes bytes. `kit.snapshot_store` keeps them.
"""

import hashlib
import zlib
from dataclasses import fields
from functools import cache
from typing import Any, Final, TypeVar, get_type_hints

import msgspec

from kit.service import NOT_DURABLE, Service

S = TypeVar("S")

FORMAT_VERSION: Final = 1
OWN_IDS_MAX: Final = 4_000
"""Newest own ids kept: twice what a journal holds of entries that the stream has, so that each is recognised."""
COMPRESSION_LEVEL: Final = 1
"""Of zlib: a tenth of the size at a third of the time that its default takes."""


class SnapshotUnusable(Exception):
    """It cannot be started from; the text says why. Another one, or history from its start, is tried instead."""


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """Whose state it is, in which form, and where in history. JSON, so that an operator can read it."""

    format_version: int
    service: str
    writer: str
    state_version: int
    state_types: str
    """Fingerprint of the types that the state is made of."""
    stream_id: str
    read_seq: int
    """All of the stream up to here was handed to the writer: the next read begins behind it."""
    last_seq: int
    """The writer's newest own fact. Own facts up to here are in the state."""
    cursor_seq: int
    last_hash: str
    writer_epoch: int
    now_s: float
    machine_id: str = ""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A position and all that the writer knew there."""

    position: Position
    foreign_hashes: dict[str, str]
    """{writer: its chain's last hash}, of those that are read whole."""
    writer_epochs: dict[str, int]
    """{writer: newest epoch known}; orders of an older one are refused."""
    own_ids: list[str]
    state: msgspec.Raw
    """MessagePack of the durable fields."""


class _Body(msgspec.Struct, array_like=True):
    foreign_hashes: dict[str, str]
    writer_epochs: dict[str, int]
    own_ids: list[str]
    state: msgspec.Raw


_ENCODER: Final = msgspec.msgpack.Encoder()
_BODY_DECODER: Final = msgspec.msgpack.Decoder(_Body)


def encode_state(state: Any) -> msgspec.Raw:
    """The durable fields of a state, exactly: what `restore_state` makes of it has the same `kit.service.digest`."""
    kind = durable_type(_class_of(state))
    durable = kind(**{name: getattr(state, name) for name in kind.__struct_fields__})
    return msgspec.Raw(_ENCODER.encode(durable))


def restore_state(state: S, encoded: msgspec.Raw) -> None:
    """Put the durable fields into a new state. Raises `SnapshotUnusable`."""
    try:
        durable = _decoder(_class_of(state)).decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotUnusable(f"its state cannot be read: {error}") from error
    for name in durable.__struct_fields__:
        setattr(state, name, getattr(durable, name))


def state_types(state: Any) -> str:
    """A fingerprint of the types that a state is made of: another one means that its bytes may mean something else."""
    return fingerprint(durable_type(_class_of(state)))


@cache
def fingerprint(kind: Any) -> str:
    """Of a class, and of all that its fields may hold."""
    schema = msgspec.json.schema(kind)
    canonical = msgspec.json.encode(_without_texts(schema), order="deterministic")
    return hashlib.blake2b(canonical, digest_size=8).hexdigest()


def check_fit(position: Position, service: Service[Any], state: Any, *, writer: str) -> None:
    """Raises `SnapshotUnusable` unless this build can start from it."""
    if position.format_version != FORMAT_VERSION:
        raise SnapshotUnusable(f"its format is {position.format_version}, and this build reads {FORMAT_VERSION}")
    if (position.service, position.writer) != (service.name, writer):
        raise SnapshotUnusable(f"it is of {position.service} as {position.writer}")
    if position.state_version != service.state_version:
        raise SnapshotUnusable(f"its state has version {position.state_version}, not {service.state_version}")
    if position.state_types != state_types(state):
        raise SnapshotUnusable("the state's types have changed since")


def pack(snapshot: Snapshot) -> bytes:
    """Everything but the position, compressed. Lets other threads run while it compresses."""
    body = _Body(snapshot.foreign_hashes, snapshot.writer_epochs, snapshot.own_ids, snapshot.state)
    return zlib.compress(_ENCODER.encode(body), COMPRESSION_LEVEL)


def unpack(position: Position, packed: bytes) -> Snapshot:
    """Raises `SnapshotUnusable`."""
    try:
        body = _BODY_DECODER.decode(zlib.decompress(packed))
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotUnusable(f"it is damaged: {error}") from error
    return Snapshot(
        position=position,
        foreign_hashes=body.foreign_hashes,
        writer_epochs=body.writer_epochs,
        own_ids=body.own_ids,
        state=body.state,
    )


@cache
def durable_type(kind: Any) -> type[msgspec.Struct]:
    """A Struct with the durable fields of a state's class, typed as they are annotated there."""
    hints = get_type_hints(kind)
    return msgspec.defstruct(
        kind.__name__, [(f.name, hints[f.name]) for f in fields(kind) if f.name not in NOT_DURABLE]
    )


def _class_of(state: Any) -> Any:
    """As Any: mypy doubts that a class is hashable."""
    return type(state)


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(durable_type(kind))


def _without_texts(schema: Any) -> Any:
    """Without docstrings: changing one changes no bytes."""
    if isinstance(schema, dict):
        return {
            key: _without_texts(value)
            for key, value in schema.items()
            if not (key in {"description", "title"} and isinstance(value, str))
        }
    return [_without_texts(value) for value in schema] if isinstance(schema, list) else schema

"""What gateways begin with once the start of history is trimmed. Whoever trims makes it; a gateway only reads it.

Gateways share one user, so a snapshot that any of them could write would let one bring keys and routes into all others.
"""

from typing import Final

import msgspec

from kit.bus import Bus, BusError
from kit.snapshot_store import SnapshotStore
from kit.snapshots import FORMAT_VERSION, Position, Snapshot, SnapshotUnusable, fingerprint
from services.gateway.routes import RouteTable, TableImage

WRITER: Final = "gateway"
IMAGE_VERSION: Final = 1
"""Raise it when the fold changes what it makes of old facts."""

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(TableImage)


def snapshot_of(table: RouteTable, *, stream_id: str, read_seq: int, hashes: dict[str, str]) -> Snapshot:
    """`hashes`: of the chains of those that gateways follow, as they were at `read_seq`."""
    position = Position(
        format_version=FORMAT_VERSION,
        service=WRITER,
        writer=WRITER,
        state_version=IMAGE_VERSION,
        state_types=fingerprint(TableImage),
        stream_id=stream_id,
        read_seq=read_seq,
        last_seq=read_seq,
        cursor_seq=read_seq,
        last_hash="",
        writer_epoch=0,
        now_s=0.0,
    )
    return Snapshot(
        position=position,
        foreign_hashes=dict(hashes),
        writer_epochs={},
        own_ids=[],
        state=msgspec.Raw(_ENCODER.encode(table.image())),
    )


def table_of(snapshot: Snapshot) -> RouteTable:
    """Raises `SnapshotUnusable`."""
    position = snapshot.position
    if (position.state_version, position.state_types) != (IMAGE_VERSION, fingerprint(TableImage)):
        raise SnapshotUnusable("it is of another version of the gateway")
    try:
        return RouteTable.of(_DECODER.decode(snapshot.state))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotUnusable(f"it cannot be read: {error}") from error


async def newest(bus: Bus) -> tuple[Snapshot, RouteTable] | None:
    """The newest that can be used; None without one. Raises `BusError`."""
    store = SnapshotStore(bus, WRITER)
    problem: BusError | None = None
    for manifest in await store.found():
        try:
            snapshot = await store.load(manifest)
            return snapshot, table_of(snapshot)
        except SnapshotUnusable:
            continue
        except BusError as error:
            problem = error
    if problem is not None:
        raise problem
    return None

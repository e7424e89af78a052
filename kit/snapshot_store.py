"""Where snapshots are kept: in a stream beside history, so that another instance on another host may start from them.

Each writer has a few slots, written in turn: chunks first, the manifest last. A slot keeps one message of each subject,
so a snapshot that was left half written has the manifest of its predecessor, which no longer fits its chunks: it is
found damaged, and the slot before it is used.
"""

import hashlib
import logging
from contextlib import aclosing
from typing import Final

import anyio
import msgspec

from kit.bus import Bus, BusError, CaughtUp, Stored, Stream
from kit.snapshots import Position, Snapshot, SnapshotUnusable, pack, unpack

SLOT_COUNT: Final = 3
CHUNK_BYTES: Final = 256 * 1024
"""A quarter of the server's largest message: other messages of the connection wait for one chunk at most."""
LOAD_TIMEOUT_S: Final = 10.0
"""To find or to load; then history is folded without."""

log = logging.getLogger(__name__)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Says that a snapshot is whole, and where it stands."""

    position: Position
    slot: int
    name: str
    """Of this snapshot alone; its chunks bear it."""
    chunk_count: int
    packed_bytes: int
    checksum: str
    stored_seq: int = 0
    """Where it stands itself; filled in by the reader."""


class SnapshotStore:
    """One writer's snapshots."""

    def __init__(self, bus: Bus, writer: str) -> None:
        self._bus = bus
        self._writer = writer
        self._next_slot: int | None = None

    async def save(self, snapshot: Snapshot) -> Manifest:
        """Returns when it is stored as a whole. Compresses in a worker thread. Raises `BusError`.

        Not for two tasks at once.
        """
        packed = await anyio.to_thread.run_sync(pack, snapshot)
        if self._next_slot is None:
            manifests = await self.found()
            self._next_slot = (manifests[0].slot + 1) % SLOT_COUNT if manifests else 0
        position = snapshot.position
        checksum = _checksum(packed)
        manifest = Manifest(
            position=position,
            slot=self._next_slot,
            name=f"snapshot:{self._writer}:{self._next_slot}:{position.last_seq}:{position.read_seq}:{checksum[:12]}",
            chunk_count=-(-len(packed) // CHUNK_BYTES),
            packed_bytes=len(packed),
            checksum=checksum,
        )
        for number in range(manifest.chunk_count):
            chunk = packed[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
            subject = f"sublet.snapshot.{self._writer}.chunk.{manifest.slot}.{number}"
            await self._bus.publish_stored(subject, chunk, id=f"{manifest.name}:{number}")
        subject = f"sublet.snapshot.{self._writer}.manifest.{manifest.slot}"
        await self._bus.publish_stored(subject, msgspec.json.encode(manifest), id=manifest.name)
        self._next_slot = (manifest.slot + 1) % SLOT_COUNT
        return manifest

    async def found(self) -> list[Manifest]:
        """Newest first. Raises `BusError`, also when it takes longer than `LOAD_TIMEOUT_S`."""
        return manifests_of(await self._read(f"sublet.snapshot.{self._writer}.manifest.*"))

    async def load(self, manifest: Manifest) -> Snapshot:
        """Raises `SnapshotUnusable`, `BusError`."""
        chunks = {
            int(stored.subject.rpartition(".")[2]): stored
            for stored in await self._read(f"sublet.snapshot.{self._writer}.chunk.{manifest.slot}.*")
        }
        wanted = range(manifest.chunk_count)
        if any(number not in chunks or chunks[number].id != f"{manifest.name}:{number}" for number in wanted):
            raise SnapshotUnusable("a part of it is missing; a newer one was left half written in its place")
        packed = b"".join(chunks[number].body for number in wanted)
        if _checksum(packed) != manifest.checksum:
            raise SnapshotUnusable("it is damaged: its checksum differs")
        return await anyio.to_thread.run_sync(unpack, manifest.position, packed)

    async def _read(self, subject: str) -> list[Stored]:
        return await stored_snapshots(self._bus, subject)


async def stored_snapshots(bus: Bus, subject: str) -> list[Stored]:
    """What the stream of snapshots holds under a subject now. Raises `BusError`."""
    found: list[Stored] = []
    with anyio.move_on_after(LOAD_TIMEOUT_S):
        async with aclosing(bus.read(Stream.SNAPSHOTS, [subject], after_seq=0)) as reading:
            async for item in reading:
                if isinstance(item, CaughtUp):
                    return found
                found.append(item)
    raise BusError(f"the stream {Stream.SNAPSHOTS} did not answer within {LOAD_TIMEOUT_S} s")


def manifests_of(messages: list[Stored]) -> list[Manifest]:
    """Newest first; what is no manifest of this format is left out."""
    manifests = []
    for stored in messages:
        try:
            manifest = msgspec.json.decode(stored.body, type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.warning("unreadable snapshot", extra={"subject": stored.subject, "seq": stored.seq})
            continue
        manifests.append(msgspec.structs.replace(manifest, stored_seq=stored.seq))
    return sorted(manifests, key=lambda manifest: -manifest.stored_seq)


def _checksum(packed: bytes) -> str:
    return hashlib.blake2b(packed, digest_size=16).hexdigest()

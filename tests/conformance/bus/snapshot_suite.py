"""The stream of snapshots and the store over it, held to the same on every bus."""

import random
from contextlib import aclosing

import msgspec
import pytest
from msgspec import structs

from kit.bus import Bus, Stream
from kit.snapshot_store import CHUNK_BYTES, SnapshotStore
from kit.snapshots import Position, Snapshot, SnapshotUnusable
from tests.conformance.bus.bus_suite import BusSuite, ids, read_to_end, taken


def snapshot_at(seq: int, *, chunk_count: int = 1) -> Snapshot:
    """Of random bytes, which do not compress."""
    size_bytes = (chunk_count - 1) * CHUNK_BYTES + 1000
    position = Position(
        format_version=1,
        service="autoscaler",
        writer="autoscaler",
        state_version=1,
        state_types="x",
        stream_id="s",
        read_seq=seq,
        last_seq=seq,
        cursor_seq=seq,
        last_hash="h",
        writer_epoch=1,
        now_s=1.0,
    )
    state = msgspec.msgpack.encode(random.Random(seq).randbytes(size_bytes))
    return Snapshot(
        position=position,
        foreign_hashes={"placement": "h"},
        writer_epochs={"swapper": 3},
        own_ids=["a"],
        state=msgspec.Raw(state),
    )


class SnapshotSuite(BusSuite):
    """All that a bus must do, snapshots included."""

    async def test_the_stream_of_snapshots_keeps_the_newest_of_each_subject(self, bus: Bus) -> None:
        for number in range(7):
            await bus.publish_stored(f"sublet.snapshot.w.chunk.0.{number % 3}", b"x", id=str(number))

        found, end = await read_to_end(bus, Stream.SNAPSHOTS, ["sublet.snapshot.w.>"])

        assert ids(found) == ["4", "5", "6"]
        assert end.last_seq == found[-1].seq

    async def test_a_reader_of_snapshots_goes_on_over_what_was_replaced(self, bus: Bus, other: Bus) -> None:
        for number in range(6):
            await bus.publish_stored(f"sublet.snapshot.w.chunk.0.{number % 3}", b"x", id=str(number))
        async with aclosing(other.read(Stream.SNAPSHOTS, ["sublet.snapshot.w.>"], after_seq=0)) as reading:
            assert ids(await taken(reading, 4)) == ["3", "4", "5", "caught up"]
            await bus.publish_stored("sublet.snapshot.w.chunk.0.1", b"x", id="6")
            assert ids(await taken(reading, 1)) == ["6"]

    async def test_a_snapshot_is_found_by_another_connection_and_is_the_same(self, bus: Bus, other: Bus) -> None:
        snapshot = snapshot_at(5, chunk_count=3)
        saved = await SnapshotStore(bus, "autoscaler").save(snapshot)
        store = SnapshotStore(other, "autoscaler")

        [manifest] = await store.found()

        assert structs.replace(manifest, stored_seq=0) == saved
        assert await store.load(manifest) == snapshot

    async def test_the_newest_few_snapshots_are_kept_newest_first(self, bus: Bus, other: Bus) -> None:
        for seq in range(1, 6):
            # Each by a store that knows of the others only what the stream says.
            await SnapshotStore(bus, "autoscaler").save(snapshot_at(seq))
        store = SnapshotStore(other, "autoscaler")

        manifests = await store.found()

        assert [manifest.position.last_seq for manifest in manifests] == [5, 4, 3]
        assert [(await store.load(manifest)).position.last_seq for manifest in manifests] == [5, 4, 3]

    async def test_a_snapshot_that_was_left_half_written_is_not_used(self, bus: Bus) -> None:
        store = SnapshotStore(bus, "autoscaler")
        for seq in range(1, 4):
            await store.save(snapshot_at(seq))
        await bus.publish_stored("sublet.snapshot.autoscaler.chunk.0.0", b"a newer one", id="half")

        newest, second, oldest = await store.found()

        assert [(await store.load(manifest)).position.last_seq for manifest in (newest, second)] == [3, 2]
        with pytest.raises(SnapshotUnusable, match="half written"):
            await store.load(oldest)

    async def test_one_writers_snapshots_are_not_anothers(self, bus: Bus) -> None:
        await SnapshotStore(bus, "node.a").save(snapshot_at(1))

        assert await SnapshotStore(bus, "node.b").found() == []

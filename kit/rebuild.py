"""How a writer comes to its state at a start: from the newest snapshot that fits and what history holds beyond it."""

import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any, Final, TypeVar

from kit.bus import Bus, BusError, CaughtUp, HistoryGone, Reading, Stored, Stream
from kit.processor import Processor
from kit.snapshot_store import SnapshotStore
from kit.snapshots import Snapshot, SnapshotUnusable
from schemas.messages import NODE_WRITER

S = TypeVar("S")

ALL_FACTS: Final = "sublet.fact.>"
LARGE_COUNT: Final = 50_000
"""Objects that a start made: from there on a full collection takes some ten milliseconds."""


async def rebuilt(
    bus: Bus,
    new_processor: Callable[[], Processor[S]],
    store: SnapshotStore | None,
    *,
    stack: AsyncExitStack,
    follow: Callable[[Stored], None],
    log: logging.Logger,
) -> tuple[Processor[S], Reading, int]:
    """A processor at the end of history, the reading that goes on from there, and how many messages were replayed.

    Without a snapshot that fits, all of history is folded; the log says why. Raises `HistoryGone` when its start is
    trimmed then, with a sentence for the operator.
    """
    with _without_collections():
        return await _rebuilt(bus, new_processor, store, stack=stack, follow=follow, log=log)


async def _rebuilt(
    bus: Bus,
    new_processor: Callable[[], Processor[S]],
    store: SnapshotStore | None,
    *,
    stack: AsyncExitStack,
    follow: Callable[[Stored], None],
    log: logging.Logger,
) -> tuple[Processor[S], Reading, int]:
    why_not = "there is none"
    async for snapshot in _candidates(store, log):
        processor = new_processor()
        try:
            processor.restore(snapshot)
            reading, count = await _replayed(bus, processor, stack=stack, follow=follow)
        except (SnapshotUnusable, HistoryGone) as error:
            why_not = str(error)
            log.warning("snapshot not used", extra={"seq": snapshot.position.last_seq, "reason": why_not})
            continue
        log.info("started from a snapshot", extra={"seq": snapshot.position.last_seq, "replayed_count": count})
        return processor, reading, count
    processor = new_processor()
    try:
        reading, count = await _replayed(bus, processor, stack=stack, follow=follow)
    except HistoryGone as error:
        raise HistoryGone(
            f"{error}, and no snapshot of {processor.writer} can be used ({why_not}): "
            f"restore the stream {Stream.SNAPSHOTS} or the start of {Stream.HISTORY} from a backup"
        ) from error
    return processor, reading, count


async def _candidates(store: SnapshotStore | None, log: logging.Logger) -> AsyncIterator[Snapshot]:
    """Newest first, each loaded when it is asked for. What cannot be read is left out: history says the same."""
    if store is None:
        return
    try:
        manifests = await store.found()
    except BusError as error:
        log.warning("no snapshot can be read", extra={"reason": str(error)})
        return
    for manifest in manifests:
        try:
            yield await store.load(manifest)
        except (SnapshotUnusable, BusError) as error:
            log.warning("snapshot not used", extra={"seq": manifest.position.last_seq, "reason": str(error)})


async def _replayed(
    bus: Bus, processor: Processor[Any], *, stack: AsyncExitStack, follow: Callable[[Stored], None]
) -> tuple[Reading, int]:
    """To the end of history."""
    filters = read_filters(processor)
    count, newest = 0, None
    if len(filters) > 1:
        past, end_seq = await _gathered(bus, processor, filters)
        processor.replay(past)
        processor.read_seq = max(processor.read_seq, end_seq)
        count, newest = len(past), past[-1] if past else None
    reading = bus.read(Stream.HISTORY, filters, after_seq=processor.read_seq, stream_id=processor.stream_id)
    await stack.enter_async_context(aclosing(reading))
    async for item in reading:
        if isinstance(item, CaughtUp):
            processor.stream_id = item.stream_id
            break
        processor.replay_one(item)
        count, newest = count + 1, item
    if newest is not None:
        follow(newest)
    return reading, count


def read_filters(processor: Processor[Any]) -> Sequence[str]:
    """What to ask of the server: a cluster-wide writer follows nearly all facts, so it reads all and drops the rest.

    With several filters the server delivers at a third of the rate (docs/benchmarks.md).
    """
    is_bound = processor.writer.startswith(f"{NODE_WRITER}.")
    return [processor.prefix, *processor.reads] if is_bound else [ALL_FACTS]


async def _gathered(bus: Bus, processor: Processor[Any], filters: Sequence[str]) -> tuple[Sequence[Stored], int]:
    """All of the past that matches, in order, by one read for each filter, and how far that goes.

    For a node's agent, of whose history there is little. The caller goes on behind it with one read for all filters.
    """
    found: dict[int, Stored] = {}
    ends: list[CaughtUp] = []

    async def gather(subject: str) -> None:
        reading = bus.read(Stream.HISTORY, [subject], after_seq=processor.read_seq, stream_id=processor.stream_id)
        async with aclosing(reading):
            async for item in reading:
                if isinstance(item, CaughtUp):
                    ends.append(item)
                    return
                found[item.seq] = item

    for subject in filters:
        await gather(subject)
    processor.stream_id = ends[0].stream_id
    end_seq = min(end.last_seq for end in ends)
    return [found[seq] for seq in sorted(found) if seq <= end_seq], end_seq


@contextmanager
def _without_collections() -> Iterator[None]:
    """Folding makes no garbage in cycles, and each full collection would look at all of the state again.

    A large state is left out of later collections too: it stays for long, and each would be a pause. An earlier life's
    was left out in the same way, and is garbage now.
    """
    if gc.get_freeze_count() > LARGE_COUNT:
        gc.unfreeze()
        gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    before_count = gc.get_count()[0]
    try:
        yield
    finally:
        if was_enabled:
            if gc.get_count()[0] - before_count > LARGE_COUNT:
                gc.freeze()
            gc.enable()

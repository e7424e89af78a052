"""How a writer comes to its state at a start: from the newest snapshot that fits and what history holds beyond it."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from kit.bus import Bus, BusError, CaughtUp, HistoryGone, Reading, Stored, Stream
from kit.processor import Processor
from kit.snapshot_store import SnapshotStore
from kit.snapshots import Snapshot, SnapshotUnusable

S = TypeVar("S")


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
    reading = bus.read(
        Stream.HISTORY,
        [processor.prefix, *processor.reads],
        after_seq=processor.read_seq,
        stream_id=processor.stream_id,
    )
    await stack.enter_async_context(aclosing(reading))
    count = 0
    async for item in reading:
        if isinstance(item, CaughtUp):
            processor.stream_id = item.stream_id
            break
        follow(item)
        processor.replay_one(item)
        count += 1
    return reading, count

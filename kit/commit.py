"""Two ways to commit what was decided: straight into the stream, or into a local journal that is uploaded in order."""

import errno
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Protocol

import anyio
from anyio.abc import TaskGroup

from kit.bus import APPEND_ENTRIES_MAX, Bus, Entry
from kit.history import FULL_RETRY_S, append_surely
from kit.journal import Journal
from kit.processor import Batch, Processor
from kit.status import Hold, told_to_nobody
from kit.steps import Step

UPLOAD_ENTRIES_MAX: Final = 256
TRIM_AFTER_COUNT: Final = 2000
"""Uploaded entries kept in the journal before it is rewritten."""
FULL_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT)


class Committer(Protocol):
    """Makes a batch durable; only then may its orders and effects leave."""

    async def start(self, tg: TaskGroup) -> None: ...

    async def recover(self) -> None:
        """Bring what an earlier life committed elsewhere into the processor and the stream."""
        ...

    async def commit(self, batch: Batch) -> None:
        """Returns when the batch is durable for this writer."""
        ...

    async def commit_durably(self, batch: Batch) -> int:
        """Returns when the batch is in the stream, with the sequence of its last entry."""
        ...

    @property
    def is_settled(self) -> bool:
        """Everything that was committed is in the stream."""
        ...

    async def settled(self) -> None: ...


class DirectCommitter:
    """Cluster-wide services: nothing is durable before the stream holds it."""

    def __init__(self, bus: Bus, processor: Processor[Any], *, hold: Hold = told_to_nobody) -> None:
        self._bus = bus
        self._processor = processor
        self._hold = hold

    async def start(self, tg: TaskGroup) -> None:
        return None

    async def recover(self) -> None:
        return None

    async def commit(self, batch: Batch) -> None:
        if batch.entries:
            await self.commit_durably(batch)

    async def commit_durably(self, batch: Batch) -> int:
        processor = self._processor
        last_seq = processor.last_seq
        for entries in appends(batch):
            last_seq = await append_surely(self._bus, processor.prefix, entries, last_seq=last_seq, hold=self._hold)
        processor.committed(batch, last_seq=last_seq)
        return last_seq

    @property
    def is_settled(self) -> bool:
        return True

    async def settled(self) -> None:
        return None


def appends(batch: Batch) -> Iterator[list[Entry]]:
    """The batch as it is appended: at once, or what the last input made by itself if all is more than one append holds.

    An input that made more than that by itself is spread: the core should bound what it decides in one input, but a
    service that stops there would stop again after each restart.
    """
    if len(batch.entries) <= APPEND_ENTRIES_MAX:
        yield batch.entries
        return
    for part in (batch.entries[: batch.last_input_start], batch.entries[batch.last_input_start :]):
        for first in range(0, len(part), APPEND_ENTRIES_MAX):
            yield part[first : first + APPEND_ENTRIES_MAX]


class JournaledCommitter:
    """Node agents: durable on the local disk first, so that they act within their leases while the stream is away."""

    def __init__(
        self,
        bus: Bus,
        processor: Processor[Any],
        journal: Journal,
        *,
        passed: Callable[[Step, object], Awaitable[None]],
        hold: Hold = told_to_nobody,
    ) -> None:
        self._bus = bus
        self._processor = processor
        self._journal = journal
        self._passed = passed
        self._hold = hold
        self._waiting: list[Entry] = []
        self._uploaded: list[str] = []
        self._arrived = anyio.Event()
        self._drained = anyio.Event()

    async def start(self, tg: TaskGroup) -> None:
        tg.start_soon(self._upload)

    async def recover(self) -> None:
        """Fold the journal's surplus after what the stream holds, and queue it for the upload."""
        known = self._processor.own_ids()
        surplus = [entry for entry in self._journal.entries if entry.id not in known]
        for entry in surplus:
            if self._processor.replay_own(entry, seq=self._processor.last_seq):
                self._queue([entry])
        await self._passed(Step.JOURNAL_FOLDED, surplus)
        waiting = {entry.id for entry in self._waiting}
        await self._trim([entry.id for entry in self._journal.entries if entry.id not in waiting])
        await self._passed(Step.JOURNAL_TRIMMED, None)

    async def commit(self, batch: Batch) -> None:
        if batch.entries:
            await self._write(batch.entries)
            await self._passed(Step.JOURNALED, batch)
            self._queue(batch.entries)

    async def commit_durably(self, batch: Batch) -> int:
        await self.commit(batch)
        await self.settled()
        return self._processor.last_seq

    @property
    def is_settled(self) -> bool:
        return not self._waiting

    async def settled(self) -> None:
        while self._waiting:
            self._drained = anyio.Event()
            await self._drained.wait()

    def _queue(self, entries: list[Entry]) -> None:
        self._waiting.extend(entries)
        self._arrived.set()

    async def _upload(self) -> None:
        while True:
            if not self._waiting:
                self._drained.set()
                self._arrived = anyio.Event()
                await self._arrived.wait()
                continue
            entries = self._waiting[:UPLOAD_ENTRIES_MAX]
            processor = self._processor
            last_seq = await append_surely(
                self._bus, processor.prefix, entries, last_seq=processor.last_seq, hold=self._hold
            )
            await self._passed(Step.UPLOADED, entries)
            processor.last_seq = last_seq
            del self._waiting[: len(entries)]
            self._uploaded.extend(entry.id for entry in entries)
            if not self._waiting and len(self._uploaded) >= TRIM_AFTER_COUNT:
                await self._trim(self._uploaded)

    async def _write(self, entries: list[Entry]) -> None:
        """Returns when they are on the local disk; while that is full it waits, and nothing that follows may begin."""
        try:
            while True:
                try:
                    return await anyio.to_thread.run_sync(self._journal.write, entries)
                except OSError as error:
                    if error.errno not in FULL_DISK_ERRORS:
                        raise
                    self._hold("journal", f"the disk of {self._journal.path} is full: free some space on it")
                await anyio.sleep(FULL_RETRY_S)
        finally:
            self._hold("journal", "")

    async def _trim(self, uploaded_ids: list[str]) -> None:
        """Rewrite the journal without what the stream holds. A full disk only puts it off."""
        try:
            await anyio.to_thread.run_sync(self._journal.trim, list(uploaded_ids))
        except OSError as error:
            if error.errno not in FULL_DISK_ERRORS:
                raise
        else:
            self._uploaded = []

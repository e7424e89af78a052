"""The bus in one process: for tests of the shell, under asyncio and trio, with faults on demand.

Several connections (`MemoryBus`) share one `MemoryServer`. Nothing here reads a clock or draws a number of its own:
time comes from the function given to the server, faults from its seed.
"""

import random
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Self

import anyio
import anyio.lowlevel

from kit.bus import (
    APPEND_ENTRIES_MAX,
    EXPIRING_STREAMS,
    STREAM_SUBJECTS,
    Acknowledged,
    AppendConflict,
    AppendRefused,
    AppendUnknown,
    BusError,
    CaughtUp,
    Entry,
    HistoryGone,
    NoAnswer,
    Received,
    Stored,
    Stream,
    subject_matches,
)


class AppendFault(Enum):
    """What befalls one append; see `MemoryServer.append_faults`."""

    LOSE_REQUEST = auto()
    """Nothing is stored, and no answer comes."""
    LOSE_ACK = auto()
    """The batch is stored, and no answer comes."""
    REFUSE = auto()
    """The stream says that it is full."""


@dataclass(slots=True)
class _MemoryStream:
    created_count: int
    first_seq: int = 1
    last_seq: int = 0
    stored: deque[Stored] = field(default_factory=deque)
    seq_of_id: dict[str, int] = field(default_factory=dict)
    """Of `publish_stored`: what the duplicate window is on a real server."""

    def from_seq(self, seq: int) -> Iterator[Stored]:
        """What is stored at this sequence and after it, in order."""
        gone_count = self.last_seq + 1 - self.first_seq - len(self.stored)
        for index in range(max(0, seq - self.first_seq - gone_count), len(self.stored)):
            if self.stored[index].seq >= seq:
                yield self.stored[index]

    def drop_older(self, subject: str) -> None:
        """Keep only the newest message of the subject."""
        newest = next(stored for stored in reversed(self.stored) if stored.subject == subject)
        self.stored = deque(s for s in self.stored if s.subject != subject or s is newest)
        self.first_seq = self.stored[0].seq


@dataclass(slots=True, eq=False)
class _Subscription:
    owner: "MemoryBus"
    subject: str
    queue: str
    receive: Callable[[Received], None]


class MemoryServer:
    """What all connections share. `append_faults` befall the next appends, one each, in order."""

    def __init__(
        self,
        now: Callable[[], float] = lambda: 0.0,
        *,
        loss_fraction: float = 0.0,
        duplicate_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`now` gives stream time in Unix seconds; the fractions (0 to 1) befall deliveries of fleeting messages."""
        self.now = now
        self.append_faults: deque[AppendFault] = deque()
        self.loss_fraction = loss_fraction
        self.duplicate_fraction = duplicate_fraction
        self._random = random.Random(seed)
        self._created_count = 0
        self.streams = {stream: self._new_stream() for stream in Stream}
        self.subscriptions: list[_Subscription] = []
        self._queue_turns: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.leases: dict[str, tuple[str, float]] = {}
        self.buses: list[MemoryBus] = []
        self._inbox_count = 0
        self.is_up = True
        self.changed = anyio.Event()

    # ---- what a test does to it --------------------------------------------------------------------------------

    def stop(self) -> None:
        """The server is away: fleeting messages are dropped, all else waits or fails. What is stored stays."""
        self.is_up = False
        self.wake_all()

    async def restart(self) -> None:
        """The server is back; every connection is told, as after a real reconnect."""
        self.is_up = True
        self.wake_all()
        for bus in list(self.buses):
            await bus.reconnected()

    def trim(self, stream: Stream, *, below_seq: int) -> None:
        """Drop all messages below the sequence."""
        held = self.streams[stream]
        while held.stored and held.first_seq < below_seq:
            held.stored.popleft()
            held.first_seq += 1

    def recreate(self, stream: Stream) -> None:
        """Replace the stream by an empty one of the same name."""
        self.streams[stream] = self._new_stream()
        self.wake_all()

    def stored(self, stream: Stream) -> list[Stored]:
        """All that the stream holds now."""
        return list(self.streams[stream].stored)

    # ---- what connections ask of it ----------------------------------------------------------------------------

    def _new_stream(self) -> _MemoryStream:
        self._created_count += 1
        return _MemoryStream(created_count=self._created_count)

    def wake_all(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def last(self, prefix: str) -> Stored | None:
        history = self.streams[Stream.HISTORY].stored
        return next((stored for stored in reversed(history) if subject_matches(prefix, stored.subject)), None)

    def append(self, prefix: str, entries: Sequence[Entry], last_seq: int) -> Acknowledged:
        fault = self.append_faults.popleft() if self.append_faults else None
        if fault is AppendFault.LOSE_REQUEST:
            raise AppendUnknown("no answer")
        if fault is AppendFault.REFUSE:
            raise AppendRefused("insufficient storage")
        newest = self.last(prefix)
        newest_seq = newest.seq if newest else 0
        if newest_seq != last_seq:
            raise AppendConflict(f"wrong last sequence: {newest_seq}")
        for entry in entries:
            self._store(Stream.HISTORY, entry)
        self.wake_all()
        if fault is AppendFault.LOSE_ACK:
            raise AppendUnknown("no answer")
        return Acknowledged(last_seq=self.streams[Stream.HISTORY].last_seq)

    def _store(self, stream: Stream, entry: Entry) -> int:
        held = self.streams[stream]
        held.last_seq += 1
        held.stored.append(
            Stored(
                seq=held.last_seq,
                time_s=self.now(),
                subject=entry.subject,
                body=entry.body,
                id=entry.id,
                cause_seq=entry.cause_seq,
                cursor_seq=entry.cursor_seq,
                previous_hash=entry.previous_hash,
                traceparent=entry.traceparent,
            )
        )
        return held.last_seq

    def new_inbox(self) -> str:
        self._inbox_count += 1
        return f"_INBOX.{self._inbox_count}"

    def store_once(self, entry: Entry) -> int:
        stream = next((s for s in Stream if any(subject_matches(p, entry.subject) for p in STREAM_SUBJECTS[s])), None)
        if stream is None:
            raise AppendRefused(f"no stream takes {entry.subject}")
        seq_of_id = self.streams[stream].seq_of_id
        if entry.id not in seq_of_id:
            seq_of_id[entry.id] = self._store(stream, entry)
            if stream is Stream.SNAPSHOTS:
                self.streams[stream].drop_older(entry.subject)
            self.wake_all()
        return seq_of_id[entry.id]

    def deliver(self, received: Received) -> int:
        """How many subscribers get it: all, and one of each queue in turn. Losses and duplicates by the seed."""
        matching = [s for s in self.subscriptions if subject_matches(s.subject, received.subject)]
        chosen = [s for s in matching if not s.queue]
        for queue in sorted({(s.queue, s.subject) for s in matching if s.queue}):
            members = [s for s in matching if (s.queue, s.subject) == queue]
            chosen.append(members[self._queue_turns[queue] % len(members)])
            self._queue_turns[queue] += 1
        for subscription in chosen:
            if self.loss_fraction and self._random.random() < self.loss_fraction:
                continue
            subscription.receive(received)
            if self.duplicate_fraction and self._random.random() < self.duplicate_fraction:
                subscription.receive(received)
        return len(chosen)


class MemoryBus:
    """One connection to a `MemoryServer`; also usable without being entered."""

    def __init__(self, server: MemoryServer, name: str = "") -> None:
        self.name = name
        self._server = server
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        server.buses.append(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.buses.remove(self)
        self._server.subscriptions = [s for s in self._server.subscriptions if s.owner is not self]

    async def append(self, prefix: str, entries: Sequence[Entry], *, last_seq: int) -> Acknowledged:
        """See `kit.bus.Bus`."""
        assert 0 < len(entries) <= APPEND_ENTRIES_MAX, len(entries)
        assert all(subject_matches(prefix, entry.subject) for entry in entries), prefix
        await anyio.lowlevel.checkpoint()
        if not self._server.is_up:
            raise AppendUnknown("not connected")
        return self._server.append(prefix, entries, last_seq)

    async def last(self, prefix: str) -> Stored | None:
        """See `kit.bus.Bus`."""
        await anyio.lowlevel.checkpoint()
        if not self._server.is_up:
            raise BusError("not connected")
        return self._server.last(prefix)

    def read(self, stream: Stream, filters: Sequence[str], *, after_seq: int, stream_id: str = "") -> "MemoryReading":
        """See `kit.bus.Bus`."""
        return MemoryReading(self._server, stream, tuple(filters), after_seq=after_seq, stream_id=stream_id)

    async def publish_stored(self, subject: str, body: bytes, *, id: str, traceparent: str = "") -> int:
        """See `kit.bus.Bus`."""
        await anyio.lowlevel.checkpoint()
        await self._until_up()
        entry = Entry(
            subject=subject, body=body, id=id, cause_seq=0, cursor_seq=0, previous_hash="", traceparent=traceparent
        )
        return self._server.store_once(entry)

    async def publish(self, subject: str, body: bytes, *, traceparent: str = "", reply_subject: str = "") -> None:
        """See `kit.bus.Bus`."""
        await anyio.lowlevel.checkpoint()
        if self._server.is_up:
            self._server.deliver(
                Received(subject=subject, body=body, reply_subject=reply_subject, traceparent=traceparent)
            )

    @asynccontextmanager
    async def subscribe(
        self, subject: str, receive: Callable[[Received], None], *, queue: str = ""
    ) -> AsyncIterator[None]:
        """See `kit.bus.Bus`."""
        await anyio.lowlevel.checkpoint()
        await self._until_up()
        subscription = _Subscription(owner=self, subject=subject, queue=queue, receive=receive)
        self._server.subscriptions.append(subscription)
        try:
            yield
        finally:
            if subscription in self._server.subscriptions:
                self._server.subscriptions.remove(subscription)

    async def request(self, subject: str, body: bytes, *, timeout_s: float, traceparent: str = "") -> bytes:
        """See `kit.bus.Bus`."""
        answers: list[bytes] = []
        answered = anyio.Event()

        def receive(received: Received) -> None:
            answers.append(received.body)
            answered.set()

        reply_subject = self._server.new_inbox()
        with anyio.move_on_after(timeout_s):
            async with self.subscribe(reply_subject, receive):
                received = Received(subject=subject, body=body, reply_subject=reply_subject, traceparent=traceparent)
                if not self._server.deliver(received):
                    raise NoAnswer(f"nobody answers on {subject}")
                await answered.wait()
        if not answers:
            raise NoAnswer(f"no answer on {subject} within {timeout_s} s")
        return answers[0]

    async def acquire_lease(self, name: str, holder: str, *, term_s: float) -> bool:
        """See `kit.bus.Bus`."""
        await anyio.lowlevel.checkpoint()
        if not self._server.is_up:
            raise BusError("not connected")
        now_s = self._server.now()
        present_holder, until_s = self._server.leases.get(name, (holder, now_s))
        if present_holder != holder and now_s < until_s:
            return False
        self._server.leases[name] = (holder, now_s + term_s)
        return True

    @property
    def is_connected(self) -> bool:
        return self._server.is_up

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """See `kit.bus.Bus`."""
        self._callbacks.append(callback)

    async def reconnected(self) -> None:
        for callback in self._callbacks:
            await callback()

    async def _until_up(self) -> None:
        while not self._server.is_up:
            await self._server.changed.wait()


class MemoryReading:
    """One read of one stream; see `kit.bus.Bus.read`."""

    def __init__(
        self, server: MemoryServer, stream: Stream, filters: tuple[str, ...], *, after_seq: int, stream_id: str
    ) -> None:
        self._server = server
        self._stream = stream
        self._filters = filters
        self._stream_id = stream_id
        self._position = after_seq
        """All that matches up to this sequence is delivered."""
        self._is_caught_up = False
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Stored | CaughtUp:
        await anyio.lowlevel.checkpoint()
        while not self._is_closed:
            if self._server.is_up:
                held = self._checked_stream()
                for stored in held.from_seq(self._position + 1):
                    self._position = stored.seq
                    if any(subject_matches(pattern, stored.subject) for pattern in self._filters):
                        return stored
                if not self._is_caught_up:
                    self._is_caught_up = True
                    return CaughtUp(last_seq=held.last_seq, stream_id=self._stream_id)
            await self._server.changed.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `kit.bus.Reading`."""
        await anyio.lowlevel.checkpoint()
        self._is_closed = True

    def _checked_stream(self) -> _MemoryStream:
        held = self._server.streams[self._stream]
        stream_id = f"{self._stream}-{held.created_count}"
        self._stream_id = self._stream_id or stream_id
        if stream_id != self._stream_id:
            raise HistoryGone(f"{self._stream} is another stream than the one read before")
        if self._position > held.last_seq:
            raise HistoryGone(f"{self._stream} ends at {held.last_seq}, before {self._position}")
        if self._position < held.first_seq - 1:
            if self._stream not in EXPIRING_STREAMS:
                raise HistoryGone(
                    f"{self._stream} starts at {held.first_seq}, after {self._position}", first_seq=held.first_seq
                )
            self._position = held.first_seq - 1
        return held

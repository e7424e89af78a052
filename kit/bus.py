"""The bus port: history with a checked append, ordered reads, fleeting messages, requests, and a liveness lease.

Two implementations, `kit.bus_memory.MemoryBus` and `kit.bus_nats.NatsBus`, pass one conformance suite. Nothing here
knows message types: bodies are bytes, subjects are strings.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, Protocol, Self

import msgspec


class Stream(StrEnum):
    """The streams. History and the inbox are kept until trimmed below every reader; the others lose their oldest."""

    HISTORY = "SUBLET"
    INBOX = "INBOX"
    RECORD = "RECORD"
    DEAD = "DEAD"
    SNAPSHOTS = "SNAPSHOTS"
    """Keeps the newest message of each subject."""


# Their messages go by design: a read that starts below them starts where they start.
EXPIRING_STREAMS: Final = frozenset({Stream.RECORD, Stream.DEAD, Stream.SNAPSHOTS})
STREAM_SUBJECTS: Final = {
    Stream.HISTORY: ("sublet.fact.>",),
    Stream.INBOX: ("sublet.in.>",),
    Stream.RECORD: ("sublet.record.>",),
    Stream.DEAD: ("sublet.dead.>",),
    Stream.SNAPSHOTS: ("sublet.snapshot.>",),
}


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message on its way into history. The four values beside the body travel in at most three headers."""

    subject: str
    body: bytes
    id: str
    """Unique for ever; names the writer and its instance, so that a writer knows its own after a lost ack."""
    cause_seq: int
    """Sequence of the fact or inbox message that led to it; 0 when none did."""
    cursor_seq: int
    """How far its writer had handled others' facts."""
    previous_hash: str
    """Chain hash of the writer's previous fact."""
    traceparent: str = ""


class Stored(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message as a stream holds it. A Struct: a replay makes hundreds of thousands, at a tenth of the cost.

    Plain values only, which the garbage collector need not look at.
    """

    seq: int
    time_s: float
    """Stream time, Unix seconds."""
    subject: str
    body: bytes
    id: str = ""
    cause_seq: int = 0
    cursor_seq: int = 0
    previous_hash: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtUp:
    """A read has delivered everything that was in the stream when it looked."""

    last_seq: int
    """The newest sequence of the whole stream at that time: all that matches up to it is delivered."""
    stream_id: str = ""
    """Another stream of the same name, created later, has another. A snapshot keeps it for its next read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A fleeting message."""

    subject: str
    body: bytes
    reply_subject: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """The whole batch is stored; `last_seq` belongs to its last entry, earlier ones precede it without a gap."""

    last_seq: int


class BusError(Exception):
    """Something the bus could not do."""


class AppendConflict(BusError):
    """The prefix's last sequence is not the one that the writer knew: another wrote, or an ack was lost."""


class AppendUnknown(BusError):
    """No answer, or a transient one (time-out, 503, 10164): it may or may not be stored. Send the same bytes again."""


class AppendRefused(BusError):
    """The stream will not take it (full, too large, forbidden); the text says why. Sending it again would not help."""


class AppendFull(AppendRefused):
    """There is no room for it; the text says what is full and what to do. It will be taken once there is."""


class HistoryGone(BusError):
    """The cursor is outside the stream, or the stream is another one of the same name: not ready until reseeded."""

    def __init__(self, text: str, *, first_seq: int = 0) -> None:
        """`first_seq`: where the stream starts, if what lies before it was asked for."""
        super().__init__(text)
        self.first_seq = first_seq


class Forbidden(BusError):
    """This user may not read, subscribe or ask there; the text says where. A forbidden append is `AppendRefused`."""


class NoAnswer(BusError):
    """A request found no responder, or none answered in time."""


class Reading(Protocol):
    """What a read yields, message by message. `aclose` gives its place on the server back; closing the bus does too."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Stored | CaughtUp: ...

    async def aclose(self) -> None: ...


APPEND_ENTRIES_MAX: Final = 1000
"""The server's limit for one atomic batch."""


class Bus(Protocol):
    """One connection. All methods may wait while the server is away; none loses what it accepted."""

    async def append(self, prefix: str, entries: Sequence[Entry], *, last_seq: int) -> Acknowledged:
        """Store all entries or none, if `last_seq` is still the newest sequence under `prefix` (0: none yet).

        At most `APPEND_ENTRIES_MAX`. One attempt with its own deadline; callers resend (`kit.history.append_surely`).
        Raises `AppendConflict`, `AppendUnknown`, `AppendRefused`.
        """
        ...

    async def last(self, prefix: str) -> Stored | None:
        """The newest message under the prefix in `Stream.HISTORY`, straight from the stream's leader.

        One attempt with its own deadline: `BusError` when the leader does not answer.
        """
        ...

    def read(self, stream: Stream, filters: Sequence[str], *, after_seq: int, stream_id: str = "") -> Reading:
        """Every message that matches any filter, in stream order, from `after_seq` on and then for ever.

        Yields `CaughtUp` once when it first reaches the end (also when nothing matches) and goes on with new messages.
        Never blind for more than 2 s after the server returns; never skips, never repeats.
        Raises `HistoryGone` when the stream is not the one that `stream_id` names, when it ends before `after_seq`, or
        when what follows `after_seq` is trimmed (history and inbox; the other streams expire and start where they
        start), and `Forbidden`.
        """
        ...

    async def publish_stored(self, subject: str, body: bytes, *, id: str, traceparent: str = "") -> int:
        """Publish into whichever stream takes the subject (inbox, record, dead letters); the sequence that it got.

        Resends with the same id until stored or its deadline ends: `AppendUnknown`, `AppendRefused`.
        """
        ...

    async def publish(self, subject: str, body: bytes, *, traceparent: str = "", reply_subject: str = "") -> None:
        """A fleeting message: handed to the server at once, kept by nobody.

        While the connection is away it is dropped: an order that arrives late is worse than one that is lost.
        """
        ...

    def subscribe(
        self, subject: str, receive: Callable[[Received], None], *, queue: str = ""
    ) -> AbstractAsyncContextManager[None]:
        """While open, `receive` is called for each fleeting message on the loop's thread; it must not block or wait.

        With `queue`, each message goes to one subscriber of that queue. Effective when the context is entered.
        Raises `Forbidden`.
        """
        ...

    async def request(self, subject: str, body: bytes, *, timeout_s: float, traceparent: str = "") -> bytes:
        """The first answer. Raises `NoAnswer`."""
        ...

    async def acquire_lease(self, name: str, holder: str, *, term_s: float) -> bool:
        """Take or renew the named liveness lease: whether `holder` has it now. Renew well within the term.

        For liveness only: safety comes from the append check. `BusError` when the server does not answer.
        """
        ...

    @property
    def is_connected(self) -> bool: ...

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Called each time the connection is back."""
        ...


@lru_cache(maxsize=8192)
def subject_matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: ``*`` is one token, a final ``>`` is one or more."""
    wanted = pattern.split(".")
    tokens = subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > index
        if index >= len(tokens) or token not in ("*", tokens[index]):
            return False
    return len(wanted) == len(tokens)

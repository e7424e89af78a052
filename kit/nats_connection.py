"""What one NATS connection adds to its client library: answers matched to questions, each with its own deadline.

A question whose connection is lost, whose subject is forbidden or whose time is over fails at once; no future is left
behind. Nothing is buffered while the server is away: what could not be handed over is the caller's to send again.
"""

import asyncio
import itertools
import json
import logging
import math
import re
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import anyio
import msgspec

from kit.bus import BusError, Forbidden
from kit.nats_wire import ApiError, checked_subject, frame, status_of

ASK_TIMEOUT_S: Final = 1.0
"""Per attempt. A healthy server answers in a millisecond; one that syncs to a busy disk, in some hundred."""

DENIALS_KEPT_MAX: Final = 100
_TIMER_PRECISION_S: Final = 0.002
"""An event loop's timer may fire this much early."""

Receive = Callable[[bytes, bytes, bytes | None, bytes], None]
"""Called on the loop's thread with subject, reply subject, raw header block and body; must not block or wait."""

_DENIAL = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')

log = logging.getLogger(__name__)


class Unanswered(BusError):
    """No answer: not connected, connection lost, or time over."""


class Transport(Protocol):
    """What this layer needs of a client library. Reconnects by itself, for ever, and then subscribes again."""

    @property
    def is_connected(self) -> bool: ...

    def send(self, frames: bytes) -> bool:
        """Write, with whatever else this turn of the loop sends.

        False, and nothing is kept, while the server is away or has stopped reading.
        """
        ...

    def add_subscription(self, subject: str, queue: str, receive: Receive) -> int:
        """Write SUB, now and at each reconnect; the number to remove it by."""
        ...

    def remove_subscription(self, sid: int) -> None: ...

    def ping(self) -> asyncio.Future[bool]:
        """Done when the server has handled all that was sent before; never when the connection is lost."""
        ...


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The reply to a question, raw."""

    headers: bytes | None
    body: bytes


class _Question:
    __slots__ = ("before", "ends_at", "future", "subject", "timeout_s")

    def __init__(
        self,
        subject: str,
        before: Sequence[tuple[str, bytes]],
        future: asyncio.Future[Answer],
        *,
        ends_at: float,
        timeout_s: float,
    ) -> None:
        self.subject = subject
        self.before = before
        self.future = future
        self.ends_at = ends_at
        self.timeout_s = timeout_s

    def subject_like(self, lower_case: str) -> str:
        """That one of its subjects which is this in lower case; empty when none is."""
        subjects = (self.subject, *(earlier for earlier, _ in self.before))
        return next((subject for subject in subjects if subject.lower() == lower_case), "")


class Follower(Protocol):
    """Is told when the connection goes or comes back."""

    def connection_changed(self) -> None: ...


class Connection:
    """Questions and subscriptions over one transport."""

    def __init__(self, transport: Transport, *, user: str, inbox_prefix: str) -> None:
        """The user's permissions must let it subscribe to ``<inbox prefix>.>``."""
        self.transport = transport
        self.user = user
        self.followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self.denied_count = 0
        self._inbox = f"{inbox_prefix}.{secrets.token_hex(8)}"
        self._tokens = itertools.count(1)
        self._questions: dict[bytes, _Question] = {}
        """{the subject on which the answer will come: the question}"""
        # One timer for all deadlines, at the earliest: a timer for each costs more than the rest of a question.
        self._deadline: asyncio.TimerHandle | None = None
        self._deadline_at = math.inf
        self.denied_publishes: set[str] = set()
        """Subjects in lower case, as the server tells them; the newest ones."""
        self._denied_subscriptions: set[str] = set()
        self._connected = asyncio.Event()
        self._is_closed = False
        self.on_back: Callable[[], None] = _nothing

    def open(self) -> None:
        """To be called once, when the transport has connected."""
        self.transport.add_subscription(f"{self._inbox}.*", "", self._receive_answer)
        self._connected.set()

    def close(self) -> None:
        """Every waiting question fails, every follower is told."""
        self._is_closed = True
        self.lost()
        if self._deadline is not None:
            self._deadline.cancel()
        self._connected.set()

    # ---- what the transport reports ----------------------------------------------------------------------------

    def lost(self) -> None:
        """The server is away."""
        self._connected.clear()
        for question in list(self._questions.values()):
            _fail(question.future, Unanswered("the connection was lost"))
        self._tell_followers()

    def back(self) -> None:
        """The server is here again, and all subscriptions are renewed."""
        self._connected.set()
        self._tell_followers()
        self.on_back()

    def denied(self, text: str) -> None:
        """The server reported a permissions violation (text in lower case, as nats-py gives it)."""
        self.denied_count += 1
        log.warning("forbidden by the NATS server", extra={"reason": text})
        match = _DENIAL.search(text)
        if match is None:
            return
        verb, subject = match.groups()
        if verb == "subscription":
            self._denied_subscriptions.add(subject)
            return
        if len(self.denied_publishes) >= DENIALS_KEPT_MAX:
            self.denied_publishes.clear()
        self.denied_publishes.add(subject)
        for question in list(self._questions.values()):
            if denied := question.subject_like(subject):
                _fail(question.future, self.forbidden(f"publish to {denied}"))

    def forbidden(self, what: str) -> Forbidden:
        """For example ``the NATS user 'swapper' may not publish to sublet.fact.placement.x``."""
        return Forbidden(f"the NATS user '{self.user}' may not {what}")

    def _tell_followers(self) -> None:
        for follower in list(self.followers):
            follower.connection_changed()

    # ---- what the bus asks -------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def new_inbox(self) -> str:
        """A subject that nobody else uses. Answers come elsewhere: the server would send what comes here twice."""
        return f"{self._inbox}.own.{next(self._tokens)}"

    def new_reply(self) -> bytes:
        """Where the answers to one question come, however often it is asked."""
        return f"{self._inbox}.{next(self._tokens)}".encode()

    async def until_connected(self) -> None:
        """Returns when the server is here; at once if it is."""
        await self._connected.wait()
        if self._is_closed:
            raise BusError("the bus is closed")

    async def ask(
        self,
        subject: str,
        body: bytes,
        *,
        headers: bytes = b"",
        before: Sequence[tuple[str, bytes]] = (),
        timeout_s: float = ASK_TIMEOUT_S,
        reply: bytes = b"",
    ) -> Answer:
        """The answer to one message, sent behind the frames `before` (subject, frame) in the same write.

        `reply`: from `new_reply`, the same for every attempt of one question, so that an answer to an earlier attempt
        counts. A server with a backlog answers all of it late, and who only listens to the newest attempt never hears.
        Raises `Unanswered` and `Forbidden`. While the server is away it waits for it, within the time.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        if not self.transport.is_connected:
            with anyio.move_on_after(timeout_s):
                await self.until_connected()
        reply = reply or self.new_reply()
        frames = frame(subject, body, reply=reply, headers=headers)
        if before:
            frames = b"".join([*(earlier for _, earlier in before), frames])
        if self._is_closed or not self.transport.send(frames):
            raise Unanswered("the NATS server is away, or does not read what it is sent")
        future: asyncio.Future[Answer] = loop.create_future()
        self._questions[reply] = _Question(subject, before, future, ends_at=ends_at, timeout_s=timeout_s)
        if ends_at < self._deadline_at:
            self._watch_deadlines(loop, ends_at)
        try:
            return await future
        finally:
            del self._questions[reply]

    def _watch_deadlines(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline_at = at
        self._deadline = loop.call_at(at, self._fail_overdue, loop)

    def _fail_overdue(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fails the questions whose time is over, and looks again when the next one's is."""
        self._deadline, self._deadline_at = None, math.inf
        waiting = [question for question in self._questions.values() if not question.future.done()]
        now = loop.time() + _TIMER_PRECISION_S
        for question in waiting:
            if question.ends_at <= now:
                _fail(question.future, Unanswered(f"no answer within {question.timeout_s} s"))
        later = [question.ends_at for question in waiting if question.ends_at > now]
        if later:
            self._watch_deadlines(loop, min(later))

    async def api(self, name: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """An answer of JetStream's API. Raises `ApiError`, `Unanswered`, `Forbidden`."""
        body = json.dumps(request).encode() if request is not None else b""
        answer = await self.ask(f"$JS.API.{name}", body)
        if status_of(answer.headers)[0]:
            raise Unanswered("JetStream does not answer")
        answered: dict[str, Any] = json.loads(answer.body)
        if "error" in answered:
            raise ApiError(answered["error"])
        return answered

    async def subscribe(self, subject: str, receive: Receive, *, queue: str = "") -> int:
        """Subscribed, and known to be: the server has handled the SUB. Raises `Forbidden`."""
        # While it connects anew, nats-py may be past the point where it renews subscriptions.
        await self.until_connected()
        sid = self.transport.add_subscription(checked_subject(subject), queue and checked_subject(queue), receive)
        try:
            await self.confirm()
            if subject.lower() in self._denied_subscriptions:
                self._denied_subscriptions.discard(subject.lower())
                raise self.forbidden(f"subscribe to {subject}")
        except BaseException:
            self.transport.remove_subscription(sid)
            raise
        return sid

    async def confirm(self) -> None:
        """Returns when the server has handled all that was sent before."""
        while True:
            await self.until_connected()
            # `asyncio.wait` leaves the future alone: nats-py's read loop dies of a cancelled one.
            done, _ = await asyncio.wait({self.transport.ping()}, timeout=ASK_TIMEOUT_S)
            if done:
                return

    def _receive_answer(self, subject: bytes, _reply: bytes, headers: bytes | None, body: bytes) -> None:
        question = self._questions.get(subject)
        if question is not None and not question.future.done():
            question.future.set_result(Answer(headers, body))


def _nothing() -> None:
    return


def _fail(future: asyncio.Future[Answer], error: BusError) -> None:
    if not future.done():
        future.set_exception(error)

"""What one NATS connection adds to its client library: answers matched to questions, each with its own deadline.

A question whose connection is lost, whose subject is forbidden or whose time is over fails at once; no future is left
behind. Nothing is buffered while the server is away: what could not be handed over is the caller's to send again.
"""

import asyncio
import itertools
import json
import logging
import re
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import anyio

from kit.bus import BusError, Forbidden
from kit.nats_wire import ApiError, checked_subject, frame, status_of

ASK_TIMEOUT_S: Final = 1.0
"""Per attempt. A healthy server answers in a millisecond; one that syncs to a busy disk, in some hundred."""

DENIALS_KEPT_MAX: Final = 100

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
        """Write at once. False, and nothing is kept, while the server is away."""
        ...

    def add_subscription(self, subject: str, queue: str, receive: Receive) -> int:
        """Write SUB, now and at each reconnect; the number to remove it by."""
        ...

    def remove_subscription(self, sid: int) -> None: ...

    def ping(self) -> asyncio.Future[bool]:
        """Done when the server has handled all that was sent before; never when the connection is lost."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to a question, raw."""

    headers: bytes | None
    body: bytes


@dataclass(frozen=True, slots=True)
class _Question:
    subjects: frozenset[str]
    future: asyncio.Future[Answer]


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
        self._questions: dict[str, _Question] = {}
        self.denied_publishes: dict[str, str] = {}
        """{subject in lower case: the server's words} of publishes that nobody waits for; the newest ones."""
        self._denied_subscriptions: dict[str, str] = {}
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
            self._denied_subscriptions[subject] = text
            return
        if len(self.denied_publishes) >= DENIALS_KEPT_MAX:
            self.denied_publishes.clear()
        self.denied_publishes[subject] = text
        for question in list(self._questions.values()):
            if subject in question.subjects:
                _fail(question.future, Forbidden(text))

    def _tell_followers(self) -> None:
        for follower in list(self.followers):
            follower.connection_changed()

    # ---- what the bus asks -------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def new_inbox(self) -> str:
        """A subject of our own inbox that nobody else uses."""
        return f"{self._inbox}.{next(self._tokens)}"

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
    ) -> Answer:
        """The answer to one message, sent behind the frames `before` (subject, frame) in the same write.

        Raises `Unanswered` and `Forbidden`. While the server is away it waits for it, within the time.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        if not self.transport.is_connected:
            with anyio.move_on_after(timeout_s):
                await self.until_connected()
        reply = self.new_inbox()
        question = frame(subject, body, reply=reply, headers=headers)
        frames = b"".join([*(earlier for _, earlier in before), question]) if before else question
        if self._is_closed or not self.transport.send(frames):
            raise Unanswered("not connected")
        future: asyncio.Future[Answer] = loop.create_future()
        subjects = frozenset({subject.lower(), *(earlier.lower() for earlier, _ in before)})
        self._questions[reply] = _Question(subjects, future)
        timer = loop.call_at(ends_at, _fail, future, Unanswered(f"no answer within {timeout_s} s"))
        try:
            return await future
        finally:
            timer.cancel()
            del self._questions[reply]

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
        sid = self.transport.add_subscription(checked_subject(subject), queue and checked_subject(queue), receive)
        try:
            await self.confirm()
            if text := self._denied_subscriptions.pop(subject.lower(), None):
                raise Forbidden(text)
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
        question = self._questions.get(subject.decode())
        if question is not None and not question.future.done():
            question.future.set_result(Answer(headers, body))


def _nothing() -> None:
    return


def _fail(future: asyncio.Future[Answer], error: BusError) -> None:
    if not future.done():
        future.set_exception(error)

"""Queries that wait for an answer: asked again after each commit until there is something to tell, or patience ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import anyio
import msgspec

from kit.bus import Bus, Received
from kit.service import Service
from schemas.catalogue import UnknownVersion, UnreadableMessage, decode, encode
from schemas.messages import Query
from schemas.queries import QueryRefused

S = TypeVar("S")

EXPIRY_TICK_S: Final = 0.1
QUESTIONS_MAX: Final = 1000
"""Waiting at once; more are refused, so that a flood of long polls cannot hold memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A query as it arrived."""

    received: Received
    arrived_s: float
    """On the loop's clock."""


@dataclass(slots=True)
class _Waiting:
    question: Question
    query: Query
    tenant: str
    patience_s: float


class PendingQueries(Generic[S]):
    """The questions of one service."""

    def __init__(self, service: Service[S], bus: Bus) -> None:
        self._service = service
        self._bus = bus
        self._waiting: list[_Waiting] = []
        self._refused: list[tuple[Received, str]] = []

    def add(self, question: Question) -> None:
        received = question.received
        try:
            query = decode(received.body)
        except (UnreadableMessage, UnknownVersion) as error:
            self._refused.append((received, f"the query cannot be read: {error}"))
            return
        if type(query) not in self._service.answers or not isinstance(query, Query):
            self._refused.append((received, f"{self._service.name} does not answer '{type(query).__name__}'"))
        elif len(self._waiting) >= QUESTIONS_MAX:
            self._refused.append((received, "too many queries are waiting; ask again later"))
        else:
            tenant = received.subject.split(".")[2]
            patience_s = float(getattr(query, "wait_s", 0.0))
            self._waiting.append(_Waiting(question, query, tenant, patience_s))

    async def answer_ready(self, state: S) -> None:
        """Answer all that can be answered from this (acknowledged) state."""
        refused, self._refused = self._refused, []
        for received, error in refused:
            await self._reply(received, QueryRefused(error=error))
        kept = []
        waiting, self._waiting = self._waiting, []
        for item in waiting:
            answer: Any = self._service.answers[type(item.query)](state, item.query, item.tenant)
            if answer is None and anyio.current_time() < item.question.arrived_s + item.patience_s:
                kept.append(item)
            else:
                await self._reply(item.question.received, answer or QueryRefused(error="nothing to tell"))
        self._waiting.extend(kept)

    async def expire(self, state: Callable[[], S]) -> None:
        """Look at waiting questions again while nothing else happens."""
        while True:
            await anyio.sleep(EXPIRY_TICK_S)
            if self._waiting:
                await self.answer_ready(state())

    async def _reply(self, received: Received, answer: msgspec.Struct) -> None:
        if received.reply_subject:
            await self._bus.publish(received.reply_subject, encode(answer))

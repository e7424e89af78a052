"""History in words: follows all facts, keeps the newest, and answers `ListEvents` for each tenant.

Beside the runner, because it needs sequences of facts, not state; it decides nothing.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import anyio
import msgspec

from kit.bus import Bus, HistoryGone, Received, Stored, Stream
from schemas.catalogue import UNDECODABLE, UnknownVersion, UnreadableMessage, decode, encode
from schemas.messages import Fact, Message, query_subject
from schemas.nodes import LeaseGranted, LeaseRefused, ReplicaReady
from schemas.placement import CommandFact, DeploymentAdmitted, PlacementProposed
from schemas.queries import EventList, EventView, ListEvents, QueryRefused
from services.placement.state import ClusterState
from services.placement.wording import text_of

KEPT_COUNT: Final = 20_000
"""Newest facts kept for queries; older ones are in the stream."""
FIRST_POLL_S: Final = 0.05
STATE_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Line:
    tenants: frozenset[str]
    """Empty: for every tenant (facts about nodes)."""
    view: EventView


class EventLog:
    """The newest facts with their tenants."""

    def __init__(self, bus: Bus, state: Callable[[], ClusterState | None] = lambda: None) -> None:
        """`state`: placement's, once it is known."""
        self._bus = bus
        self._state = state
        self._lines: deque[_Line] = deque(maxlen=KEPT_COUNT)
        self._tenant_of: dict[str, str] = {}
        """{deployment or replica id: tenant}"""
        self._model_of: dict[str, str] = {}
        self._last_seq = 0
        self._grown = anyio.Event()

    async def follow(self) -> None:
        """Read all of history that there is, then go on for ever."""
        after_seq = 0
        while True:
            try:
                async for item in self._bus.read(Stream.HISTORY, ["sublet.fact.>"], after_seq=after_seq):
                    if isinstance(item, Stored):
                        self._add(item)
                        after_seq = item.seq
            except HistoryGone as error:
                if not error.first_seq:
                    raise
                # What was trimmed named tenants and models of what is still there; placement's state knows them.
                self._learn_state(await self._known_state())
                after_seq = error.first_seq - 1

    async def _known_state(self) -> ClusterState:
        while (state := self._state()) is None:  # noqa: ASYNC110  (once, and only after a trim)
            await anyio.sleep(STATE_POLL_S)
        return state

    def _learn_state(self, state: ClusterState) -> None:
        for deployment in state.deployments.values():
            self._tenant_of[deployment.deployment_id] = deployment.tenant
            self._model_of[deployment.deployment_id] = deployment.spec.name
        for replica in state.replicas.values():
            known = state.deployments.get(replica.deployment_id)
            if known is not None:
                self._tenant_of[replica.replica_id] = known.tenant
                self._model_of[replica.replica_id] = known.spec.name

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """While open, `ListEvents` is answered."""
        async with anyio.create_task_group() as tg:

            def receive(received: Received) -> None:
                tg.start_soon(self._answer, received)

            async with self._bus.subscribe(query_subject("*", ListEvents), receive):
                yield
            tg.cancel_scope.cancel()

    async def _answer(self, received: Received) -> None:
        tenant = received.subject.split(".")[2]
        if not received.reply_subject:
            return
        try:
            query = msgspec.json.decode(received.body, type=ListEvents)
        except UNDECODABLE as error:
            await self._bus.publish(
                received.reply_subject, encode(QueryRefused(error=f"the query cannot be read: {error}"))
            )
            return
        found: list[EventView] = []
        with anyio.move_on_after(query.wait_s or FIRST_POLL_S):
            while not (found := self._matching(query, tenant)):
                await self._grown.wait()
        last_seq = found[-1].seq if len(found) == query.limit_count else max(self._last_seq, query.after_seq)
        await self._bus.publish(received.reply_subject, encode(EventList(events=tuple(found), last_seq=last_seq)))

    def _matching(self, query: ListEvents, tenant: str) -> list[EventView]:
        """With `after_seq` 0 the newest ones, else the next ones."""
        lines = [
            line.view
            for line in self._lines
            if line.view.seq > query.after_seq
            and (not line.tenants or tenant in line.tenants)
            and (not query.model or line.view.model == query.model)
        ]
        return lines[-query.limit_count :] if query.after_seq == 0 else lines[: query.limit_count]

    def _add(self, stored: Stored) -> None:
        try:
            fact = decode(stored.body)
        except (UnreadableMessage, UnknownVersion):
            return
        self._last_seq = stored.seq
        if not isinstance(fact, Fact):
            return
        self._learn(fact)
        tenants, model = self._about(fact)
        view = EventView(
            seq=stored.seq,
            at_s=stored.time_s,
            writer=_writer(stored.subject),
            type=str(type(fact).__name__),
            model=model,
            text=text_of(fact),
            cause_seq=stored.cause_seq,
            body=msgspec.Raw(stored.body),
        )
        self._lines.append(_Line(tenants, view))
        self._grown.set()
        self._grown = anyio.Event()

    def _learn(self, fact: Message) -> None:
        """Whose deployments and replicas these ids are."""
        if isinstance(fact, DeploymentAdmitted):
            self._tenant_of[fact.deployment_id] = fact.tenant
            self._model_of[fact.deployment_id] = fact.deployment.name
        elif isinstance(fact, PlacementProposed):
            for replica in fact.replicas:
                self._tenant_of[replica.replica_id] = replica.tenant
                self._model_of[replica.replica_id] = replica.deployment.name

    def _about(self, fact: Message) -> tuple[frozenset[str], str]:
        """Who may see it, and which model it is about ('' when about several or none)."""
        if isinstance(fact, CommandFact):
            return frozenset({fact.tenant}), self._model_of.get(getattr(fact, "deployment_id", ""), "")
        ids: list[str]
        if isinstance(fact, PlacementProposed | LeaseGranted | ReplicaReady):
            ids = [replica.replica_id for replica in fact.replicas]
        elif isinstance(fact, LeaseRefused):
            ids = list(fact.replica_ids)
        else:
            ids = [value for name in ("replica_id", "deployment_id") if (value := getattr(fact, name, ""))]
        tenants = frozenset(self._tenant_of[i] for i in ids if i in self._tenant_of)
        models = {self._model_of[i] for i in ids if i in self._model_of}
        if ids and not tenants:
            return frozenset({""}), ""
        return tenants, models.pop() if len(models) == 1 else ""


def _writer(subject: str) -> str:
    tokens = subject.split(".")
    return ".".join(tokens[2:4]) if tokens[2] == "node" else tokens[2]

"""The real shell of any service, killed at a named point and started again from history.

Killed means: nothing of it runs on, its memory is dropped, its connection and its journal's handle are abandoned. What
was handed to the bus or to the disk before stays; so does an append that was on its way, and it may arrive late.
"""

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from kit.bus import Acknowledged, AppendConflict, AppendUnknown, Entry, Received, Stored
from kit.bus_memory import MemoryBus, MemoryServer
from kit.journal import Journal
from kit.processor import Batch, Delivery, writer_of
from kit.runner import Performer, Runner
from kit.service import Service
from kit.shell_settings import ShellSettings
from kit.steps import Step
from kit.telemetry import Tracer
from schemas.messages import prefix_of

SILENT = Tracer(None, None, root_ratio=0.0)

UNSENT = "unsent"
"""An append is about to leave; effects that were released with it may have begun."""
IN_FLIGHT = "in flight"
"""An append has left and arrives when the writer's next life has read history."""
STORED = "stored"
"""An append is in the stream and its acknowledgement is on its way."""
PUBLISHED = "published"
"""A message is in a stream that is no history: a part of a snapshot, a dead letter."""
STANDS_STILL_S = 4.0
"""Twice the term of the lease that tells who is active."""
SHELL = ShellSettings(snapshot_every_count=40, check_every_count=1)
"""Snapshots so often that most lives begin from one."""


@dataclass(frozen=True, slots=True)
class Point:
    """The n-th time that an instance passes a step with a thing of this kind; the first is 1."""

    step: str
    kind: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.step}: {self.kind or '-'} #{self.count}"


def kind_of(what: object) -> str:
    """Names of classes or of facts; bounded, so that points can be counted by it."""
    if isinstance(what, Delivery):
        return type(what.input).__name__
    if isinstance(what, Stored):
        return _tag(what.subject)
    if isinstance(what, Batch):
        return kind_of(what.entries)
    if isinstance(what, str):
        return " ".join(token for token in what.split(".") if not token.isdigit())
    if isinstance(what, Sequence):
        tags = dict.fromkeys(_tag(entry.subject) for entry in what)
        return "+".join(tags) + (" and more" if len(what) > len(tags) else "")
    return "" if what is None else type(what).__name__


def _tag(subject: str) -> str:
    writer = writer_of(subject)
    return subject.removeprefix(f"sublet.fact.{writer}.").split(".")[0]


class MortalBus(MemoryBus):
    """A connection that can be cut for good in the middle of an append, or stand still for a while."""

    def __init__(self, server: MemoryServer, member: "Member") -> None:
        super().__init__(server, member.writer)
        self._member = member
        self.is_dead = False
        self.thawed = anyio.Event()
        self.thawed.set()

    async def append(self, prefix: str, entries: Sequence[Entry], *, last_seq: int) -> Acknowledged:
        await self._breathe()
        await self._member.pass_step(UNSENT, entries)
        self._member.on_its_way = (entries, last_seq)
        await self._member.pass_step(IN_FLIGHT, entries)
        await anyio.sleep(self._member.append_s / 2)
        await self._breathe()
        self._member.on_its_way = None
        acknowledged = await super().append(prefix, entries, last_seq=last_seq)
        await self._member.pass_step(STORED, entries)
        if self._member.draw.random() < self._member.ack_lost_fraction:
            raise AppendUnknown("no answer")
        await anyio.sleep(self._member.append_s / 2)
        return acknowledged

    async def publish(self, subject: str, body: bytes, *, traceparent: str = "", reply_subject: str = "") -> None:
        await self._breathe()
        await super().publish(subject, body, traceparent=traceparent, reply_subject=reply_subject)

    async def publish_stored(self, subject: str, body: bytes, *, id: str, traceparent: str = "") -> int:
        await self._breathe()
        seq = await super().publish_stored(subject, body, id=id, traceparent=traceparent)
        await self._member.pass_step(PUBLISHED, subject)
        return seq

    @property
    def is_connected(self) -> bool:
        return not self.is_dead and super().is_connected

    @asynccontextmanager
    async def subscribe(
        self, subject: str, receive: Callable[[Received], None], *, queue: str = ""
    ) -> AsyncIterator[None]:
        def receive_alive(received: Received) -> None:
            if not self.is_dead:
                receive(received)

        await self._breathe()
        async with super().subscribe(subject, receive_alive, queue=queue):
            yield

    async def acquire_lease(self, name: str, holder: str, *, term_s: float) -> bool:
        await self._breathe()
        return await super().acquire_lease(name, holder, term_s=term_s)

    async def _breathe(self) -> None:
        if self.is_dead:
            await anyio.sleep_forever()
        await self.thawed.wait()


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of the shell; planted faults replace one of them."""

    runner: type[Runner[Any]] = Runner
    journal: type[Journal] = Journal
    server: type[MemoryServer] = MemoryServer


DEFAULT_PIECES = Pieces()


@dataclass(slots=True)
class Member:
    """One writer, over all of its lives."""

    server: MemoryServer
    service: Service[Any]
    settings: Any
    writer: str
    clock: Callable[[], float]
    name: str = "one"
    """Of two instances of one writer, which."""
    perform: Performer | None = None
    journal_path: Path | None = None
    pieces: Pieces = DEFAULT_PIECES
    append_s: float = 0.002
    """One append's way to the stream and back; what is handled meanwhile leaves together."""
    ack_lost_fraction: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))  # Reproducible by design.
    down_s: float = 0.2
    kills: tuple[Point, ...] = ()
    """The n-th is where its n-th life ends, at the latest."""
    freezes_at: Point | None = None
    """Where its first life stands still, long enough to be thought dead; then it goes on as if nothing had been."""
    frozen_count: int = 0
    passed: list[list[Point]] = field(default_factory=list)
    """{life: every point that it passed, in order}"""
    on_its_way: tuple[Sequence[Entry], int] | None = None
    runner: Runner[Any] | None = None
    killed_at: list[Point] = field(default_factory=list)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _scope: anyio.CancelScope | None = None
    _bus: MortalBus | None = None

    @property
    def is_ready(self) -> bool:
        return self.runner is not None and self.runner.status.is_ready

    async def live(self) -> None:
        """Lives one after another, until cancelled."""
        while True:
            self._bus = MortalBus(self.server, self)
            self._counts.clear()
            self.passed.append([])
            journal = None
            if self.journal_path is not None:
                journal = await anyio.to_thread.run_sync(self.pieces.journal, self.journal_path)
            with ExitStack() as stack:
                if journal is not None:
                    stack.callback(journal.close)
                self._scope = stack.enter_context(anyio.CancelScope())
                self.runner = self.pieces.runner(
                    self.service,
                    self.settings,
                    self._bus,
                    writer=self.writer,
                    instance=f"{self.name}-life{len(self.passed)}",
                    tracer=SILENT,
                    perform=self._perform,
                    journal=journal,
                    needs_lease=journal is None,
                    clock=self.clock,
                    shell=SHELL,
                    at_step=self.pass_step,
                )
                await self.runner.run()
            self.runner = None
            await anyio.sleep(self.down_s)

    async def _perform(self, effect: Any, traceparent: str) -> Any:
        if self._bus is not None and self._bus.is_dead:
            await anyio.sleep_forever()
        assert self.perform is not None, self.writer
        return await self.perform(effect, traceparent)

    async def pass_step(self, step: Step | str, what: object) -> None:
        if self._bus is not None and self._bus.is_dead:
            await anyio.sleep_forever()
        kind = kind_of(what)
        self._counts[step, kind] += 1
        point = Point(str(step), kind, self._counts[step, kind])
        life = len(self.passed) - 1
        self.passed[life].append(point)
        if step is Step.HISTORY_READ and self.on_its_way is not None:
            self._arrive_late()
        if self.freezes_at == point and life == 0:
            await self._stand_still()
        if life < len(self.kills) and point == self.kills[life]:
            await self._die(point)

    async def _die(self, point: Point) -> None:
        assert self._bus is not None
        assert self._scope is not None
        self.killed_at.append(point)
        self._bus.is_dead = True
        self._scope.cancel()
        await anyio.sleep_forever()

    async def _stand_still(self) -> None:
        assert self._bus is not None
        self.freezes_at = None
        self.frozen_count += 1
        self._bus.thawed = anyio.Event()
        await anyio.sleep(STANDS_STILL_S)
        self._bus.thawed.set()

    def _arrive_late(self) -> None:
        """What an earlier life had sent arrives just when its successor believes that it knows everything."""
        assert self.on_its_way is not None
        entries, last_seq = self.on_its_way
        self.on_its_way = None
        try:
            self.server.append(prefix_of(self.writer), entries, last_seq)
        except AppendConflict:
            return

"""Every service in its real shell over the in-memory bus, one GPU host and its clients, in virtual time."""

import asyncio
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio

from kit.bus import Entry, Received, Stored, Stream, subject_matches
from kit.bus_memory import MemoryBus, MemoryServer
from kit.outcomes import Effect, Input
from kit.processor import Processor, writer_of
from kit.service import Service, digest
from schemas.catalogue import decode, encode
from schemas.history import WriterStarted
from schemas.inbox import CommandAnswered
from schemas.messages import Command, Fact, Signal, command_subject, prefix_of, signal_subject
from schemas.nodes import ReplicaWaking
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import CommandFact
from schemas.units import GiB
from services.autoscaler.core import SERVICE as AUTOSCALER
from services.autoscaler.settings import AutoscalerSettings
from services.nodeagent import health as _health  # noqa: F401  # Registers its handlers.
from services.nodeagent import leases as _leases  # noqa: F401
from services.nodeagent import residency as _residency  # noqa: F401
from services.nodeagent import shares as _shares  # noqa: F401
from services.nodeagent import suspicion as _suspicion  # noqa: F401
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.inputs import AdoptEngine, EngineEffect, StartEngine, WakeEngine
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.simulated import SimulatedHost
from services.nodeagent.simulated_gpus import h100
from services.nodeagent.state import NodeState
from services.placement import commands as _commands  # noqa: F401
from services.placement.core import SERVICE as PLACEMENT
from services.placement.settings import PlacementSettings
from services.placement.state import ClusterState
from services.simulated import SimulatedClients
from services.swapper.core import SERVICE as SWAPPER
from services.swapper.settings import SwapperSettings
from services.swapper.state import FleetState
from services.swarm.checks import Books
from tests.faults.mortal import DEFAULT_PIECES, Member, Pieces, Point
from tests.faults.virtual_time import VirtualLoop
from tests.properties.contracts import Contracts

EPOCH_S = 1_700_000_000.0
TENANT = "default"
NODE = "node-0"
AGENT = f"node.{NODE}"
WRITERS = ("placement", "swapper", "autoscaler", AGENT)


class CountingHost(SimulatedHost):
    """Counts what effects really do: a repetition that finds its work done is no second time."""

    def __init__(self, clock: "Clock") -> None:
        super().__init__(clock, node=NODE, gpus=(h100(0, node=NODE),), host_budget_bytes=4096 * GiB, seed=0)
        self.consequences: Counter[tuple[str, str, int, int]] = Counter()

    def perform(self, effect: Effect, done: Callable[[float, Input], None]) -> None:
        if not isinstance(effect, EngineEffect):
            super().perform(effect, done)
            return
        name = effect.replica.replica_id
        before = self.engines.get(name)
        phase = None if before is None else before.phase
        super().perform(effect, done)
        after = self.engines.get(name)
        is_new = isinstance(effect, StartEngine) and after is not before
        is_restored = isinstance(effect, WakeEngine) and after is not None and after.phase is not phase
        if is_new or is_restored:
            self.consequences[type(effect).__name__, name, effect.lease_epoch, effect.wake_epoch] += 1


class Clock:
    """What simulated hosts and clients need of a simulation, from the running loop."""

    def __init__(self, loop: VirtualLoop, server: Callable[[], MemoryServer]) -> None:
        self._loop = loop
        self._server = server
        self.on_stored: list[Callable[[Stored, Fact], None]] = []

    @property
    def now_s(self) -> float:
        return EPOCH_S + self._loop.time()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._loop.call_later(delay_s, action)

    def fleeting(self, signal: Signal) -> None:
        self._server().deliver(Received(subject=signal_subject(signal), body=encode(signal)))


@dataclass(slots=True)
class Fleet:
    """Members by writer, the world that they act upon, and what was heard of them."""

    server: MemoryServer
    clock: Clock
    members: dict[str, Member]
    host: CountingHost
    clients: SimulatedClients
    twin: Member | None = None
    """A second instance of one of the writers, standing by."""
    answers: list[CommandAnswered] = field(default_factory=list)
    books: Books = field(default_factory=Books)
    contracts: Contracts = field(default_factory=Contracts)
    facts: list[tuple[Stored, Fact]] = field(default_factory=list)
    orders: list[tuple[float, WakeOrdered | ParkOrdered]] = field(default_factory=list)
    """(arrival, order)"""
    rogue_ids: set[str] = field(default_factory=set)
    """Entries that a stranger put into history; everybody must leave them out."""
    end: dict[str, Any] = field(default_factory=dict)
    """`summary()` as the story ended."""
    _command_count: int = 0

    # --- What a story does --------------------------------------------------------------------------------------------

    async def command(self, command: Command) -> None:
        await self.publish(command_subject(TENANT, command), encode(command))

    async def publish(self, subject: str, body: bytes) -> None:
        self._command_count += 1
        await MemoryBus(self.server).publish_stored(subject, body, id=f"command-{self._command_count}")

    async def until(self, condition: Callable[[], bool], *, what: str, within_s: float = 60.0) -> None:
        with anyio.move_on_after(within_s) as scope:
            while not (self.are_all_ready and condition()):
                await anyio.sleep(0.05)
        assert not scope.cancelled_caught, f"not within {within_s} s: {what}"

    async def until_served(self, model: str) -> None:
        self.clients.request(model)
        request = self.clients.requests[-1]
        await self.until(lambda: request.served_at_s is not None, what=f"{model} serves")

    def intrude(self, writer: str, body: bytes, *, previous_hash: str) -> None:
        """A stranger, or a fault, puts something under the writer's prefix."""
        prefix = prefix_of(writer)
        newest = self.server.last(prefix)
        subject = prefix.replace(">", "strange")
        name = f"{writer}:stranger:{len(self.rogue_ids)}"
        self.rogue_ids.add(name)
        entry = Entry(subject=subject, body=body, id=name, cause_seq=0, cursor_seq=0, previous_hash=previous_hash)
        self.server.append(prefix, [entry], newest.seq if newest is not None else 0)

    @property
    def are_all_ready(self) -> bool:
        return all(self.active(writer).is_ready for writer in self.members)

    def active(self, writer: str) -> Member:
        """The instance of this writer that serves now; of two that believe so, the later one."""
        twin = self.twin
        return twin if twin is not None and twin.writer == writer and twin.is_ready else self.members[writer]

    def kill_engine(self, replica_id: str) -> None:
        """A living agent hears of it from its watch; a dead one finds out on its return."""
        lost = self.host.kill_engine(replica_id)
        runner = self.members[AGENT].runner
        if lost is not None and runner is not None:
            runner.offer(lost)

    # --- States -------------------------------------------------------------------------------------------------------

    def state(self, writer: str) -> Any:
        runner = self.active(writer).runner
        assert runner is not None, writer
        assert runner.processor is not None, writer
        return runner.processor.state

    @property
    def placement(self) -> ClusterState:
        return cast(ClusterState, self.state("placement"))

    @property
    def swapper(self) -> FleetState:
        return cast(FleetState, self.state("swapper"))

    @property
    def agent(self) -> NodeState:
        return cast(NodeState, self.state(AGENT))

    def residency(self, model: str) -> str:
        """Where the agent has the one replica of a model; '' when it has none."""
        found = [r for r in self.agent.replicas.values() if r.proposal.deployment.name == model]
        return found[-1].residency.value if found else ""

    def replica_id(self, model: str) -> str:
        return next(n for n, r in self.agent.replicas.items() if r.proposal.deployment.name == model)

    def summary(self) -> dict[str, Any]:
        """The end state without ids, epochs and times."""
        return {
            "deployments": {
                d.spec.name: (d.spec.share.request_portion, d.replica_count, bool(d.problem), d.revision_count)
                for d in self.placement.deployments.values()
            },
            "replicas": {
                r.proposal.deployment.name: (r.residency.value, r.residue_bytes, r.is_started)
                for r in self.agent.replicas.values()
            },
            "placed": sorted((r.deployment_id, r.node, r.state) for r in self.placement.replicas.values()),
            "keys": sorted(self.placement.keys),
            "decisions": sorted(self.swapper.decisions),
            "counts": {d.model: d.replica_count for d in self.state("autoscaler").deployments.values()},
            "commands": sorted((f.inbox_seq, type(f).__name__) for _, f in self.facts if isinstance(f, CommandFact)),
        }

    # --- What must hold -----------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        async with aclosing(MemoryBus(self.server).read(Stream.HISTORY, ["sublet.fact.>"], after_seq=0)) as reader:
            async for item in reader:
                if isinstance(item, Stored) and item.id in self.rogue_ids:
                    self.contracts.hear_stranger(item)
                elif isinstance(item, Stored):
                    fact = decode(item.body)
                    assert isinstance(fact, Fact), fact
                    self.facts.append((item, fact))
                    self.books.hear(fact)
                    self.contracts.hear(item, fact)
                    self.host.check()
                    self._judge_wake(item, fact)
                    self.clients.follow(item, fact)

    def _judge_wake(self, stored: Stored, fact: Fact) -> None:
        """A node begins a wake only for an order of the swapper that is the writer then."""
        if not isinstance(fact, ReplicaWaking) or fact.is_reserved:
            return
        found = [
            (at_s, o)
            for at_s, o in self.orders
            if isinstance(o, WakeOrdered) and (o.replica_id, o.wake_epoch) == (fact.replica_id, fact.wake_epoch)
        ]
        assert found, f"nobody ordered this wake: {fact}"
        is_meant = any(o.writer_epoch >= self._swapper_epoch(before_s=at_s) for at_s, o in found)
        assert is_meant, f"only a superseded swapper ordered this wake: {fact}"

    def _swapper_epoch(self, *, before_s: float) -> int:
        started = (
            s.seq
            for s, f in self.facts
            if isinstance(f, WriterStarted) and writer_of(s.subject) == "swapper" and s.time_s < before_s
        )
        return max(started, default=0)

    def check(self) -> None:
        self.check_history()
        self.check_commands()
        self.check_consequences()
        self.check_stale_orders()
        for writer in self.members:
            self.check_replay(self.active(writer))

    def check_history(self) -> None:
        """Every rule was heard at every fact; what is left is that every proposal has its answer."""
        self.contracts.check_proposals()

    def commands_named(self) -> Counter[tuple[int, str]]:
        """{(inbox sequence, kind of fact): how many facts}"""
        return Counter((f.inbox_seq, type(f).__name__) for _, f in self.facts if isinstance(f, CommandFact))

    def check_commands(self) -> None:
        """Each leads to one fact (a replacement to two of different kinds), and to at most one answer."""
        named = self.commands_named()
        assert {s.seq for s in self.server.stored(Stream.INBOX)} == {seq for seq, _ in named}, named
        assert {1} == set(named.values()), [key for key, count in named.items() if count > 1]
        answered = Counter(answer.inbox_seq for answer in self.answers)
        assert {1} >= set(answered.values()), f"answered twice: {answered.most_common(3)}"

    def check_consequences(self) -> None:
        twice = [key for key, count in self.host.consequences.items() if count > 1]
        assert not twice, f"done twice: {twice}"
        processes = {name for name, r in self.agent.replicas.items() if r.is_started}
        assert set(self.host.engines) == processes, (set(self.host.engines), processes)
        assert set(self.agent.replicas) == set(self.placement.replicas) == set(self.swapper.replicas)

    def check_stale_orders(self) -> None:
        """An agent that lived through it all refused every order of a swapper older than one that it had heard."""
        newest = stale_count = 0
        for _, order in self.orders:
            newest = max(newest, order.writer_epoch)
            stale_count += order.writer_epoch < newest
        agent = self.members[AGENT]
        if len(agent.passed) > 1:
            return
        assert agent.runner is not None
        assert agent.runner.processor is not None
        refused_count = agent.runner.processor.refused_order_count
        assert stale_count <= refused_count, f"{stale_count} stale orders came, {refused_count} were refused"

    def check_replay(self, member: Member) -> None:
        assert member.runner is not None
        live = member.runner.processor
        assert live is not None
        live.service.check_invariants(live.state)
        if not self.rogue_ids:
            assert 0 == live.skipped_count, f"{member.writer} skipped {live.skipped_count} facts"
        fresh: Processor[Any] = Processor(member.service, member.settings, writer=member.writer, instance="replay")
        filters = (fresh.prefix, *fresh.reads)
        history = self.server.stored(Stream.HISTORY)
        fresh.replay(s for s in history if any(subject_matches(p, s.subject) for p in filters))
        fresh.fold_foreign_to(live.cursor_seq)
        assert digest(fresh.state) == digest(live.state), f"{member.writer}: replay differs from what was lived"


@asynccontextmanager
async def running(
    kills: dict[str, tuple[Point, ...]] | None = None,
    *,
    services: dict[str, Service[Any]] | None = None,
    writers: tuple[str, ...] = WRITERS,
    freeze: tuple[str, Point] | None = None,
    append_s: float = 0.002,
    begin: Callable[[MemoryServer], None] = lambda _: None,
    pieces: Pieces = DEFAULT_PIECES,
    ack_lost_fraction: float = 0.0,
    down_s: float = 0.2,
    seed: int = 0,
    beside: Callable[[Fleet], Coroutine[Any, Any, None]] | None = None,
) -> AsyncIterator[Fleet]:
    """A fleet that has just started.

    `services`: others in place of the real ones, by name. `freeze`: the writer that has a second instance, and where
    its first stands still. `begin`: what is in the streams before anybody lives. `ack_lost_fraction`: of appends that
    are stored although their writer hears nothing. `down_s`: between two lives. `beside`: what else happens, beginning
    with the story.
    """
    run: dict[str, Service[Any]] = {s.name: s for s in (PLACEMENT, SWAPPER, AUTOSCALER, NODEAGENT)} | (services or {})
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    clock = Clock(loop, lambda: server)
    server = pieces.server(now=lambda: clock.now_s)
    host = CountingHost(clock)
    folder = Path(await anyio.to_thread.run_sync(_scratch_folder))
    settings: dict[str, tuple[Service[Any], Any]] = {
        "placement": (run["placement"], PlacementSettings()),
        "swapper": (run["swapper"], SwapperSettings(tick_s=0.5)),
        "autoscaler": (run["autoscaler"], AutoscalerSettings()),
        AGENT: (run["nodeagent"], NodeAgentSettings(node=NODE)),
    }

    def instance(writer: str, **values: Any) -> Member:
        service, known = settings[writer]
        return Member(
            server=server,
            service=service,
            settings=known,
            writer=writer,
            clock=lambda: clock.now_s,
            perform=_performer(host, clock) if writer == AGENT else None,
            journal_path=folder / "journal" if writer == AGENT else None,
            append_s=append_s,
            down_s=down_s,
            pieces=pieces,
            ack_lost_fraction=ack_lost_fraction,
            draw=random.Random(f"{seed}/{writer}"),  # Reproducible by design.
            **values,
        )

    members = {writer: instance(writer, kills=(kills or {}).get(writer, ())) for writer in writers}
    begin(server)
    contracts = Contracts(inbox=lambda: server.stored(Stream.INBOX))
    fleet = Fleet(server, clock, members, host, SimulatedClients(cast(Any, clock)), contracts=contracts)
    if freeze is not None:
        members[freeze[0]].freezes_at = freeze[1]
        fleet.twin = instance(freeze[0], name="two")
    fleet.clients.start()
    try:
        async with (
            anyio.create_task_group() as tg,
            MemoryBus(server).subscribe("sublet.out.>", _hear(fleet)),
            MemoryBus(server).subscribe("sublet.order.>", _hear_order(fleet)),
        ):
            tg.start_soon(fleet.follow)
            for member in members.values():
                tg.start_soon(member.live)
            await fleet.until(lambda: True, what="all are ready")
            if fleet.twin is not None:
                tg.start_soon(fleet.twin.live)
            if beside is not None:
                tg.start_soon(beside, fleet)
            yield fleet
            tg.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(shutil.rmtree, folder)


def _scratch_folder() -> str:
    """In memory where there is such a place: a journal's sync to disk is not what is tried here."""
    return tempfile.mkdtemp(prefix="sublet-crash-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def _hear(fleet: Fleet) -> Callable[[Any], None]:
    def receive(received: Any) -> None:
        answer = decode(received.body)
        assert isinstance(answer, CommandAnswered), answer
        fleet.answers.append(answer)

    return receive


def _hear_order(fleet: Fleet) -> Callable[[Any], None]:
    def receive(received: Any) -> None:
        order = decode(received.body)
        assert isinstance(order, WakeOrdered | ParkOrdered), order
        fleet.orders.append((fleet.clock.now_s, order))

    return receive


def _performer(host: SimulatedHost, clock: Clock) -> Callable[[Effect, str], Any]:
    """An effect as the real shell awaits it; the host goes on with its work when nobody awaits it any more."""

    async def perform(effect: Effect, traceparent: str) -> Input | None:
        results: list[Input] = []
        has_come = anyio.Event()
        is_called = False

        def done(after_s: float, result: Input) -> None:
            nonlocal is_called
            is_called = True

            def arrive() -> None:
                results.append(result)
                has_come.set()

            clock.after(after_s, arrive)

        host.perform(effect, done)
        if isinstance(effect, AdoptEngine) and not is_called:
            return None
        await has_come.wait()
        return results[0]

    return perform

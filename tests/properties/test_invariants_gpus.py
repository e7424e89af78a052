"""Replicas over several GPUs, random ones: swapper and node agent together, with effects that end in any order.

The account is anew, from facts alone (`Books`). No two wakes may wait for each other for ever, whatever they span.
"""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kit.outcomes import Effect, Outcome, Timer, Under
from schemas.catalogue import decode, encode
from schemas.messages import Fact
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import GangAbandoned, GangCommitted, PlacementProposed
from schemas.units import GiB
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.inputs import (
    AdoptEngine,
    AliveDue,
    GangHoldOver,
    ParkEngine,
    StartEngine,
    StopEngine,
    WakeEngine,
)
from services.nodeagent.state import NodeState
from services.swarm.checks import Books
from tests.unit.nodeagent import builders as nodes
from tests.unit.swapper.builders import Swapper

GPUS = ("gpu-0", "gpu-1", "gpu-2")
many = settings(max_examples=60, deadline=None)

Wide = tuple[int, frozenset[str]]
"""(GiB on each, its GPUs)"""
wides = st.tuples(st.integers(2, 75), st.frozensets(st.sampled_from(GPUS), min_size=1))


class World:
    """One node of three GPUs, its agent and a swapper; every fact goes through the account."""

    def __init__(self, choose: Any) -> None:
        self.agent = nodes.Agent(*(nodes.gpu(index) for index in range(len(GPUS))), host_gib=10_000)
        self.swapper = Swapper(gpu_count=len(GPUS))
        self.swapper.now_s = self.agent.now_s
        self.books = Books(gpus={uuid: nodes.gpu(index) for index, uuid in enumerate(GPUS)})
        self.pending: list[Effect] = []
        self.served: set[str] = set()
        self._choose = choose

    def tell_agent(self, item: Any) -> None:
        """With all that follows from it: facts to the swapper, its orders back."""
        todo: list[Any] = [item]
        while todo:
            outcomes = self.agent.handle(todo.pop(0))
            self.swapper.now_s = max(self.swapper.now_s, self.agent.now_s)
            for outcome in outcomes:
                if isinstance(outcome, Effect):
                    self.pending.append(outcome)
                elif isinstance(outcome, Fact):
                    self.books.hear(outcome)
                    todo += self._orders(self.swapper.handle(outcome))

    def tick(self, wanted: list[str]) -> None:
        """Time passes: who waits says so again, nobody else has work."""
        self.swapper.now_s = self.agent.now_s = self.agent.now_s + 1.0
        self.swapper.handle(self.swapper.load())
        orders = self._orders(self.swapper.tick())
        for name in wanted:
            if name in self.swapper.state.replicas:
                orders += self._orders(self.swapper.handle(self.swapper.wanted(name, wait_s=10.0)))
        for order in orders:
            self.tell_agent(order)

    def _orders(self, outcomes: list[Outcome]) -> list[Any]:
        plain = [o.outcome if isinstance(o, Under) else o for o in outcomes]
        return [o for o in plain if isinstance(o, WakeOrdered | ParkOrdered)]

    def end_one(self) -> None:
        """Some effect that is on its way ends, as it should."""
        effect: Any = self.pending.pop(self._choose(len(self.pending)))
        name = effect.replica.replica_id
        if name not in self.agent.state.replicas:
            return
        match effect:
            case StartEngine():
                self.tell_agent(self.agent.started(name))
                self.served.add(name)
            case ParkEngine():
                self.tell_agent(self.agent.has_parked(name))
            case WakeEngine():
                self.tell_agent(self.agent.woken(name))
                self.served.add(name)
            case StopEngine():
                self.tell_agent(self.agent.stopped(name))
            case _:
                assert isinstance(effect, AdoptEngine), effect


@many
@given(replicas=st.lists(wides, min_size=2, max_size=6), data=st.data())
def test_wakes_over_several_gpus_never_wait_for_each_other_for_ever(replicas: list[Wide], data: st.DataObject) -> None:
    """Everybody is wanted all the time, effects end in any order: each is served again and again."""
    world = World(lambda count: data.draw(st.integers(0, count - 1)))
    for number, (gib, gpus) in enumerate(replicas):
        world.tell_agent(nodes.proposal(nodes.replica(f"r{number}", gib, gpu_uuids=tuple(sorted(gpus)))))
    everybody = set(world.agent.state.replicas)

    for _ in range(3):
        world.served.clear()
        for _ in range(80):
            missing = sorted(everybody - world.served - resident(world.agent.state))
            if not missing:
                break
            world.tick(missing)
            for _ in range(min(len(world.pending), 3)):
                world.end_one()
        unserved = everybody - world.served - resident(world.agent.state)
        assert not unserved, f"{sorted(unserved)} waited through 80 ticks; {states(world.agent.state)}"
        park_all(world)


def park_all(world: World) -> None:
    for name in sorted(resident(world.agent.state)):
        world.tell_agent(world.agent.park(name))
    while world.pending:
        world.end_one()


def resident(state: NodeState) -> set[str]:
    return {name for name, replica in state.replicas.items() if replica.residency.value == "resident"}


def states(state: NodeState) -> dict[str, str]:
    return {name: replica.residency.value for name, replica in state.replicas.items()}


STEPS = ("propose", "gang", "commit", "abandon", "over", "release", "wake", "park", "end", "stay", "lose", "restart")


@dataclass
class Alone:
    """A node agent to which anything happens; its own invariants and the account from facts hold after each step."""

    agent: nodes.Agent = field(default_factory=lambda: nodes.Agent(*(nodes.gpu(i) for i in range(len(GPUS)))))
    books: Books = field(default_factory=lambda: Books(gpus={u: nodes.gpu(i) for i, u in enumerate(GPUS)}))
    pending: list[Effect] = field(default_factory=list)
    committed: set[str] = field(default_factory=set)
    """Gangs."""
    gang_of: dict[str, str] = field(default_factory=dict)

    def handle(self, item: Any) -> None:
        for outcome in self.agent.handle(item):
            if isinstance(outcome, Fact):
                self.books.hear(outcome)
            elif isinstance(outcome, StartEngine):
                gang_id = self.gang_of.get(outcome.replica.replica_id, "")
                assert not gang_id or gang_id in self.committed, f"{outcome.replica.replica_id} started too soon"
                self.pending.append(outcome)
            elif isinstance(outcome, Effect):
                self.pending.append(outcome)
            else:
                assert isinstance(outcome, Timer), outcome


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_on_every_gpu_leases_never_exceed_it_whatever_wide_replicas_and_gangs_do(data: st.DataObject) -> None:
    alone = Alone()
    agent = alone.agent
    for number in range(data.draw(st.integers(1, 25), label="steps")):
        step = data.draw(st.sampled_from(STEPS), label="step")
        names = sorted(agent.state.replicas)
        name = data.draw(st.sampled_from(names), label="name") if names else ""
        replica = agent.state.replicas.get(name)
        match step:
            case "propose" | "gang":
                gang_id = f"g{number}" if step == "gang" else ""
                shapes = data.draw(st.lists(wides, min_size=1, max_size=2), label="shapes")
                alone.handle(proposed(alone, number, shapes, gang_id))
            case "commit" if replica is not None and name in alone.gang_of:
                alone.committed.add(alone.gang_of[name])
                alone.handle(gang_fact(GangCommitted, alone, name))
            case "abandon" if replica is not None and name in alone.gang_of:
                alone.handle(gang_fact(GangAbandoned, alone, name, reason="somebody refused"))
            case "over" if replica is not None and replica.held_for:
                agent.now_s = max(agent.now_s, replica.hold_ends_s)
                alone.handle(GangHoldOver(gang_id=replica.held_for))
                assert name not in agent.state.replicas, "a held lease outlives its hold"
            case "release" if replica is not None:
                alone.handle(nodes.release(name))
            case "wake" if replica is not None:
                alone.handle(agent.wake(name, *data.draw(st.sets(st.sampled_from(names)), label="victims")))
            case "park" if replica is not None:
                alone.handle(agent.park(name))
            case "end" if alone.pending:
                effect: Any = alone.pending.pop(data.draw(st.integers(0, len(alone.pending) - 1)))
                end(alone, effect)
            case "stay" if replica is not None:
                alone.handle(agent.stayed(name))
            case "lose" if replica is not None:
                alone.handle(agent.lost(name))
            case "restart":
                restarted(alone)
            case _:
                continue
    for uuid in GPUS:
        assert agent.state.held_bytes(uuid) == alone.books.sums.get(uuid, 0), "the agent and the account differ"


def proposed(alone: Alone, number: int, shapes: list[Wide], gang_id: str) -> PlacementProposed:
    replicas = tuple(
        nodes.replica(f"r{number}-{part}", gib, gpu_uuids=tuple(sorted(gpus)))
        for part, (gib, gpus) in enumerate(shapes)
    )
    if gang_id:
        alone.gang_of.update({replica.replica_id: gang_id for replica in replicas})
    return PlacementProposed(
        at_s=0.0, proposal_id=f"p{number}", node=nodes.NODE, replicas=replicas, reason="", gang_id=gang_id,
        gang_hold_s=30.0 if gang_id else 0.0,
    )  # fmt: skip


def gang_fact(kind: Any, alone: Alone, name: str, **values: str) -> Any:
    gang_id = alone.gang_of[name]
    members = tuple(sorted(other for other, of in alone.gang_of.items() if of == gang_id))
    return kind(at_s=0.0, node=nodes.NODE, gang_id=gang_id, replica_ids=members, **values)


def end(alone: Alone, effect: Any) -> None:
    agent, name = alone.agent, effect.replica.replica_id
    if name not in agent.state.replicas:
        return
    match effect:
        case StartEngine():
            alone.handle(agent.started(name))
        case ParkEngine():
            alone.handle(agent.has_parked(name))
        case WakeEngine():
            alone.handle(agent.woken(name))
        case StopEngine():
            alone.handle(agent.stopped(name))


def restarted(alone: Alone) -> None:
    """The next life begins with what the facts say, and nothing on its way."""
    state = NODEAGENT.new_state(alone.agent.state.settings)
    for fact in alone.agent.history:
        NODEAGENT.evolve(state, decode(encode(fact)))  # type: ignore[arg-type]  # Facts alone are in it.
    alone.agent.state = state
    alone.pending.clear()
    for outcome in NODEAGENT.on_start(state, alone.agent.context()):
        if isinstance(outcome, Timer):
            assert isinstance(outcome.input, GangHoldOver | AliveDue), outcome
    alone.handle(alone.agent.probed())


def test_the_account_of_two_gpus_is_not_that_of_one() -> None:
    """Seen to count: 50 of 80 on both leaves 30 on either."""
    alone = Alone()
    alone.handle(nodes.proposal(nodes.replica("wide", 50, gpu_uuids=GPUS[:2])))

    assert [50 * GiB, 50 * GiB, 0] == [alone.books.sums.get(uuid, 0) for uuid in GPUS]

"""Replicas over several GPUs, random ones: swapper and node agent together, with effects that end in any order.

The account is anew, from facts alone (`Books`). No two wakes may wait for each other for ever, whatever they span.
"""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kit.outcomes import Effect, Outcome, Under
from schemas.messages import Fact
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.units import GiB
from services.nodeagent.inputs import (
    AdoptEngine,
    ParkEngine,
    StartEngine,
    StopEngine,
    WakeEngine,
)
from services.nodeagent.state import NodeState
from services.swarm.checks import Books
from tests.properties.wide import GPUS, Alone
from tests.unit.nodeagent import builders as nodes
from tests.unit.swapper.builders import Swapper

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


@settings(max_examples=150, deadline=None)
@given(data=st.data(), step_count=st.integers(1, 25))
def test_on_every_gpu_leases_never_exceed_it_whatever_wide_replicas_and_gangs_do(
    data: st.DataObject, step_count: int
) -> None:
    """And no part of a gang starts before its commit, and none is held beyond its time."""
    Alone(lambda options: data.draw(st.sampled_from(options))).play(step_count)


def test_the_account_of_two_gpus_is_not_that_of_one() -> None:
    """Seen to count: 50 of 80 on both leaves 30 on either."""
    books = Books(gpus={uuid: nodes.gpu(index) for index, uuid in enumerate(GPUS)})
    agent = nodes.Agent(*(nodes.gpu(index) for index in range(len(GPUS))))
    for outcome in agent.handle(nodes.proposal(nodes.replica("wide", 50, gpu_uuids=GPUS[:2]))):
        if isinstance(outcome, Fact):
            books.hear(outcome)

    assert [50 * GiB, 50 * GiB, 0] == [books.sums.get(uuid, 0) for uuid in GPUS]

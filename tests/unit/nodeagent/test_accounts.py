"""Who lent and who borrowed: what was borrowed is what was lent, by somebody or by nobody."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.nodes import BorrowAccounted
from schemas.units import GiB
from services.nodeagent.accounts import loans
from services.nodeagent.inputs import BurstDue
from tests.properties.test_bursts import Bursting
from tests.properties.wide import GPUS
from tests.unit.nodeagent.builders import Agent, gpu, release


def told(agent: Agent, after_s: float) -> list[BorrowAccounted]:
    agent.now_s += after_s
    return [outcome for outcome in agent.handle(BurstDue()) if isinstance(outcome, BorrowAccounted)]


def test_what_nobody_asks_for_is_lent_first_then_what_a_parked_model_leaves() -> None:
    """80 less the requests 40 and 30 are 10 of nobody; 39 of the parked one's 40 are lent."""
    agent = Agent(gpu(allocatable_gib=80))
    agent.parked("owner", 40)
    agent.resident("a", 30, limit_gib=80)
    agent.tick()

    found = loans(agent.state, "gpu-0")

    assert ({"a": 49 * GiB}, {"owner": 39 * GiB}, 10 * GiB) == (found.borrowed, found.lent, found.free)


def test_an_account_is_told_after_its_time_and_says_bytes_times_seconds() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.resident("a", 30, limit_gib=80)
    agent.tick()
    begun_s = agent.now_s
    assert [] == told(agent, 10.0)

    (fact,) = told(agent, 60.0)

    assert (begun_s, "gpu-0") == (fact.from_s, fact.gpu_uuid)
    assert 50 * GiB * (agent.now_s - begun_s) == fact.entries[0].borrowed_byte_s == fact.free_byte_s
    assert [] == told(agent, 1.0)


def test_a_lease_that_has_ended_is_told_at_the_next_look() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.resident("a", 30, limit_gib=80)
    agent.tick()
    agent.now_s += 5.0
    agent.handle(release("a"))
    agent.handle(agent.stopped("a"))

    (fact,) = told(agent, 1.0)

    assert ["a"] == [entry.replica_id for entry in fact.entries]
    assert fact.entries[0].borrowed_byte_s > 0
    assert {} == agent.state.accounts


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_all_that_was_borrowed_was_lent_by_somebody_or_by_nobody(seed: int) -> None:
    draw = random.Random(seed)
    world = Bursting(draw.choice)
    world.play(60)

    for uuid in GPUS:
        found = loans(world.agent.state, uuid)
        assert sum(found.borrowed.values()) == sum(found.lent.values()) + found.free
    for fact in world.agent.history:
        if isinstance(fact, BorrowAccounted):
            borrowed = sum(entry.borrowed_byte_s for entry in fact.entries)
            lent = sum(entry.lent_byte_s for entry in fact.entries) + fact.free_byte_s
            assert abs(borrowed - lent) <= len(fact.entries) + 1  # Each is rounded down to whole bytes and seconds.

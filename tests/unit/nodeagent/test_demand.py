"""Grants follow need: who is short grows, who has enough stays, who idles gives back what it does not use."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.nodes import GiveBackAsked, LeaseResized
from schemas.units import GiB
from services.nodeagent.bursting import Burster, fair_extras
from services.nodeagent.demand import AIMED_FRACTION, BUSY_FRACTION, FRESH_S, Demand, Size, heard, wanted_bytes
from services.nodeagent.inputs import BurstDue, ResizeEngine
from tests.unit.nodeagent.builders import Agent, effects, gpu

many = settings(max_examples=200, deadline=None)
IDLE_S = 30.0
NOW_S = 1000.0


def told(kv_used_fraction: float, *, waiting_count: int = 0, for_s: float = 0.0) -> Demand:
    """Just now, and so for that long."""
    first = Demand(lease_epoch=1, kv_used_fraction=kv_used_fraction, waiting_count=waiting_count, at_s=NOW_S - for_s)
    return heard(heard(None, first), replace(first, at_s=NOW_S))


def size(extra_gib: int, *, most_gib: int = 40) -> Size:
    return Size(request_bytes=30 * GiB, fixed_bytes=10 * GiB, extra_bytes=extra_gib * GiB, most_bytes=most_gib * GiB)


def wished_gib(demand: Demand | None, of: Size) -> float:
    return wanted_bytes(demand, of, now_s=NOW_S, idle_s=IDLE_S) / GiB


def test_a_full_cache_wants_all_that_it_may_have() -> None:
    assert 40 == wished_gib(told(0.8), size(5))


def test_requests_that_wait_at_a_half_full_cache_want_it_too_and_at_an_empty_one_wait_for_something_else() -> None:
    assert 40 == wished_gib(told(0.5, waiting_count=1), size(5))
    assert 5 == wished_gib(told(0.1, waiting_count=9), size(5))


def test_what_is_not_known_changes_nothing() -> None:
    late = replace(told(0.99), at_s=NOW_S - FRESH_S - 1.0)

    assert [5, 5] == [wished_gib(None, size(5)), wished_gib(late, size(5))]


def test_whoever_idles_for_long_keeps_a_cache_for_what_it_uses() -> None:
    """20 GiB of cache within its request and 20 borrowed: 13 in use make a cache of 20."""
    assert 20 == wished_gib(told(0.1, for_s=IDLE_S - 1.0), size(20))
    assert 0 == wished_gib(told(0.1, for_s=IDLE_S), size(20))
    assert 0 < wished_gib(told(0.49, for_s=IDLE_S), size(20)) < 20


def test_a_look_from_before_a_smaller_cache_does_not_make_it_smaller_still() -> None:
    demand = told(0.4, for_s=IDLE_S)
    assert wished_gib(demand, size(20)) < 20

    assert 20 == wished_gib(demand, replace(size(20), changed_at_s=NOW_S))
    assert 20 == wished_gib(demand, replace(size(20), changed_at_s=NOW_S - 5.0))


fractions = st.floats(0.0, 1.0)
sizes = st.builds(size, st.integers(0, 40), most_gib=st.integers(1, 40)).filter(lambda s: s.extra_bytes <= s.most_bytes)


@many
@given(of=sizes, low=fractions, high=fractions, waiting=st.integers(0, 2), more=st.integers(0, 2))
def test_more_need_never_means_a_smaller_wish(of: Size, low: float, high: float, waiting: int, more: int) -> None:
    low, high = sorted((low, high))
    less = told(low, waiting_count=waiting, for_s=IDLE_S)
    greater = told(high, waiting_count=waiting + more, for_s=IDLE_S)

    assert 0 <= wished_gib(less, of) <= wished_gib(greater, of) <= of.most_bytes / GiB


@many
@given(of=sizes, fraction=fractions)
def test_whoever_gave_back_what_idled_is_not_short_of_it_at_once(of: Size, fraction: float) -> None:
    """The same bytes in use are a part of the smaller cache that is not yet called full."""
    demand = told(fraction, for_s=IDLE_S)
    after_bytes = wanted_bytes(demand, of, now_s=NOW_S, idle_s=IDLE_S)
    if after_bytes >= of.extra_bytes:
        return
    cache_bytes = of.request_bytes - of.fixed_bytes
    used_bytes = fraction * (cache_bytes + of.extra_bytes)

    assert used_bytes / (cache_bytes + after_bytes) <= AIMED_FRACTION + 0.001
    assert fraction < BUSY_FRACTION


@many
@given(
    wishes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=5),
    room_gib=st.integers(0, 80),
)
def test_no_byte_goes_to_two_and_whoever_is_short_gets_its_part_by_weight_of_what_the_others_leave(
    wishes: list[tuple[int, int, int]], room_gib: int
) -> None:
    """A wish is a limit like any other, so that those who wish for more share what those who do not leave."""
    here = [
        Burster(replica_id=f"r{n}", gpu_uuids=("gpu-0",), weight=weight, extra_bytes=extra * GiB, most_bytes=wish * GiB)
        for n, (extra, wish, weight) in enumerate(wishes)
    ]

    extras = fair_extras(here, {"gpu-0": room_gib * GiB}, step_bytes=GiB)

    assert sum(extras.values()) <= room_gib * GiB
    assert all(extras[b.replica_id] <= b.most_bytes for b in here)
    short = [b for b in here if b.most_bytes - extras[b.replica_id] > b.weight]
    levels = [extras[b.replica_id] / b.weight for b in short]
    assert not short or max(levels) - min(levels) <= 2 * GiB


# --- The agent --------------------------------------------------------------------------------------------------------


def watching() -> Agent:
    return Agent(gpu(allocatable_gib=80), demand_s=2.0)


def grown(agent: Agent) -> list[str]:
    return [e.replica.replica_id for e in effects(agent.handle(BurstDue())) if isinstance(e, ResizeEngine)]


def test_only_the_one_that_is_short_grows_and_gets_all_that_is_free() -> None:
    agent = watching()
    agent.resident("calm", 10, limit_gib=80)
    agent.resident("short", 10, limit_gib=80)
    agent.now_s += 10.0
    assert [] == grown(agent)

    agent.handle(agent.load("calm", 0.6))
    agent.handle(agent.load("short", 0.9, waiting_count=3))

    assert ["short"] == grown(agent)
    assert (10, 70) == (agent.granted_gib("calm"), agent.granted_gib("short"))


def test_what_an_earlier_engine_told_says_nothing_of_the_next() -> None:
    agent = watching()
    agent.resident("a", 10, limit_gib=80)
    agent.handle(agent.load("a", 0.9))
    agent.state.replicas["a"].lease_epoch += 1

    assert [] == grown(agent)


def test_whoever_idles_is_asked_for_what_it_does_not_use_and_for_nobody() -> None:
    agent = watching()
    agent.resident("a", 30, limit_gib=80)
    agent.handle(agent.load("a", 0.9))
    agent.now_s += 10.0
    assert ["a"] == grown(agent)
    assert 80 == agent.granted_gib("a")
    for _ in range(20):
        agent.now_s += 1.0
        agent.handle(agent.load("a", 0.05))

    outcomes = agent.handle(BurstDue())

    (asked,) = (o for o in outcomes if isinstance(o, GiveBackAsked))
    assert ("", False) == (asked.for_replica_id, asked.is_owed)
    (shrink,) = (e for e in effects(outcomes) if isinstance(e, ResizeEngine))
    assert any(isinstance(o, LeaseResized) for o in agent.handle(agent.resized(shrink)))
    assert 30 == agent.granted_gib("a")


def test_those_who_are_both_short_share_by_weight_what_a_calm_one_leaves() -> None:
    agent = watching()
    for name, weight in (("a", 1), ("b", 3), ("calm", 1)):
        agent.resident(name, 10, limit_gib=80, weight=weight)
    for name, fraction in (("a", 0.9), ("b", 0.9), ("calm", 0.3)):
        agent.handle(agent.load(name, fraction))
    agent.now_s += 8.0

    assert ["a", "b"] == grown(agent)
    assert (22.5, 47.5, 10) == tuple(agent.granted_gib(name) for name in ("a", "b", "calm"))

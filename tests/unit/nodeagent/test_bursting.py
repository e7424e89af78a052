"""What no lease claims goes to those who may have more: by weight, up to their limits, and no byte twice."""

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.deployments import EngineKind
from schemas.nodes import LeaseResized, ResizeReason
from schemas.units import GiB
from services.nodeagent.bursting import Burster, fair_extras
from services.nodeagent.growth import Growth
from services.nodeagent.inputs import BurstDue, ResizeEngine, RestartDue
from tests.unit.nodeagent.builders import Agent, effects, gpu, outline, proposal, replica

many = settings(max_examples=200, deadline=None)
GPUS = ("gpu-0", "gpu-1", "gpu-2")


def burster(name: str, *, most_gib: int, weight: int = 1, gpu_uuids: tuple[str, ...] = ("gpu-0",)) -> Burster:
    return Burster(replica_id=name, gpu_uuids=gpu_uuids, weight=weight, extra_bytes=0, most_bytes=most_gib * GiB)


def extras_gib(*here: Burster, **room_gib: int) -> dict[str, float]:
    room = {name.replace("_", "-"): size * GiB for name, size in room_gib.items()}
    return {name: size / GiB for name, size in fair_extras(here, room, step_bytes=GiB).items()}


def test_equal_weights_get_equal_parts() -> None:
    a, b = burster("a", most_gib=50), burster("b", most_gib=50)

    assert {"a": 20, "b": 20} == extras_gib(a, b, gpu_0=40)


def test_three_times_the_weight_gets_three_times_as_much() -> None:
    a, b = burster("a", most_gib=50, weight=3), burster("b", most_gib=50)

    assert {"a": 30, "b": 10} == extras_gib(a, b, gpu_0=40)


def test_what_one_may_not_have_goes_to_the_others() -> None:
    a, b, c = burster("a", most_gib=4), burster("b", most_gib=50), burster("c", most_gib=50)

    assert {"a": 4, "b": 18, "c": 18} == extras_gib(a, b, c, gpu_0=40)


def test_a_replica_over_several_gpus_gets_the_same_on_each_and_the_fullest_counts() -> None:
    wide, narrow = burster("wide", most_gib=50, gpu_uuids=("gpu-0", "gpu-1")), burster("narrow", most_gib=50)

    assert {"wide": 5, "narrow": 35} == extras_gib(wide, narrow, gpu_0=40, gpu_1=5)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Burster], dict[str, int]]:
    here = [
        burster(
            f"r{number}",
            most_gib=draw(st.integers(0, 40)),
            weight=draw(st.integers(1, 5)),
            gpu_uuids=tuple(sorted(draw(st.sets(st.sampled_from(GPUS), min_size=1)))),
        )
        for number in range(draw(st.integers(1, 6)))
    ]
    return here, {uuid: draw(st.integers(0, 60)) * GiB for uuid in GPUS}


def _used(here: list[Burster], extras: Mapping[str, int], gpu_uuid: str) -> int:
    return sum(extras[b.replica_id] for b in here if gpu_uuid in b.gpu_uuids)


@many
@given(world=worlds())
def test_no_gpu_gives_more_than_it_has_and_nobody_gets_more_than_his_limit(
    world: tuple[list[Burster], dict[str, int]],
) -> None:
    here, room = world

    extras = fair_extras(here, room, step_bytes=GiB)

    assert all(_used(here, extras, uuid) <= room[uuid] for uuid in GPUS)
    assert all(0 <= extras[b.replica_id] <= b.most_bytes for b in here)


@many
@given(world=worlds())
def test_whoever_has_less_than_his_limit_is_stopped_by_a_gpu_on_which_nobody_has_more_for_his_weight(
    world: tuple[list[Burster], dict[str, int]],
) -> None:
    """Nothing that could be lent lies idle, up to a step for each; and who has less has not less than is fair."""
    here, room = world

    extras = fair_extras(here, room, step_bytes=GiB)

    for b in here:
        if b.most_bytes - extras[b.replica_id] < b.weight:  # Whole bytes for each weight.
            continue
        slack_bytes = GiB * (len(here) + 1)
        full = [uuid for uuid in b.gpu_uuids if room[uuid] - _used(here, extras, uuid) <= slack_bytes]
        mine = extras[b.replica_id] / b.weight
        fair = [
            uuid
            for uuid in full
            if all(extras[o.replica_id] / o.weight <= mine + 2 * GiB for o in here if uuid in o.gpu_uuids)
        ]
        assert fair, (b, extras, room)


# --- The agent --------------------------------------------------------------------------------------------------------


def test_a_resident_replica_grows_into_what_no_lease_claims_and_its_grant_is_told_first() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.resident("a", 30, limit_gib=70)

    outcomes = agent.tick()

    assert ["Timer", "LeaseResized a", "ResizeEngine a"] == outline(outcomes)
    told, grow = outcomes[1:]
    assert isinstance(told, LeaseResized)
    assert isinstance(grow, ResizeEngine)
    assert (ResizeReason.BURST, (70 * GiB,)) == (told.reason, told.granted_bytes)
    assert ((70 * GiB,), (30 * GiB,)) == (grow.granted_bytes, grow.before_bytes)
    assert 70 == agent.granted_gib("a")


def test_two_share_what_is_free_and_residues_of_parked_ones_are_not_free() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.parked("sleeper", 40)
    agent.resident("a", 20, limit_gib=80)
    agent.resident("b", 30, limit_gib=80)

    agent.tick()

    assert (34.5, 44.5) == (agent.granted_gib("a"), agent.granted_gib("b"))


def test_an_engine_that_cannot_grow_while_it_serves_never_does() -> None:
    agent = Agent()

    agent.resident("a", 30, limit_gib=70, kind=EngineKind.VLLM)

    agent.tick()

    assert 30 == agent.granted_gib("a")


def test_an_engine_that_did_not_get_the_memory_has_what_it_had_and_rests() -> None:
    agent = Agent()
    agent.resident("a", 30, limit_gib=70)
    (grow,) = (e for e in effects(agent.tick()) if isinstance(e, ResizeEngine))

    agent.handle(agent.not_resized(grow))

    assert 30 == agent.granted_gib("a")
    agent.now_s += 1.0
    assert [] == effects(agent.handle(agent.resized(grow)))

    assert [] == effects(agent.handle(BurstDue()))
    assert ["ResizeEngine"] == [type(e).__name__ for e in effects(agent.tick())]


def grown(agent: Agent) -> list[ResizeEngine]:
    return [e for e in effects(agent.tick()) if isinstance(e, ResizeEngine)]


def test_an_engine_that_says_it_cannot_grow_is_not_asked_again_until_it_was_started_anew() -> None:
    agent = Agent()
    agent.resident("a", 30, limit_gib=70)
    (grow,) = grown(agent)

    (told,) = agent.handle(agent.not_resized(grow, is_able=False))

    assert isinstance(told, LeaseResized)
    assert ((30 * GiB,), False, "it has not shrunk") == (told.granted_bytes, told.is_able, told.problem)
    agent.now_s += 3600.0
    assert [] == grown(agent)
    agent.handle(agent.lost("a"))
    agent.handle(RestartDue(replica_id="a", lease_epoch=agent.lease("a").lease_epoch))
    agent.handle(agent.started("a"))
    assert ["a"] == [grow.replica.replica_id for grow in grown(agent)]


def test_whoever_fails_to_grow_again_and_again_is_asked_ever_more_rarely() -> None:
    agent = Agent()
    agent.resident("a", 30, limit_gib=70)
    found = grown(agent)
    waits_s = []
    for _ in range(4):
        agent.handle(agent.not_resized(found[0]))
        began_s = agent.now_s
        while not (found := [e for e in effects(agent.handle(BurstDue())) if isinstance(e, ResizeEngine)]):
            pass
        waits_s.append(agent.now_s - began_s)

    assert waits_s == sorted(waits_s)
    assert waits_s[-1] > 4 * waits_s[0]


def test_one_growth_that_succeeds_makes_up_for_those_that_failed() -> None:
    growth = Growth().begun().failed(is_able=True).begun().failed(is_able=True)
    assert 20.0 == growth.rest_s(5.0)

    assert 5.0 == growth.begun().begun().rest_s(5.0)


def test_a_new_burster_gets_its_part_from_those_who_have_more() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.resident("a", 20, limit_gib=80)
    agent.tick()
    assert 80 == agent.granted_gib("a")
    outcomes = agent.handle(proposal(replica("b", 20, limit_gib=80)))
    (freeze,) = (e for e in effects(outcomes) if isinstance(e, ResizeEngine))
    (shrink,) = (e for e in effects(agent.handle(agent.resized(freeze, 80))) if isinstance(e, ResizeEngine))
    agent.handle(agent.resized(shrink))
    agent.handle(agent.started("b"))
    assert (60, 20) == (agent.granted_gib("a"), agent.granted_gib("b"))

    (wish,) = (e for e in effects(agent.tick()) if isinstance(e, ResizeEngine))
    agent.handle(agent.resized(wish))
    agent.tick()

    assert (40, 40) == (agent.granted_gib("a"), agent.granted_gib("b"))

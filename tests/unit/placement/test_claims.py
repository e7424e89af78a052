"""Preemption from the decision to the newcomer's place: room is kept, victims leave, and get a place again."""

import random

import pytest

from kit.snapshots import encode_state, restore_state
from schemas.placement import (
    DeploymentAdmitted,
    PlacementFailed,
    PlacementProposed,
    PreemptionDecided,
    PreemptionEnded,
    ReasonCode,
    ReleaseProposed,
)
from schemas.queries import Explain
from schemas.units import GiB
from services.placement import commands as _commands  # noqa: F401  # Registers its handlers.
from services.placement import views as _views  # noqa: F401
from services.placement.core import SERVICE
from tests.unit.placement.crowds import wish
from tests.unit.placement.living import LEAVE_S, Living
from tests.unit.placement.test_index import is_kept

DELAY_S = 20.0


def full(*, gpu_count: int = 1, priority: str = "low", **values: float) -> Living:
    """Every GPU is held by a replica of its own model, m0, m1 ..."""
    living = Living(**values)
    living.join("n0", gpu_count)
    for index in range(gpu_count):
        living.deploy(wish(f"m{index}", 80, priority=priority))
    living.run_for(5)
    assert [f"m{index}" for index in range(gpu_count)] == living.placed()
    return living


def ends(living: Living) -> list[str]:
    """Why claims ended."""
    return [fact.reason for fact in living.told(PreemptionEnded) if isinstance(fact, PreemptionEnded)]


def test_a_victim_is_asked_to_leave_and_the_newcomer_gets_exactly_its_place() -> None:
    living = full()

    living.deploy(wish("new", 50))
    living.run_for(1)

    (decided,) = living.told(PreemptionDecided)
    (release,) = living.told(ReleaseProposed)
    assert isinstance(decided, PreemptionDecided)
    assert isinstance(release, ReleaseProposed)
    assert ("new", "n0", ("n0-gpu-0",), (50 * GiB,)) == (
        decided.model,
        decided.node,
        decided.gpu_uuids,
        decided.request_bytes,
    )
    assert (living.state.settings.preemption_drain_s, decided.victims[0].replica_id) == (
        release.drain_s,
        release.replica_id,
    )
    assert [] == living.told(PlacementFailed)

    living.run_for(LEAVE_S + 1)

    proposed = living.told(PlacementProposed)[-1]
    assert isinstance(proposed, PlacementProposed)
    assert decided.replica_id == proposed.replicas[0].replica_id
    assert (ReasonCode.ROOM_BY_PREEMPTION,) == proposed.codes
    assert "room by preemption: m0 gave way" == proposed.reason
    (ended,) = living.told(PreemptionEnded)
    assert isinstance(ended, PreemptionEnded)
    assert (f"{decided.replica_id} is proposed there", {}) == (ended.reason, living.state.claims)


def test_nobody_else_gets_the_room_that_is_being_made() -> None:
    living = full()
    living.deploy(wish("new", 80))
    living.run_for(1)
    living.deploy(wish("sly", 10))
    living.deploy(wish("slyer", 10, priority="very-high", is_preemptible=True))

    living.run_for(60)

    assert ["new"] == living.placed()
    assert [("new", ["m0"])] == living.preemptions()


def test_each_newcomer_has_victims_of_its_own() -> None:
    living = full(gpu_count=4)
    for index in range(4):
        living.deploy(wish(f"new{index}", 80))

    living.run_for(10)

    assert [f"new{index}" for index in range(4)] == living.placed()
    assert ["m0", "m1", "m2", "m3"] == sorted(name for _, names in living.preemptions() for name in names)


def test_a_newcomer_that_is_retired_needs_no_room() -> None:
    living = full()
    living.deploy(wish("new", 80))
    living.run_for(1)
    living.retire("new")
    living.run_for(60)

    assert ["its newcomer is not wanted any more"] == ends(living)
    assert ["m0"] == living.placed(), "who was asked to leave has left, and is back"


def test_a_newcomer_that_is_scaled_to_zero_needs_none_either() -> None:
    living = full()
    living.deploy(wish("new", 80))
    living.run_for(1)
    living.scale("new", 0)
    living.run_for(60)

    assert (["m0"], {}) == (living.placed(), living.state.claims)


def test_room_is_not_kept_for_ever() -> None:
    """Its victim does not leave."""
    living = full()
    living.deploy(wish("new", 80))
    living.run_for(1)
    claim_s_max = living.state.settings.claim_s_max
    living._due = [entry for entry in living._due if type(entry[3]).__name__ != "LeaseReleased"]

    living.run_for(claim_s_max - 5)
    assert 1 == len(living.state.claims)

    living.run_for(10)
    assert {} == living.state.claims


def test_a_lost_place_ends_the_claim_and_another_is_looked_for() -> None:
    living = full()
    living.deploy(wish("new", 80))
    living.run_for(1)
    state = living.state
    state.index.lose_node("n0")
    state.nodes["n0"].lost_at_s = living.now_s

    living.join("n1")
    living.run_for(10)

    assert {} == state.claims
    newcomer = state.named("default", "new")
    assert newcomer is not None
    assert ["n1"] == [replica.node for replica in state.replicas_of(newcomer.deployment_id)]


def test_room_that_turns_up_elsewhere_is_taken() -> None:
    living = full(gpu_count=2)
    living.deploy(wish("new", 80))
    living.run_for(1)
    (decided,) = living.told(PreemptionDecided)
    assert isinstance(decided, PreemptionDecided)
    living._due = [entry for entry in living._due if type(entry[3]).__name__ != "LeaseReleased"]

    living.join("n1")
    living.run_for(5)

    assert ["room turned up elsewhere"] == ends(living)
    assert "n1" == living.state.replicas[decided.replica_id].node


def test_a_restart_in_the_middle_goes_on() -> None:
    living = full()
    living.deploy(wish("new", 80))
    living.run_for(1)
    restored = SERVICE.new_state(living.state.settings)
    restore_state(restored, encode_state(living.state))
    living.state = restored
    living._tell(SERVICE.on_start(restored, living._ctx("")))

    living.run_for(10)

    assert (["new"], {}) == (living.placed(), living.state.claims)
    assert is_kept(living.state)


def test_explain_tells_who_took_the_place() -> None:
    living = full()
    living.deploy(wish("new", 80))
    living.run_for(1)
    newcomer = SERVICE.answers[Explain](living.state, Explain(model="new"), "default")
    assert newcomer is not None
    assert "room is being made for it on n0: m0 to leave" in str(newcomer)

    living.run_for(10)

    displaced = SERVICE.answers[Explain](living.state, Explain(model="m0"), "default")
    assert displaced is not None
    assert "gave its place to new: priority 40 is below 150" in str(displaced)

    living.run_for(60)

    assert "its place went to new" in str(SERVICE.answers[Explain](living.state, Explain(model="m0"), "default"))


def test_the_displaced_get_a_place_again_when_load_falls_highest_priority_first() -> None:
    living = Living()
    living.join("n0", 2)
    living.deploy(wish("low", 80, priority="low"))
    living.deploy(wish("medium", 80, priority="medium"))
    living.run_for(5)
    living.deploy(wish("new", 80, replica_count=2))
    living.run_for(60)
    assert ["new", "new"] == living.placed()

    living.scale("new", 1)
    living.run_for(10)
    assert ["medium", "new"] == living.placed()

    living.scale("new", 0)
    living.run_for(10)
    assert ["low", "medium"] == living.placed()


def test_what_was_displaced_rests_so_that_it_does_not_lose_a_place_in_turns() -> None:
    living = full(displaced_rest_s=30.0)
    for _ in range(5):
        living.deploy(wish("new", 80))
        living.run_for(6)
        living.retire("new")
        living.run_for(6)

    assert len(living.preemptions()) <= 2, "the load comes and goes every 12 s, and m0 rests for 30"
    living.run_for(40)
    assert ["m0"] == living.placed()


def test_a_delay_and_a_minimum_runtime_end_without_any_event() -> None:
    living = Living()
    living.join("n0", 1)
    living.deploy(wish("there", 80, priority="low", minimum_runtime_s=60.0))
    living.run_for(5)
    living.deploy(wish("new", 80, preemption_delay_s=20.0))
    living.run_for(54)
    assert [] == living.preemptions()

    living.run_for(5)

    assert [("new", ["there"])] == living.preemptions()


def test_a_gang_gets_room_for_all_of_it() -> None:
    living = Living()
    living.join("n0", 2)
    living.join("n1", 1)
    living.deploy(wish("m0", 80, priority="low"))
    living.deploy(wish("m1", 80, priority="low"))
    living.run_for(5)
    gang = wish("gang", 80, replica_count=3, is_gang=True)

    living.deploy(gang)
    living.run_for(1)
    assert 3 == len(living.state.claims), "the free GPU is claimed too"

    living.run_for(10)

    assert (["gang"] * 3, {}, {}) == (living.placed(), living.state.claims, living.state.gangs)


def test_a_gang_that_would_not_fit_even_so_displaces_nobody() -> None:
    living = full(gpu_count=2)
    gang = wish("gang", 80, replica_count=3, is_gang=True)

    living.deploy(gang)
    living.run_for(20)

    assert ["m0", "m1"] == living.placed()


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_and_goes_nobody_is_displaced_by_its_equal_and_never_in_a_circle(seed: int) -> None:
    draw = random.Random(seed)
    living = Living(displaced_rest_s=draw.choice((0.0, 30.0)))
    for index in range(3):
        living.join(f"n{index}", draw.choice((1, 2)))
    for step in range(60):
        name = f"m{draw.randrange(12)}"
        if draw.random() < 0.75:
            spec = wish(
                name,
                draw.choice((10, 20, 40, 60, 80)),
                priority=draw.choice(("very-low", "low", "medium", "high", "very-high")),
                is_parkable=draw.random() < 0.3,
                minimum_runtime_s=draw.choice((0.0, 0.0, 20.0)),
                preemption_delay_s=draw.choice((0.0, 0.0, 10.0)),
                replica_count=draw.choice((1, 1, 2)),
            )
            living.deploy(spec)
        elif living.state.named("default", name) is not None:
            living.retire(name)
        living.run_for(draw.choice((0.5, 2.0, 8.0)))
        assert is_kept(living.state), step
    before = len(living.preemptions())
    living.run_for(300)
    settled = len(living.preemptions())
    living.run_for(300)

    assert settled == len(living.preemptions()), "with nothing new, everybody comes to rest"
    assert {} == living.state.claims
    assert before > 0 or seed not in (0, 1, 2)
    for fact in living.told(PreemptionDecided):
        assert isinstance(fact, PreemptionDecided)
        for victim in fact.victims:
            assert victim.priority < living_priority(living, fact), fact


def living_priority(living: Living, fact: PreemptionDecided) -> int:
    """The newcomer's, as it was admitted."""
    admitted = [f for f in living.told(DeploymentAdmitted) if isinstance(f, DeploymentAdmitted)]
    return next(f.deployment.priority_number for f in admitted if f.deployment_id == fact.deployment_id)

"""An owner gets its bytes back from those who borrow them: frozen, asked, parked, stopped, in this order."""

import pytest

from kit.outcomes import Outcome, Timer
from schemas.deployments import SwapDriver
from schemas.nodes import GaveBack, GiveBackAsked, GiveBackStep, LeaseResized, ReplicaWaking, ResizeReason
from schemas.units import GiB
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import (
    BurstDue,
    EngineEffect,
    EvictEngine,
    GiveBackDue,
    ParkEngine,
    ResizeEngine,
    StartEngine,
    WakeEngine,
)
from services.nodeagent.ledger import Ledger
from tests.unit.nodeagent.builders import Agent, effects, gpu, outline, proposal, replica

FREEZES = (SwapDriver.CHECKPOINT,)


def lending() -> Agent:
    """`owner` is parked; `a` borrows all that it left."""
    agent = Agent(gpu(allocatable_gib=80))
    agent.parked("owner", 40)
    agent.resident("a", 30, limit_gib=80)
    agent.tick()
    assert 79 == agent.granted_gib("a")
    return agent


def resizes(outcomes: list[Outcome]) -> list[ResizeEngine]:
    return [outcome for outcome in outcomes if isinstance(outcome, ResizeEngine)]


def steps(outcomes: list[Outcome]) -> list[tuple[GiveBackStep, bool]]:
    return [(outcome.step, outcome.is_enough) for outcome in outcomes if isinstance(outcome, GaveBack)]


def asked(agent: Agent, name: str = "owner") -> ResizeEngine:
    """The freeze that a wake leads to."""
    (freeze,) = resizes(agent.handle(agent.wake(name)))
    assert ResizeReason.FREEZE is freeze.reason
    return freeze


def test_a_wake_whose_bytes_are_borrowed_is_accepted_at_once_and_borrowers_are_frozen() -> None:
    agent = lending()

    outcomes = agent.handle(agent.wake("owner"))

    assert ["ReplicaWaking owner", "GiveBackAsked a", "ResizeEngine a", "Timer a"] == outline(outcomes)
    told = outcomes[1]
    assert isinstance(told, GiveBackAsked)
    assert ("owner", 39 * GiB, True) == (told.for_replica_id, told.asked_bytes, told.is_owed)
    assert "waiting" == agent.residency("owner")


def test_what_a_frozen_borrower_does_not_use_is_free_at_once() -> None:
    agent = lending()

    outcomes = agent.handle(agent.resized(asked(agent), 40))

    assert [(GiveBackStep.FREEZE, True)] == steps(outcomes)
    assert ["WakeEngine"] == [type(e).__name__ for e in effects(outcomes)]
    assert 40 == agent.granted_gib("a")


def test_a_borrower_that_uses_its_bytes_is_asked_for_what_is_missing_and_the_owner_waits_for_the_proof() -> None:
    agent = lending()

    outcomes = agent.handle(agent.resized(asked(agent), 79))
    (shrink,) = resizes(outcomes)
    assert [(GiveBackStep.FREEZE, False)] == steps(outcomes)
    assert (40 * GiB,) == shrink.granted_bytes
    assert 79 == agent.granted_gib("a")

    woken = agent.handle(agent.resized(shrink))
    assert ["LeaseResized a", "GaveBack a", "ReplicaWaking owner", "WakeEngine owner"] == outline(woken)
    assert (40, "waking") == (agent.granted_gib("a"), agent.residency("owner"))


def test_a_parkable_borrower_that_does_not_shrink_is_parked() -> None:
    agent = lending()
    (shrink,) = resizes(agent.handle(agent.resized(asked(agent), 79)))

    outcomes = agent.handle(agent.not_resized(shrink))

    assert [(GiveBackStep.SHRINK, False)] == steps(outcomes)
    assert any(isinstance(e, ParkEngine) for e in effects(outcomes))
    parked = agent.handle(agent.has_parked("a"))
    assert [(GiveBackStep.PARK, True)] == steps(parked)
    assert any(isinstance(e, WakeEngine) for e in effects(parked))
    assert (30, None) == (agent.granted_gib("a"), agent.lease("a").giving_back)


def test_what_it_gave_before_its_time_was_over_counts() -> None:
    agent = lending()
    (shrink,) = resizes(agent.handle(agent.resized(asked(agent), 79)))

    outcomes = agent.handle(agent.not_resized(shrink, 50))

    (told,) = (o for o in outcomes if isinstance(o, LeaseResized))
    assert ((50 * GiB,), ResizeReason.GIVE_BACK) == (told.granted_bytes, told.reason)
    assert any(isinstance(e, ParkEngine) for e in effects(outcomes))


def test_one_that_does_not_park_either_is_stopped_and_its_owner_comes_back() -> None:
    agent = lending()
    (shrink,) = resizes(agent.handle(agent.resized(asked(agent), 79)))
    agent.handle(agent.not_resized(shrink))

    outcomes = agent.handle(agent.stayed("a"))
    assert [(GiveBackStep.PARK, False)] == steps(outcomes)
    assert any(isinstance(e, EvictEngine) for e in effects(outcomes))

    ended = agent.handle(agent.lost("a"))
    assert [(GiveBackStep.STOP, True)] == steps(ended)
    assert "waking" == agent.residency("owner")


def test_one_that_may_not_be_parked_is_stopped_when_it_does_not_obey() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.parked("owner", 40)
    agent.resident("a", 30, limit_gib=80, is_parkable=False)
    agent.tick()
    (shrink,) = resizes(agent.handle(agent.resized(asked(agent), 79)))

    outcomes = agent.handle(agent.not_resized(shrink))

    assert [EvictEngine] == [type(e) for e in effects(outcomes)]


def test_a_step_that_nobody_answers_is_over_when_its_time_is() -> None:
    agent = lending()
    outcomes = agent.handle(agent.wake("owner"))
    ladder: list[type[EngineEffect]] = []
    for _ in range(4):
        (due,) = (o.input for o in outcomes if isinstance(o, Timer) and isinstance(o.input, GiveBackDue))
        outcomes = agent.handle(due)
        ladder += [type(e) for e in effects(outcomes) if isinstance(e, EngineEffect)]
        if EvictEngine in ladder:
            break

    assert [ResizeEngine, ParkEngine, EvictEngine] == ladder


def test_an_answer_after_its_time_changes_nothing() -> None:
    agent = lending()
    freeze = asked(agent)
    (shrink,) = resizes(agent.handle(agent.resized(freeze, 79)))
    agent.handle(agent.resized(shrink))

    assert [] == agent.handle(agent.resized(freeze, 60))
    assert [] == agent.handle(agent.not_resized(shrink))
    assert 40 == agent.granted_gib("a")


def test_the_lowest_priority_gives_first_and_the_others_keep_what_they_borrowed() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.parked("owner", 20)
    agent.resident("high", 10, limit_gib=80, priority="high")
    agent.resident("low", 10, limit_gib=80, priority="low")
    agent.tick()
    borrowed = agent.granted_gib("low")
    freezes = resizes(agent.handle(agent.wake("owner")))
    assert ["high", "low"] == sorted(f.replica.replica_id for f in freezes)

    outcomes = [o for f in freezes for o in agent.handle(agent.resized(f, int(borrowed) + 1))]

    assert ["low"] == [shrink.replica.replica_id for shrink in resizes(outcomes)]
    assert ("high", GiveBackStep.FREEZE, True) in [
        (o.replica_id, o.step, o.is_enough) for o in outcomes if isinstance(o, GaveBack)
    ]


def test_a_first_start_gets_borrowed_bytes_too() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.resident("a", 30, limit_gib=80)
    agent.tick()

    outcomes = agent.handle(proposal(replica("b", 40)))
    (freeze,) = resizes(outcomes)
    assert any(isinstance(o, ReplicaWaking) for o in outcomes)

    assert any(isinstance(e, StartEngine) for e in effects(agent.handle(agent.resized(freeze, 35))))


def test_bytes_that_are_borrowed_are_promised_once() -> None:
    """49 are borrowed: two wakes of 39 more cannot both count on them."""
    agent = Agent(gpu(allocatable_gib=81))
    agent.parked("one", 40)
    agent.parked("two", 40)
    agent.resident("a", 30, limit_gib=80)
    agent.tick()

    agent.handle(agent.wake("one"))
    outcomes = agent.handle(agent.wake("two"))

    assert ["WakeRefused two"] == outline(outcomes)
    assert 0 <= Ledger(agent.state).promised_free_bytes("gpu-0")


def test_a_victim_that_borrows_gives_all_by_its_park_and_is_not_asked() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.parked("owner", 70)
    agent.resident("a", 30, limit_gib=80)
    agent.tick()

    outcomes = agent.handle(agent.wake("owner", "a"))

    assert ["ReplicaWaking owner", "ReplicaDraining a", "ParkEngine a"] == outline(outcomes)
    assert any(isinstance(e, WakeEngine) for e in effects(agent.handle(agent.has_parked("a"))))


def test_a_victim_that_stays_is_asked_for_what_it_borrowed() -> None:
    agent = Agent(gpu(allocatable_gib=80))
    agent.parked("owner", 40)
    agent.resident("a", 30, limit_gib=80)
    agent.tick()
    agent.handle(agent.wake("owner", "a"))

    outcomes = agent.handle(agent.stayed("a"))

    assert ["ParkAbandoned a", "GiveBackAsked a", "ResizeEngine a", "Timer a"] == outline(outcomes)


def test_nobody_grows_while_an_owner_waits() -> None:
    agent = lending()
    asked(agent)

    assert [] == effects(agent.tick())


def test_whoever_gave_back_rests() -> None:
    agent = lending()
    (shrink,) = resizes(agent.handle(agent.resized(asked(agent), 79)))
    agent.handle(agent.resized(shrink))
    agent.handle(agent.woken("owner"))
    agent.handle(agent.park("owner"))
    agent.handle(agent.has_parked("owner"))

    assert [] == resizes(agent.handle(BurstDue()))
    assert ["a"] == [grow.replica.replica_id for grow in resizes(agent.tick())]


def test_a_restarted_agent_goes_on_with_the_ladder_from_its_first_step() -> None:
    agent = lending()
    agent.handle(agent.resized(asked(agent), 79))
    timers = [o for o in SERVICE.on_start(agent.state, agent.context()) if isinstance(o, Timer)]
    (first,) = (timer.input for timer in timers if isinstance(timer.input, BurstDue))

    outcomes = agent.handle(first)

    (freeze,) = resizes(outcomes)
    assert ResizeReason.FREEZE is freeze.reason
    assert any(isinstance(e, ResizeEngine) for e in effects(agent.handle(agent.resized(freeze, 79))))


@pytest.mark.parametrize("uses_gib", [79, 60, 30])
def test_a_grant_never_goes_below_its_request_or_what_is_proven(uses_gib: int) -> None:
    agent = lending()

    agent.handle(agent.resized(asked(agent), uses_gib))

    assert agent.granted_gib("a") >= 30
    assert agent.granted_gib("a") == uses_gib


# --- The driver's checkpoint ------------------------------------------------------------------------------------------


def disobeying(*, is_parkable: bool, host_gib: int = 1000, kind_of_gpu: tuple[SwapDriver, ...] = FREEZES) -> Agent:
    """`a` has been asked to shrink for `owner`, whose wake waits, and has not; what is tried next is in `next_of`."""
    agent = Agent(gpu(allocatable_gib=80, swap_drivers=kind_of_gpu), host_gib=host_gib)
    agent.parked("owner", 40)
    agent.resident("a", 30, limit_gib=80, is_parkable=is_parkable)
    agent.tick()
    return agent


def after_shrink(agent: Agent) -> list[Outcome]:
    (shrink,) = resizes(agent.handle(agent.resized(asked(agent), 79)))
    return agent.handle(agent.not_resized(shrink))


def parks(outcomes: list[Outcome]) -> list[tuple[SwapDriver | None, float]]:
    return [(e.swap_driver, e.drain_s) for e in effects(outcomes) if isinstance(e, ParkEngine)]


def test_one_that_may_not_be_parked_is_checkpointed_and_comes_back_by_itself_behind_the_owner() -> None:
    agent = disobeying(is_parkable=False)

    outcomes = after_shrink(agent)
    assert [(SwapDriver.CHECKPOINT, 10.0)] == parks(outcomes)

    parked = agent.handle(agent.has_parked("a", residue_gib=0))
    assert [(GiveBackStep.CHECKPOINT, True)] == steps(parked)
    assert ["owner", "a"] == [e.replica.replica_id for e in effects(parked) if isinstance(e, WakeEngine)]
    assert SwapDriver.CHECKPOINT is effects(parked)[-1].swap_driver  # type: ignore[attr-defined]
    agent.handle(agent.woken("a"))
    assert (30, "resident") == (agent.granted_gib("a"), agent.residency("a"))


def test_one_that_sleeps_not_when_it_is_asked_is_checkpointed_before_anybody_thinks_of_stopping_it() -> None:
    agent = disobeying(is_parkable=True)
    assert [(SwapDriver.HTTP_SLEEP, 10.0)] == parks(after_shrink(agent))

    outcomes = agent.handle(agent.stayed("a"))
    assert [(GiveBackStep.PARK, False)] == steps(outcomes)
    assert [(SwapDriver.CHECKPOINT, 1.0)] == parks(outcomes)

    parked = agent.handle(agent.has_parked("a", residue_gib=0))
    assert [(GiveBackStep.CHECKPOINT, True)] == steps(parked)
    assert "parked" == agent.residency("a")
    assert SwapDriver.CHECKPOINT is agent.lease("a").swap_driver


def test_one_that_cannot_be_checkpointed_after_all_is_stopped() -> None:
    agent = disobeying(is_parkable=False)
    after_shrink(agent)

    outcomes = agent.handle(agent.stayed("a"))

    assert [(GiveBackStep.CHECKPOINT, False)] == steps(outcomes)
    assert [EvictEngine] == [type(e) for e in effects(outcomes)]
    assert [(GiveBackStep.STOP, True)] == steps(agent.handle(agent.lost("a")))


@pytest.mark.parametrize(
    ("host_gib", "drivers"),
    [(39, FREEZES), (1000, ()), (1000, (SwapDriver.STORE, SwapDriver.CHECKPOINT))],
    ids=["no host memory for its image", "a driver without checkpoints", "a broker that holds its memory"],
)
def test_what_a_node_cannot_checkpoint_is_stopped(host_gib: int, drivers: tuple[SwapDriver, ...]) -> None:
    agent = disobeying(is_parkable=False, host_gib=host_gib, kind_of_gpu=drivers)

    assert [EvictEngine] == [type(e) for e in effects(after_shrink(agent))]


def test_a_return_that_was_rolled_back_is_tried_again_at_the_next_look() -> None:
    agent = disobeying(is_parkable=False)
    after_shrink(agent)
    agent.handle(agent.has_parked("a", residue_gib=0))
    agent.handle(agent.not_woken("a"))
    assert "parked" == agent.residency("a")

    assert ["a"] == [e.replica.replica_id for e in effects(agent.tick()) if isinstance(e, WakeEngine)]


def test_a_restarted_agent_goes_on_with_the_checkpoint_and_not_with_another_park() -> None:
    agent = disobeying(is_parkable=False)
    after_shrink(agent)
    SERVICE.on_start(agent.state, agent.context())

    assert [(SwapDriver.CHECKPOINT, 10.0)] == parks(agent.handle(agent.probed()))

"""Starts, parks and wakes: in which order bytes change hands, and what becomes of late, repeated and failed work."""

import pytest

from kit.outcomes import Context, Timer
from schemas.nodes import ParkAbandoned, ReplicaFailed, ReplicaParked, ReplicaResident, WakeRefused
from schemas.units import GiB
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import EngineStarted, ParkEngine, RestartDue, WakeEngine
from tests.unit.nodeagent.builders import Agent, outline
from tests.unit.nodeagent.test_leases import agent_with

# --- Starts -----------------------------------------------------------------------------------------------------------


def test_an_engine_that_has_started_is_told_once() -> None:
    agent = Agent()
    agent.granted("a", 30)
    started = agent.started("a")

    assert ["ReplicaReady a"] == outline(agent.handle(started))
    assert [] == agent.handle(started)


def test_results_of_an_older_lease_are_ignored_in_every_kind() -> None:
    """Its engine was given up since; what that one still does concerns nobody."""
    agent = agent_with("a", "starting")
    old = [
        agent.started("a"),
        agent.has_parked("a"),
        agent.stayed("a"),
        agent.woken("a"),
        agent.not_woken("a"),
        agent.stopped("a"),
        agent.lost("a"),
    ]
    agent.handle(agent.lost("a"))
    agent.handle(agent.wake("a"))
    assert "starting" == agent.residency("a")

    assert [[]] * len(old) == [agent.handle(result) for result in old]


def test_a_result_for_a_replica_that_is_gone_is_ignored() -> None:
    assert [] == Agent().handle(
        EngineStarted(replica_id="x", lease_epoch=1, endpoint="", start_s=1.0, enforced_bytes=1)
    )


@pytest.mark.parametrize("step", ["starting", "resident", "draining", "parked", "waiting", "waking"])
def test_a_lost_engine_is_tried_again_after_a_pause_from_every_residency(step: str) -> None:
    agent = agent_with("a", step)
    lease_epoch, wake_epoch = agent.lease("a").lease_epoch, agent.lease("a").wake_epoch

    failed, timer, *_ = agent.handle(agent.lost("a"))

    assert isinstance(failed, ReplicaFailed)
    assert (1, False, wake_epoch + 1) == (failed.attempt_count, failed.is_final, failed.wake_epoch)
    due = RestartDue(replica_id="a", lease_epoch=lease_epoch + 1)
    assert Timer(due_s=agent.now_s + agent.state.settings.restart_backoff_s, input=due) == timer
    assert "granted" == agent.residency("a")


def test_a_lost_engine_that_was_being_released_ends_its_lease() -> None:
    agent = agent_with("a", "releasing")

    assert ["LeaseReleased a"] == outline(agent.handle(agent.lost("a")))


@pytest.mark.parametrize("step", ["granted", "failed"])
def test_the_loss_of_an_engine_that_is_not_there_is_no_news(step: str) -> None:
    agent = agent_with("a", step)

    assert [] == agent.handle(agent.lost("a"))


def test_a_restart_starts_again_when_there_is_room_and_leaves_it_to_the_next_wake_else() -> None:
    agent = agent_with("a", "starting")
    agent.handle(agent.lost("a"))
    due = RestartDue(replica_id="a", lease_epoch=agent.lease("a").lease_epoch)
    agent.resident("b", 70)

    assert [] == agent.handle(due)

    agent.handle(agent.park("b"))
    agent.handle(agent.has_parked("b"))
    assert ["ReplicaStarting a", "StartEngine a"] == outline(agent.handle(due))


def test_a_pause_doubles_with_each_failure_and_the_last_one_is_final_and_holds_nothing() -> None:
    agent = agent_with("a", "starting")
    pauses_s = []
    for _ in range(agent.state.settings.start_attempt_count - 1):
        _, timer = agent.handle(agent.lost("a"))
        assert isinstance(timer, Timer)
        pauses_s.append(timer.due_s - agent.now_s)
        agent.handle(agent.wake("a"))

    (last,) = agent.handle(agent.lost("a"))

    assert [1.0, 2.0, 4.0, 8.0] == pauses_s
    assert isinstance(last, ReplicaFailed)
    assert last.is_final
    assert 0 == agent.state.held_bytes("gpu-0")


def test_the_bytes_of_a_lost_engine_go_to_the_wake_that_waits() -> None:
    agent = agent_with("a", "waiting")

    outcomes = agent.handle(agent.lost("victim"))

    assert ["ReplicaFailed victim", "Timer victim", "ReplicaWaking a", "WakeEngine a"] == outline(outcomes)


# --- Parks ------------------------------------------------------------------------------------------------------------


def test_a_park_drains_first_and_holds_the_share_until_its_bytes_are_proven_free() -> None:
    agent = Agent()
    agent.resident("a", 30)

    outcomes = agent.handle(agent.park("a"))

    assert ["ReplicaDraining a", "ParkEngine a"] == outline(outcomes)
    assert isinstance(outcomes[1], ParkEngine)
    assert 30 * GiB == agent.state.held_bytes("gpu-0")
    (parked,) = agent.handle(agent.has_parked("a", residue_gib=2))
    assert isinstance(parked, ReplicaParked)
    assert (2, 2 * GiB) == (parked.wake_epoch, parked.residue_bytes)
    assert 2 * GiB == agent.state.held_bytes("gpu-0")


@pytest.mark.parametrize("step", ["starting", "draining", "parked", "waiting", "waking", "releasing", "granted"])
def test_only_a_resident_replica_is_parked(step: str) -> None:
    agent = agent_with("a", step)

    assert [] == agent.handle(agent.park("a"))


def test_a_park_of_an_earlier_wake_is_ignored() -> None:
    """It was ordered before the replica went and came back."""
    agent = agent_with("a", "waking")
    agent.handle(agent.woken("a"))

    assert [] == agent.handle(agent.park("a", wake_epoch=1))


def test_a_victim_that_stays_keeps_its_bytes_and_the_wake_is_refused_with_what_is_missing() -> None:
    agent = agent_with("a", "waiting")

    stays, refused = agent.handle(agent.stayed("victim"))

    assert isinstance(stays, ParkAbandoned)
    assert isinstance(refused, WakeRefused)
    assert ("victim did not park: still busy", 50 * GiB) == (refused.reason, refused.short_by_bytes)
    assert ("resident", "parked") == (agent.residency("victim"), agent.residency("a"))


def test_a_victim_that_stays_does_not_refuse_a_wake_that_other_victims_cover() -> None:
    agent = Agent()
    agent.parked("a", 40)
    agent.resident("big", 50)
    agent.resident("small", 20)
    agent.handle(agent.wake("a", "big"))
    agent.handle(agent.park("small"))

    assert ["ParkAbandoned small"] == outline(agent.handle(agent.stayed("small")))


@pytest.mark.parametrize("result", ["has_parked", "stayed"])
def test_the_end_of_a_park_counts_only_while_it_drains(result: str) -> None:
    agent = agent_with("a", "resident")

    assert [] == agent.handle(getattr(agent, result)("a"))


# --- Wakes ------------------------------------------------------------------------------------------------------------


def test_a_wake_with_room_holds_its_share_and_restores_at_once() -> None:
    agent = Agent()
    agent.parked("a", 60)

    outcomes = agent.handle(agent.wake("a"))

    assert ["ReplicaWaking a", "ReplicaWaking a", "WakeEngine a"] == outline(outcomes)
    assert isinstance(outcomes[2], WakeEngine)
    assert 60 * GiB == agent.state.held_bytes("gpu-0")


def test_a_wake_restores_only_after_the_victims_bytes_are_proven_free() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.resident("victim", 70)

    ordered = agent.handle(agent.wake("a", "victim"))
    freed = agent.handle(agent.has_parked("victim"))

    assert ["ReplicaWaking a", "ReplicaDraining victim", "ParkEngine victim"] == outline(ordered)
    assert ["ReplicaParked victim", "ReplicaWaking a", "WakeEngine a"] == outline(freed)


def test_a_repeated_order_changes_nothing_while_the_standing_plan_goes_on() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.resident("victim", 70)
    order = agent.wake("a", "victim")
    agent.handle(order)

    assert [] == agent.handle(order)
    agent.handle(agent.has_parked("victim"))
    assert [] == agent.handle(order)
    agent.handle(agent.woken("a"))
    assert [] == agent.handle(order)


def test_an_order_of_another_wake_is_ignored() -> None:
    agent = agent_with("a", "parked")

    assert [] == agent.handle(agent.wake("a", wake_epoch=1))


def test_a_wake_whose_victims_free_too_little_is_refused_with_the_missing_bytes() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.resident("b", 40)
    agent.resident("small", 20)

    (refused,) = agent.handle(agent.wake("a", "small"))

    assert isinstance(refused, WakeRefused)
    # 59 more are wanted; 80 - 1 - 40 - 20 = 19 are free and `small` would leave 19 of its 20.
    assert 21 * GiB == refused.short_by_bytes
    assert ("parked", "resident") == (agent.residency("a"), agent.residency("small"))


def test_what_may_not_be_parked_is_no_victim() -> None:
    agent = Agent()
    agent.resident("fixed", 20, is_parkable=False)
    agent.parked("a", 50)
    agent.resident("b", 30)

    outcomes = agent.handle(agent.wake("a", "fixed"))

    assert ["WakeRefused a"] == outline(outcomes)
    assert "resident" == agent.residency("fixed")


def test_a_victim_that_drains_already_is_not_parked_twice() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.resident("victim", 70)
    agent.handle(agent.park("victim"))

    assert ["ReplicaWaking a"] == outline(agent.handle(agent.wake("a", "victim")))
    assert "WakeEngine a" in outline(agent.handle(agent.has_parked("victim")))


def test_bytes_that_one_wake_waits_for_are_not_promised_to_another() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.parked("b", 60)
    agent.resident("victim", 70)
    agent.handle(agent.wake("a", "victim"))

    assert ["WakeRefused b"] == outline(agent.handle(agent.wake("b", "victim")))


def test_wakes_that_wait_begin_in_the_order_of_their_orders() -> None:
    agent = Agent()
    agent.parked("late", 30)
    agent.parked("early", 30)
    agent.resident("victim", 70)
    agent.handle(agent.wake("early", "victim"))
    agent.handle(agent.wake("late", "victim"))

    freed = outline(agent.handle(agent.has_parked("victim")))

    assert ["WakeEngine early", "WakeEngine late"] == [line for line in freed if line.startswith("WakeEngine")]


def test_a_victim_that_leaves_more_on_the_device_than_expected_lets_the_newest_wake_go() -> None:
    """Nobody waits for bytes that nobody will give."""
    agent = Agent()
    agent.parked("a", 40)
    agent.parked("b", 38)
    agent.resident("victim", 78)
    agent.handle(agent.wake("a", "victim"))
    agent.handle(agent.wake("b", "victim"))

    freed = outline(agent.handle(agent.has_parked("victim", residue_gib=3)))

    assert ["ReplicaParked victim", "ReplicaWaking a", "WakeEngine a", "WakeRefused b"] == freed


def test_a_replica_that_was_never_started_is_started_by_a_wake() -> None:
    agent = agent_with("a", "granted")

    agent.handle(agent.wake("a", "victim"))

    assert ["ReplicaParked victim", "ReplicaStarting a", "StartEngine a"] == outline(
        agent.handle(agent.has_parked("victim"))
    )


def test_a_wake_that_ended_tells_the_phases_of_its_return() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.resident("victim", 70)
    agent.handle(agent.wake("a", "victim"))
    ordered_at_s = agent.now_s
    agent.handle(agent.has_parked("victim"))

    (resident,) = agent.handle(agent.woken("a"))

    assert isinstance(resident, ReplicaResident)
    assert (1.0, 0.3, 0.1) == (resident.reserve_s, resident.restore_s, resident.verify_s)
    assert agent.now_s - ordered_at_s == resident.wake_s


def test_a_restore_that_was_rolled_back_leaves_the_replica_parked_and_its_bytes_to_the_next() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.parked("b", 60)
    agent.handle(agent.wake("a"))

    assert ["WakeRefused a"] == outline(agent.handle(agent.not_woken("a")))
    assert "parked" == agent.residency("a")
    assert "WakeEngine b" in outline(agent.handle(agent.wake("b")))


@pytest.mark.parametrize("result", ["woken", "not_woken"])
def test_the_end_of_a_wake_counts_only_while_it_wakes(result: str) -> None:
    agent = agent_with("a", "parked")

    assert [] == agent.handle(getattr(agent, result)("a"))


def test_a_failed_engine_is_expected_to_leave_what_it_left_when_it_was_measured() -> None:
    """Swapper and placement read the same from history; were the agent to expect more, it would refuse their wakes."""
    agent = Agent()
    agent.parked("a", 60)
    agent.handle(agent.wake("a"))
    agent.handle(agent.woken("a"))
    agent.handle(agent.park("a"))
    agent.handle(agent.has_parked("a", residue_gib=0))

    agent.handle(agent.lost("a"))

    assert {"gpu-0": 0} == agent.lease("a").residue_bytes


@pytest.mark.parametrize("away_s", [0.0, 0.4, 60.0])
def test_a_pause_before_a_restart_goes_on_over_the_agents_own_return(away_s: float) -> None:
    """A replica that waits for its next start is not forgotten, and does not begin its pause anew."""
    agent = agent_with("a", "starting")
    (timer,) = [o for o in agent.handle(agent.lost("a")) if isinstance(o, Timer)]
    agent.now_s += away_s

    started = SERVICE.on_start(agent.state, Context(now_s=agent.now_s, writer_epoch=2))

    (again,) = [o for o in started if isinstance(o, Timer) and isinstance(o.input, RestartDue)]
    assert timer.input == again.input
    assert max(agent.now_s, timer.due_s) == again.due_s
    assert ["ReplicaStarting a", "StartEngine a"] == outline(agent.handle(again.input))


@pytest.mark.parametrize("step", ["granted", "starting", "resident", "parked", "waiting", "failed"])
def test_what_waits_for_no_restart_gets_none_at_a_return(step: str) -> None:
    agent = agent_with("a", step)

    started = SERVICE.on_start(agent.state, Context(now_s=agent.now_s, writer_epoch=2))

    assert not [o for o in started if isinstance(o, Timer) and isinstance(o.input, RestartDue)]

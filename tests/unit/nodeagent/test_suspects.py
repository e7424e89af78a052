"""Suspects: who becomes one, what it holds, how often it is looked at, and how it ends."""

from typing import Any

import pytest

from kit.outcomes import Context, Timer
from schemas.nodes import ReplicaFact, ReplicaParked, ReplicaResident, ReplicaSuspect
from schemas.units import GiB
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import EngineDoubtful, GiveGrace, LookAtEngine, LookDue, StepHung, StepOverdue
from services.nodeagent.transitions import Residency, allowed_s
from tests.unit.nodeagent.builders import Agent, effects, outline, release
from tests.unit.nodeagent.test_leases import agent_with, probe

STEPS = ["starting", "draining", "waking", "releasing"]


def overdue(agent: Agent, name: str) -> StepOverdue:
    lease = agent.lease(name)
    return StepOverdue(replica_id=name, lease_epoch=lease.lease_epoch, deadline_s=lease.deadline_s)


def hangs(agent: Agent, name: str) -> StepHung:
    lease = agent.lease(name)
    return StepHung(replica_id=name, lease_epoch=lease.lease_epoch, deadline_s=lease.deadline_s)


def look_due(agent: Agent, name: str) -> LookDue:
    return LookDue(replica_id=name, lease_epoch=agent.lease(name).lease_epoch)


def suspect(step: str) -> Agent:
    """Its replica `a` is suspect because that step hung."""
    agent = agent_with("a", step)
    agent.handle(hangs(agent, "a"))
    assert "suspect" == agent.residency("a")
    return agent


def timers(outcomes: list[Any], kind: type) -> list[Timer]:
    return [o for o in outcomes if isinstance(o, Timer) and isinstance(o.input, kind)]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_has_not_ended_in_its_time_makes_its_replica_suspect_and_gives_no_byte_away(step: str) -> None:
    agent = agent_with("a", step)
    held = agent.lease("a").held_bytes

    outcomes = agent.handle(hangs(agent, "a"))

    assert ["ReplicaSuspect a", "LookAtEngine a"] == outline(outcomes)
    assert held == agent.lease("a").held_bytes
    (look,) = effects(outcomes)
    assert isinstance(look, LookAtEngine)
    assert (Residency(step), False) == (look.was, look.may_end)


@pytest.mark.parametrize("step", STEPS)
def test_the_fact_that_begins_a_step_says_whose_it_is_and_how_long_it_may_take(step: str) -> None:
    agent = agent_with("a", step)

    begun = [f for f in agent.history if isinstance(f, ReplicaFact) and f.replica_id == "a"][-1]

    assert agent.lease("a").lease_epoch == begun.lease_epoch
    assert begun.ends_within_s >= allowed_s(Residency(step), agent.state.settings) > 0
    assert begun.at_s + begun.ends_within_s == agent.lease("a").deadline_s


@pytest.mark.parametrize("step", STEPS)
def test_a_step_sets_the_timer_of_its_deadline_and_a_new_life_sets_it_again(step: str) -> None:
    agent = agent_with("a", step)
    late = overdue(agent, "a")

    started = SERVICE.on_start(agent.state, Context(now_s=agent.now_s, writer_epoch=2))

    (timer,) = timers(list(started), StepOverdue)
    assert late == timer.input
    assert timer.due_s == max(late.deadline_s, agent.now_s + agent.state.settings.wake_deadline_s)


@pytest.mark.parametrize("step", STEPS)
def test_a_deadline_of_a_step_that_has_ended_is_no_news(step: str) -> None:
    agent = agent_with("a", step)
    late = overdue(agent, "a")
    ends: dict[str, Any] = {
        "starting": agent.started,
        "draining": agent.has_parked,
        "waking": agent.woken,
        "releasing": agent.stopped,
    }
    agent.handle(ends[step]("a"))

    assert [] == agent.handle(late)


@pytest.mark.parametrize("step", STEPS)
def test_a_deadline_is_followed_by_a_grace_on_the_steady_clock_and_a_step_that_ends_in_it_is_none_the_worse(
    step: str,
) -> None:
    """A clock that is set an hour ahead brings all deadlines at once."""
    agent = agent_with("a", step)
    late, hung = overdue(agent, "a"), hangs(agent, "a")

    (grace,) = agent.handle(late)

    assert isinstance(grace, GiveGrace)
    assert (agent.state.settings.step_grace_s, late.deadline_s) == (grace.grace_s, grace.deadline_s)
    ends: dict[str, Any] = {
        "starting": agent.started,
        "draining": agent.has_parked,
        "waking": agent.woken,
        "releasing": agent.stopped,
    }
    agent.handle(ends[step]("a"))
    assert [] == agent.handle(hung)


@pytest.mark.parametrize(("step", "told"), [("starting", "ReplicaReady a"), ("waking", "ReplicaResident a")])
def test_a_suspect_that_serves_is_adopted(step: str, told: str) -> None:
    agent = suspect(step)

    assert [told] == outline(agent.handle(agent.found("a")))
    assert "resident" == agent.residency("a")
    assert 60 * GiB == agent.state.held_bytes("gpu-0")


def test_a_suspect_that_is_found_parked_gives_its_bytes_to_the_wake_that_waits() -> None:
    agent = Agent()
    agent.parked("b", 60)
    agent.resident("a", 70)
    agent.handle(agent.park("a"))
    agent.handle(hangs(agent, "a"))
    assert ["WakeRefused b"] == outline(agent.handle(agent.wake("b", "a")))

    outcomes = agent.handle(agent.found("a", is_parked=True))

    parked = outcomes[0]
    assert isinstance(parked, ReplicaParked)
    assert (2, (GiB,)) == (parked.wake_epoch, parked.shard_residue_bytes)
    assert ["ReplicaWaking b", "ReplicaWaking b", "WakeEngine b"] == outline(agent.handle(agent.wake("b")))


def test_a_wake_that_counted_on_a_park_that_hangs_is_refused_so_that_the_swapper_chooses_again() -> None:
    agent = agent_with("a", "waiting")

    outcomes = outline(agent.handle(hangs(agent, "victim")))

    assert ["ReplicaSuspect victim", "LookAtEngine victim", "WakeRefused a"] == outcomes


def test_a_suspect_in_doubt_is_looked_at_again_after_pauses_that_double_and_ended_at_last() -> None:
    agent = suspect("waking")
    pauses_s, may_end = [], []
    for _ in range(5):
        (again,) = agent.handle(agent.unexplained("a"))
        assert isinstance(again, Timer)
        pauses_s.append(again.due_s - agent.now_s)
        (look,) = effects(agent.handle(again.input))
        assert isinstance(look, LookAtEngine)
        may_end.append(look.may_end)

    assert [2.0, 4.0, 8.0, 16.0, 16.0] == pauses_s
    assert [False, False, True, True, True] == may_end


def test_a_suspect_that_is_still_loading_has_all_its_time_once_more() -> None:
    agent = suspect("starting")
    waited_s = 0.0
    while True:
        (again,) = agent.handle(agent.unexplained("a"))
        assert isinstance(again, Timer)
        waited_s += again.due_s - agent.now_s
        (look,) = effects(agent.handle(again.input))
        assert isinstance(look, LookAtEngine)
        if look.may_end:
            break

    assert waited_s >= agent.state.settings.start_deadline_s


def test_a_suspect_that_is_gone_is_started_again_like_any_other() -> None:
    agent = suspect("draining")

    assert ["ReplicaFailed a", "RestartDue a"] == [
        line.replace("Timer", "RestartDue") for line in outline(agent.handle(agent.lost("a")))
    ]
    assert 0 == agent.state.held_bytes("gpu-0")


@pytest.mark.parametrize("result", ["lost", "stopped"])
def test_a_release_that_hung_ends_its_lease_when_its_engine_is_proven_gone(result: str) -> None:
    agent = suspect("releasing")

    assert ["LeaseReleased a"] == outline(agent.handle(getattr(agent, result)("a")))


def test_a_release_stops_a_suspect() -> None:
    agent = suspect("waking")

    assert ["ReplicaDraining a", "StopEngine a"] == outline(agent.handle(release("a")))
    assert 60 * GiB == agent.state.held_bytes("gpu-0")


@pytest.mark.parametrize("step", ["resident", "parked"])
def test_an_engine_that_is_not_as_its_lease_says_after_a_return_is_suspect_and_not_ended(step: str) -> None:
    agent = agent_with("a", step)
    doubtful = EngineDoubtful(replica_id="a", lease_epoch=agent.lease("a").lease_epoch, reason="it does not answer")

    assert ["ReplicaSuspect a", "LookAtEngine a"] == outline(agent.handle(doubtful))
    assert [] == agent.handle(doubtful)


def test_a_parked_suspect_that_serves_is_adopted_only_where_its_share_has_room() -> None:
    """It holds its residue: nobody may have promised the rest twice."""
    agent = agent_with("a", "parked")
    agent.resident("b", 70)
    lease_epoch = agent.lease("a").lease_epoch
    agent.handle(EngineDoubtful(replica_id="a", lease_epoch=lease_epoch, reason="it is awake"))

    assert ["Timer a"] == outline(agent.handle(agent.found("a")))

    agent.handle(release("b"))
    agent.handle(agent.stopped("b"))
    (resident,) = agent.handle(agent.found("a"))
    assert isinstance(resident, ReplicaResident)


def test_neighbours_that_are_not_well_after_a_forced_end_are_suspect_in_their_turn() -> None:
    agent = Agent()
    for name in ("a", "b", "c"):
        agent.resident(name, 20)
    agent.handle(agent.park("c"))

    outcomes = outline(agent.handle(agent.lost("a", shaken=("b", "c", "nobody"))))

    assert ["ReplicaFailed a", "Timer a", "ReplicaSuspect b", "LookAtEngine b"] == outcomes


def test_a_look_names_who_shares_a_gpu_so_that_they_are_seen_to() -> None:
    agent = Agent()
    for name in ("a", "b"):
        agent.resident(name, 20)
    agent.granted("late", 50)
    agent.handle(agent.park("a"))

    (look,) = effects(agent.handle(hangs(agent, "a")))

    assert isinstance(look, LookAtEngine)
    assert ["b"] == [neighbour.replica_id for neighbour in look.neighbours]
    assert (20 * GiB,) == look.granted_bytes


def test_a_new_life_looks_at_a_suspect_of_the_old_one() -> None:
    agent = suspect("waking")
    SERVICE.on_start(agent.state, Context(now_s=agent.now_s, writer_epoch=2))

    assert ["NodeJoined", "LookAtEngine a"] == outline(agent.handle(probe(agent)))


@pytest.mark.parametrize("late", ["started", "has_parked", "stayed", "woken", "not_woken"])
def test_what_the_hung_step_still_tells_later_is_not_believed(late: str) -> None:
    """Its look finds out; two truths at once would be one too many."""
    agent = suspect("waking")

    assert [] == agent.handle(getattr(agent, late)("a"))


def test_orders_for_a_suspect_change_nothing() -> None:
    agent = suspect("waking")

    assert [] == agent.handle(agent.wake("a"))
    assert [] == agent.handle(agent.park("a"))


def test_a_suspect_tells_since_when_and_why() -> None:
    agent = suspect("waking")

    (fact,) = [f for f in agent.history if isinstance(f, ReplicaSuspect)]

    assert "it hangs while waking" == fact.reason
    assert (0, 1) == (fact.look_count, fact.wake_epoch - 1)

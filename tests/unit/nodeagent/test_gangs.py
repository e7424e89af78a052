"""Leases that are held for a gang: nothing starts before it is committed, and none is held for ever."""

import pytest

from kit.outcomes import Context, Outcome, Timer
from schemas.nodes import LeaseGranted, LeaseReleased
from schemas.placement import GangAbandoned, GangCommitted, PlacementProposed
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import GangHoldOver, ProbeNode
from tests.unit.nodeagent.builders import NODE, Agent, gpu, outline, release, replica
from tests.unit.nodeagent.test_leases import probe, without

HOLD_S = 20.0


def gang(*names: str, gib: int = 30, gang_id: str = "g-1") -> PlacementProposed:
    return PlacementProposed(
        at_s=0.0,
        proposal_id=f"p-{gang_id}",
        node=NODE,
        replicas=tuple(replica(name, gib) for name in names),
        reason="all or none",
        gang_id=gang_id,
        gang_hold_s=HOLD_S,
    )


def committed(*names: str, gang_id: str = "g-1", node: str = NODE) -> GangCommitted:
    return GangCommitted(at_s=0.0, node=node, gang_id=gang_id, replica_ids=names)


def abandoned(*names: str, gang_id: str = "g-1", node: str = NODE) -> GangAbandoned:
    return GangAbandoned(at_s=0.0, node=node, gang_id=gang_id, replica_ids=names, reason="node-1 refused")


def over(agent: Agent, *, after_s: float, gang_id: str = "g-1") -> list[Outcome]:
    """The end of the hold comes so long after now."""
    agent.now_s += after_s
    return agent.handle(GangHoldOver(gang_id=gang_id))


def reasons(outcomes: list[Outcome]) -> list[str]:
    return [outcome.reason for outcome in outcomes if isinstance(outcome, LeaseReleased)]


def test_a_gang_is_granted_and_nothing_starts() -> None:
    agent = Agent()

    granted, timer = agent.handle(gang("a", "b"))

    assert isinstance(granted, LeaseGranted)
    assert ("g-1", HOLD_S) == (granted.gang_id, granted.gang_hold_s)
    assert Timer(due_s=agent.now_s + HOLD_S, input=GangHoldOver(gang_id="g-1")) == timer
    assert ("granted", "granted") == (agent.residency("a"), agent.residency("b"))


def test_a_committed_gang_starts() -> None:
    agent = Agent()
    agent.handle(gang("a", "b"))

    started = agent.handle(committed("a", "b"))

    assert ["ReplicaStarting a", "StartEngine a", "ReplicaStarting b", "StartEngine b"] == outline(started)
    assert agent.lease("a").lease_epoch == started[1].lease_epoch  # type: ignore[union-attr]
    assert [] == over(agent, after_s=HOLD_S)


def test_a_commit_that_comes_twice_starts_once() -> None:
    agent = Agent()
    agent.handle(gang("a"))
    agent.handle(committed("a"))

    assert [] == agent.handle(committed("a"))


def test_what_has_no_room_at_the_commit_waits_for_a_wake_like_any_other() -> None:
    agent = Agent()
    agent.resident("busy", 60)
    agent.handle(gang("a", "b", gib=15))

    assert ["ReplicaStarting a", "StartEngine a"] == outline(agent.handle(committed("a", "b")))
    assert "StartEngine b" not in outline(agent.handle(agent.wake("b", "busy")))
    assert "StartEngine b" in outline(agent.handle(agent.has_parked("busy")))


def test_a_commit_of_another_node_or_another_gang_starts_nothing() -> None:
    agent = Agent()
    agent.handle(gang("a"))

    assert [] == agent.handle(committed("a", node="node-1"))
    assert [] == agent.handle(committed("a", gang_id="g-2"))


def test_a_held_lease_is_not_woken() -> None:
    """Nobody may start a part of it, whoever orders that."""
    agent = Agent()
    agent.handle(gang("a"))

    assert ["WakeRefused a"] == outline(agent.handle(agent.wake("a")))
    assert "StartEngine a" in outline(agent.handle(committed("a")))


def test_an_abandoned_gang_gives_its_leases_back_with_the_reason() -> None:
    agent = Agent()
    agent.handle(gang("a", "b"))

    ended = agent.handle(abandoned("a", "b"))

    assert ["its gang was given up: node-1 refused"] * 2 == reasons(ended)
    assert {} == agent.state.replicas


def test_a_gang_that_nobody_commits_in_time_gives_its_leases_back() -> None:
    agent = Agent()
    agent.handle(gang("a", "b"))

    assert ["its gang was not committed in time"] * 2 == reasons(over(agent, after_s=HOLD_S))
    assert {} == agent.state.replicas


def test_the_end_of_an_earlier_hold_does_not_end_a_later_one() -> None:
    """The gang was proposed here again after its first part was given back."""
    agent = Agent()
    agent.handle(gang("a"))
    agent.handle(abandoned("a"))
    agent.handle(gang("b"))

    assert [] == over(agent, after_s=HOLD_S - 5)
    assert ["LeaseReleased b"] == outline(over(agent, after_s=5))


@pytest.mark.parametrize("end", ["abandoned", "over", "released", "gpu gone"])
def test_a_commit_that_comes_after_the_end_starts_nothing_and_says_so(end: str) -> None:
    agent = Agent()
    agent.handle(gang("a"))
    match end:
        case "abandoned":
            agent.handle(abandoned("a"))
        case "over":
            over(agent, after_s=HOLD_S)
        case "released":
            agent.handle(release("a"))
        case _:
            agent.handle(without(agent, gpu(1)))

    late = agent.handle(committed("a"))

    assert ["gang g-1 was committed when this lease had ended: nothing is started"] == reasons(late)
    assert {} == agent.state.replicas


def test_an_agent_that_returns_counts_the_hold_from_the_grant() -> None:
    agent = Agent()
    agent.handle(gang("a", "b"))
    granted_s = agent.now_s

    looked, timer, *_ = SERVICE.on_start(agent.state, Context(now_s=granted_s + 15.0, writer_epoch=2))

    assert ProbeNode() == looked
    assert Timer(due_s=granted_s + HOLD_S, input=GangHoldOver(gang_id="g-1")) == timer
    assert ["NodeJoined"] == outline(agent.handle(probe(agent)))
    assert ["StartEngine a", "StartEngine b"] == [
        line for line in outline(agent.handle(committed("a", "b"))) if line.startswith("StartEngine")
    ]


def test_an_agent_that_returns_holds_nothing_for_a_committed_gang() -> None:
    agent = Agent()
    agent.handle(gang("a"))
    agent.handle(committed("a"))

    begun = SERVICE.on_start(agent.state, Context(now_s=agent.now_s, writer_epoch=2))
    assert not [o for o in begun if isinstance(o, Timer) and isinstance(o.input, GangHoldOver)]

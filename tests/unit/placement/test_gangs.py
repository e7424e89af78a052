"""A gang: every replica gets its lease and then all start, or every lease goes back."""

from collections.abc import Sequence
from typing import Any

from kit.outcomes import Context, Outcome, Timer
from schemas.inbox import RetireRequested
from schemas.placement import (
    FailureReason,
    GangAbandoned,
    GangCommitted,
    PlacementProposed,
    ReasonCode,
    ReleaseProposed,
)
from services.placement.core import SERVICE
from services.placement.gangs import GangDue, PlaceNext
from tests.unit.placement.builders import Placement, failure, gpu, kinds, spec


def gang(name: str, count: int, gib: int = 80, **values: Any) -> Any:
    return spec(name, gib, is_parkable=False, replica_count=count, placing={"is_gang": True}, **values)


def proposals(outcomes: Sequence[Outcome]) -> list[PlacementProposed]:
    return [outcome for outcome in outcomes if isinstance(outcome, PlacementProposed)]


def fleet(*gpu_counts: int, **settings: Any) -> Placement:
    """So many GPUs of 80 GiB on node-0, node-1..."""
    placement = Placement(settings=settings)
    for number, count in enumerate(gpu_counts):
        placement.join(*(gpu(f"gpu-{number}{index}") for index in range(count)), node=f"node-{number}")
    return placement


def test_it_is_proposed_as_a_whole_held_until_all_leases_are_there_and_then_committed_on_every_node_at_once() -> None:
    placement = fleet(2, 2)

    outcomes = placement.deploy(gang("g", 4))

    first, second = proposals(outcomes)
    assert [("node-0", 2), ("node-1", 2)] == [(p.node, len(p.replicas)) for p in (first, second)]
    assert first.gang_id
    assert (first.gang_id, first.gang_hold_s) == (second.gang_id, second.gang_hold_s)
    assert ReasonCode.GANG in first.codes
    assert [] == placement.grant(first)

    committed = placement.grant(second)

    assert ["GangCommitted", "GangCommitted"] == kinds(committed)
    assert {"node-0", "node-1"} == {c.node for c in committed if isinstance(c, GangCommitted)}
    assert not placement.state.gangs
    assert not any(replica.is_held for replica in placement.state.replicas.values())


def test_what_does_not_fit_as_a_whole_takes_nothing_and_says_how_many_would_fit() -> None:
    placement = fleet(2)

    failed = failure(placement.deploy(gang("g", 3)))

    assert (FailureReason.GANG_INCOMPLETE, ReasonCode.GANG_INCOMPLETE) == (failed.reason, failed.codes[0])
    assert failed.message.startswith("g needs 3 replicas at once and 2 fit; the next one: g fits no GPU; nearest is")
    assert not placement.state.replicas
    assert [80, 80] == [units >> 30 for units in placement.state.index.rooms.fleet.free_units("node-0")]

    outcomes = placement.join(gpu("gpu-9"), node="node-9")

    assert {"node-0", "node-9"} == {p.node for p in proposals(outcomes)}


def test_a_refusal_in_the_middle_gives_every_lease_back_and_a_pause_later_it_is_tried_again() -> None:
    placement = fleet(2, 1, gang_pause_s=60.0)
    first, second = proposals(placement.deploy(gang("g", 3)))
    placement.grant(first)

    outcomes = placement.refuse(second)

    abandoned = [o for o in outcomes if isinstance(o, GangAbandoned)]
    assert {"node-0", "node-1"} == {a.node for a in abandoned}
    assert "node-1 refused: short by 7 bytes" == abandoned[0].reason
    assert not placement.state.gangs
    (again,) = [o for o in outcomes if isinstance(o, Timer)]
    assert placement.state.settings.gang_pause_s == again.due_s - abandoned[0].at_s
    for replica in first.replicas:
        assert [] == proposals(placement.release(replica.replica_id))

    placement.now_s = again.due_s
    assert 3 == sum(len(p.replicas) for p in proposals(placement.handle(PlaceNext())))


def test_what_is_not_complete_in_time_is_given_up() -> None:
    placement = fleet(2, 1)
    outcomes = placement.deploy(gang("g", 3))
    first, second = proposals(outcomes)
    (due,) = [o for o in outcomes if isinstance(o, Timer) and isinstance(o.input, GangDue)]
    assert due.due_s - first.at_s < first.gang_hold_s
    placement.grant(first)

    placement.now_s = due.due_s
    late = placement.handle(due.input)

    assert ["GangAbandoned", "GangAbandoned", "Timer"] == kinds(late)
    assert "GangCommitted" not in kinds(placement.grant(second))


def test_a_limit_that_comes_after_the_commit_means_nothing() -> None:
    placement = fleet(1)
    outcomes = placement.deploy(gang("g", 1))
    (due,) = [o for o in outcomes if isinstance(o, Timer)]
    assert "GangCommitted" in kinds(placement.grant(proposals(outcomes)[0]))

    assert [] == placement.handle(due.input)


def test_after_so_many_tries_it_is_said_that_it_failed_and_the_pause_is_a_long_one() -> None:
    placement = fleet(1, gang_attempt_count=2)
    outcomes = placement.deploy(gang("g", 1))
    outcomes = placement.refuse(proposals(outcomes)[0])
    placement.now_s += placement.state.settings.gang_pause_s
    outcomes = placement.refuse(proposals(placement.handle(PlaceNext()))[0])

    failed = failure(outcomes)

    assert "g needs 1 replicas at once and 0 got a lease: node-0 refused: short by 7 bytes" == failed.message
    placement.now_s += placement.state.settings.gang_pause_max_s / 2
    assert [] == placement.handle(PlaceNext())
    placement.now_s += placement.state.settings.gang_pause_max_s / 2
    assert proposals(placement.handle(PlaceNext()))


def test_a_gang_that_is_retired_before_it_is_complete_gives_every_lease_back() -> None:
    placement = fleet(2, 1)
    first, second = proposals(placement.deploy(gang("g", 3)))
    placement.grant(first)

    outcomes = placement.handle(RetireRequested(command_id="r", model="g"))

    assert ["DeploymentRetired", "Reply", "GangAbandoned", "GangAbandoned"] == kinds(outcomes)
    assert [] == placement.grant(second)
    for replica in (*first.replicas, *second.replicas):
        placement.release(replica.replica_id)
    assert not placement.state.replicas
    assert not placement.state.gangs


def test_a_lease_that_ends_before_the_gang_is_complete_ends_the_gang() -> None:
    placement = fleet(1, 1)
    first, _ = proposals(placement.deploy(gang("g", 2)))
    placement.grant(first)

    outcomes = placement.release(first.replicas[0].replica_id)

    assert ["GangAbandoned", "GangAbandoned"] == [kind for kind in kinds(outcomes) if kind != "Timer"]


def test_a_gang_of_which_a_part_is_released_before_it_is_complete_is_given_up_and_not_committed() -> None:
    """A preemption may take the place of a gang that has not started."""
    placement = fleet(1, 1)
    first, second = proposals(placement.deploy(gang("g", 2)))
    placement.grant(first)
    its = first.replicas[0].replica_id
    SERVICE.evolve(
        placement.state, ReleaseProposed(at_s=placement.now_s, node=first.node, replica_id=its, reason="room for b")
    )

    outcomes = placement.grant(second)

    abandoned = [o for o in outcomes if isinstance(o, GangAbandoned)]
    assert {"node-0", "node-1"} == {a.node for a in abandoned}
    assert "a lease on node-0 was to end: room for b" == abandoned[0].reason
    assert "GangCommitted" not in kinds(outcomes)


def test_a_new_instance_commits_what_is_complete_and_watches_what_is_not() -> None:
    placement = fleet(1, 1)
    first, second = proposals(placement.deploy(gang("g", 2)))
    placement.grant(first)

    begun = SERVICE.on_start(placement.state, Context(now_s=placement.now_s, writer_epoch=2))
    assert [GangDue(gang_id=first.gang_id)] == [
        o.input for o in begun if isinstance(o, Timer) and isinstance(o.input, GangDue)
    ]

    SERVICE.evolve(placement.state, granted(second, at_s=placement.now_s))
    begun = SERVICE.on_start(placement.state, Context(now_s=placement.now_s, writer_epoch=3))
    assert {"node-0", "node-1"} == {o.node for o in begun if isinstance(o, GangCommitted)}


def granted(proposed: PlacementProposed, *, at_s: float) -> Any:
    """The fact alone."""
    placement = Placement()
    placement.now_s = at_s
    facts: list[Any] = []
    placement.handle = facts.append  # type: ignore[method-assign, assignment]  # What it would have handled.
    placement.grant(proposed)
    return facts[0]


def test_a_gang_that_was_given_up_is_proposed_again_only_when_all_its_leases_have_ended() -> None:
    """A node that is away answers late: until then its part still counts, and the rest alone would be half a gang."""
    placement = fleet(1, 1)
    first, second = proposals(placement.deploy(gang("g", 2)))
    placement.grant(first)
    gave_up = placement.handle(GangDue(gang_id=first.gang_id))
    assert {"node-0", "node-1"} == {o.node for o in gave_up if isinstance(o, GangAbandoned)}
    placement.now_s += placement.state.settings.gang_pause_s
    for replica in first.replicas:
        assert [] == proposals(placement.release(replica.replica_id))

    assert [] == proposals(placement.handle(PlaceNext()))
    placement.grant(second)

    again = [o for replica in second.replicas for o in placement.release(replica.replica_id)]
    again += placement.handle(PlaceNext())
    assert 2 == sum(len(p.replicas) for p in proposals(again))


def test_parts_that_were_lost_one_after_the_other_start_together_again() -> None:
    """Both leases end with their GPU; the first end is read, and answered, before the second is known."""
    placement = fleet(2, 2)
    (first,) = proposals(placement.deploy(gang("g", 2)))
    placement.grant(first)
    again = [p for replica in first.replicas for p in proposals(placement.release(replica.replica_id))]
    assert [1, 1] == [len(p.replicas) for p in again]

    assert "GangCommitted" not in kinds(placement.grant(again[0]))
    assert ["GangCommitted", "GangCommitted"] == kinds(placement.grant(again[1]))

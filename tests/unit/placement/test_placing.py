"""Proposals, explanations, retries, and what follows from the facts of nodes and of the autoscaler."""

import pytest

from kit.outcomes import Context, Timer
from schemas.deployments import IsolationGrade
from schemas.inbox import RetireRequested
from schemas.placement import FailureReason, PlacementFailed, PlacementProposed, ReleaseProposed
from schemas.units import GiB
from services.placement.core import SERVICE
from services.placement.gangs import PlaceNext
from tests.unit.placement.builders import Placement, failure, gpu, kinds, proposal, spec


def test_a_deployment_is_proposed_to_a_node_with_all_that_the_node_needs() -> None:
    placement = Placement()
    placement.join()

    proposed = proposal(placement.deploy(spec("mistral", 30, limit_gib=50)))

    (replica,) = proposed.replicas
    assert ("node-0", "mistral-d2-1", "d2") == (proposed.node, replica.replica_id, replica.deployment_id)
    assert ("gpu-0", 30 * GiB, 50 * GiB) == (
        replica.shares[0].gpu_uuid,
        replica.shares[0].request_bytes,
        replica.shares[0].limit_bytes,
    )
    assert "room beside all requests: 50.0 GiB left to promise" == proposed.reason


def test_without_a_node_it_is_explained_and_placed_as_soon_as_one_joins() -> None:
    placement = Placement()

    failed = failure(placement.deploy(spec("a", 30)))

    assert (FailureReason.NO_NODE, "no node has joined yet") == (failed.reason, failed.message)
    assert failed.remedy
    assert ["PlacementProposed"] == kinds(placement.join())


def test_a_share_larger_than_any_gpu_is_explained_with_the_missing_bytes_and_a_remedy() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", allocatable_gib=40), gpu("gpu-1", allocatable_gib=80))

    failed = failure(placement.deploy(spec("big", 90)))

    assert (FailureReason.LARGER_THAN_ANY_GPU, 10 * GiB) == (failed.reason, failed.missing_bytes)
    assert "use a share smaller by 10.0 GiB" == failed.remedy
    assert [("gpu-1", 10 * GiB), ("gpu-0", 50 * GiB)] == [(a.gpu_uuid, a.short_by_bytes) for a in failed.alternatives]


def test_a_grade_that_cannot_be_had_is_explained() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", grade=IsolationGrade.BROKER))

    failed = failure(placement.deploy(spec("a", 30, minimum_grade=IsolationGrade.HARDWARE)))

    assert FailureReason.GRADE_NOT_AVAILABLE == failed.reason
    assert "grade 'broker' is weaker than the demanded 'hardware'" in failed.message
    assert "lower the minimum grade, or add a node that can enforce it" == failed.remedy


def test_host_memory_bounds_what_may_be_parked_but_not_what_never_is() -> None:
    placement = Placement()
    placement.join(host_gib=25)
    placement.placed(spec("a", 10, weights_gib=20))

    failed = failure(placement.deploy(spec("b", 10, weights_gib=10)))

    assert (FailureReason.NO_HOST_MEMORY, 5 * GiB) == (failed.reason, failed.missing_bytes)
    assert "PlacementProposed" in kinds(placement.deploy(spec("c", 10, weights_gib=10, is_parkable=False)))


def test_no_room_beside_what_never_parks_is_explained_once_and_not_at_each_try() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("fixed", 60, is_parkable=False))

    failed = failure(placement.deploy(spec("b", 30)))

    assert (FailureReason.NO_GPU_HAS_ROOM, 10 * GiB) == (failed.reason, failed.missing_bytes)
    assert [] == placement.join()


def test_what_is_explained_is_placed_when_a_lease_ends() -> None:
    placement = Placement()
    placement.join()
    fixed = placement.placed(spec("fixed", 60, is_parkable=False))
    placement.deploy(spec("b", 30))
    placement.handle(RetireRequested(command_id="r", model="fixed"))

    proposed = proposal(placement.release(fixed.replicas[0].replica_id))

    assert "b" == proposed.replicas[0].deployment.name
    assert "" == placement.state.deployments[placement.id_of("b")].problem


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_a_refusal_is_retried_a_bounded_number_of_times_then_explained_and_asked_again_when_there_is_more_room() -> (
    None
):
    placement = Placement()
    placement.join()
    proposed = proposal(placement.deploy(spec("a", 30)))
    for _ in range(placement.state.settings.refusal_count - 1):
        proposed = proposal(placement.refuse(proposed))

    failed = failure(placement.refuse(proposed))

    assert FailureReason.REFUSED_BY_NODE == failed.reason
    assert ["PlacementProposed"] == kinds(placement.release("somebody"))


def test_each_retry_is_a_replica_of_its_own() -> None:
    """So that a late answer to an earlier proposal cannot be taken for one to a later."""
    placement = Placement()
    placement.join()
    first = proposal(placement.deploy(spec("a", 30)))

    second = proposal(placement.refuse(first))

    assert first.replicas[0].replica_id != second.replicas[0].replica_id
    assert first.proposal_id != second.proposal_id


def test_a_node_that_refused_too_often_is_left_out_for_another_one() -> None:
    placement = Placement()
    placement.join()
    proposed = proposal(placement.deploy(spec("a", 30)))
    placement.join(gpu("gpu-9"), node="node-1")
    for _ in range(placement.state.settings.refusal_count):
        assert "node-0" == proposed.node
        proposed = proposal(placement.refuse(proposed))

    assert "node-1" == proposed.node


# --- Several at once --------------------------------------------------------------------------------------------------


def test_all_that_wait_are_proposed_in_one_input_together_for_each_node() -> None:
    """The node answers with one grant, and its stream holds one fact instead of three."""
    placement = Placement()
    for name in "abc":
        placement.deploy(spec(name, 20))

    (proposed,) = placement.join()

    assert isinstance(proposed, PlacementProposed)
    assert ["a", "b", "c"] == [replica.deployment.name for replica in proposed.replicas]
    assert "room beside all requests: 60.0 GiB left to promise" == proposed.reason
    assert [] == placement.handle(PlaceNext())


def test_one_input_decides_a_bounded_number_and_the_rest_follows_at_once() -> None:
    placement = Placement(settings={"placed_per_input_count": 2})
    placement.takes_turns = False
    for name in "abc":
        placement.deploy(spec(name, 20))
    placement.join()

    first = placement.handle(PlaceNext())
    second = placement.handle(PlaceNext())

    assert (["PlacementProposed", "Timer"], ["PlacementProposed"]) == (kinds(first), kinds(second))
    assert Timer(due_s=first[0].at_s, input=PlaceNext()) == first[1]  # type: ignore[union-attr]  # A proposal.
    assert [2, 1] == [len(proposal(outcomes).replicas) for outcomes in (first, second)]


def test_a_command_asks_for_placing_once_for_all_that_come_before_it() -> None:
    placement = Placement()
    placement.takes_turns = False

    assert "Timer" in kinds(placement.deploy(spec("a", 20)))
    assert "Timer" not in kinds(placement.deploy(spec("b", 20)))


def test_the_higher_priority_is_tried_first_then_the_older_wish() -> None:
    placement = Placement()
    for name, priority in [("old", "low"), ("new", "low"), ("urgent", "high")]:
        placement.deploy(spec(name, 50, is_parkable=False, priority=priority))

    first, *others = placement.join()

    assert isinstance(first, PlacementProposed)
    assert ["urgent"] == [replica.deployment.name for replica in first.replicas]
    assert ["old", "new"] == [f.model for f in others if isinstance(f, PlacementFailed)] or not others


def test_a_new_instance_goes_on_with_what_is_not_placed() -> None:
    placement = Placement()
    placement.deploy(spec("a", 20))
    placement.takes_turns = False
    placement.join()

    again = SERVICE.on_start(placement.state, Context(now_s=placement.now_s, writer_epoch=2))

    assert any(isinstance(outcome, Timer) and isinstance(outcome.input, PlaceNext) for outcome in again)
    assert ["a"] == [replica.deployment.name for replica in proposal(placement.handle(PlaceNext())).replicas]


# --- Facts of others --------------------------------------------------------------------------------------------------


def test_zero_replicas_release_everything_and_one_places_anew_under_a_new_name() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 30))
    deployment_id = placement.id_of("a")

    (release,) = placement.scale(deployment_id, 0)

    assert isinstance(release, ReleaseProposed)
    assert ("a-d2-1", "scaled to zero: idle for 20 s") == (release.replica_id, release.reason)
    placement.release("a-d2-1")
    assert "a-d2-2" == proposal(placement.scale(deployment_id, 1)).replicas[0].replica_id


def test_back_from_cold_while_the_old_replica_is_being_released_waits_for_its_end() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 30))
    deployment_id = placement.id_of("a")
    placement.scale(deployment_id, 0)

    assert [] == placement.scale(deployment_id, 1)
    assert "a-d2-2" == proposal(placement.release("a-d2-1")).replicas[0].replica_id


def test_replicas_of_an_unknown_deployment_are_not_decided_here() -> None:
    assert [] == Placement().scale("d99", 1)


def test_a_lease_that_is_granted_after_its_deployment_was_retired_is_released_at_once() -> None:
    placement = Placement()
    placement.join()
    proposed = proposal(placement.deploy(spec("a", 30)))
    placement.state.deployments.clear()
    placement.state.derived = None

    (release,) = placement.grant(proposed)

    assert isinstance(release, ReleaseProposed)
    assert "its deployment was retired meanwhile" == release.reason


@pytest.mark.parametrize("is_granted", [True, False])
def test_a_replica_is_released_once(is_granted: bool) -> None:
    placement = Placement()
    placement.join()
    proposed = proposal(placement.deploy(spec("a", 30)))
    if is_granted:
        placement.grant(proposed)
    assert "ReleaseProposed" in kinds(placement.handle(RetireRequested(command_id="r", model="a")))

    assert "ReleaseProposed" not in kinds(placement.grant(proposed))

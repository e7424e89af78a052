"""What-if: the answer is what placement then does, and asking changes nothing."""

from kit.service import digest
from schemas.deployments import ShareSpec
from schemas.placement import PlacementProposed, ReasonCode
from schemas.queries import Plan, PlanDeployments, PlanVerdict
from schemas.units import GiB
from services.placement.packing.fleet import PARTS
from services.placement.state import Quota
from tests.unit.placement.builders import Placement, gpu, spec


def plan(placement: Placement, *wishes: object) -> Plan:
    answer: Plan = placement.ask(PlanDeployments(deployments=tuple(wishes)))  # type: ignore[arg-type]  # Specs.
    return answer


def two_gpus(**settings: object) -> Placement:
    placement = Placement(settings=dict(settings))
    placement.join(gpu("gpu-0"), gpu("gpu-1"))
    return placement


def test_a_plan_is_what_placement_then_does() -> None:
    placement = two_gpus()
    wishes = [spec("a", 50), spec("b", 50), spec("c", 20)]

    planned = plan(placement, *wishes)
    done = [
        fact for wish in wishes for fact in placement.deploy(wish) if isinstance(fact, PlacementProposed)
    ]  # In the same order.

    assert planned.has_room_for_all
    assert [(r.node, r.gpu_uuids) for d in planned.deployments for r in d.replicas] == [
        (fact.node, tuple(share.gpu_uuid for share in fact.replicas[0].shares)) for fact in done
    ]


def test_asking_changes_nothing() -> None:
    placement = two_gpus()
    placement.deploy(spec("a", 50))
    before = digest(placement.state)
    free = [room.free_units for room in placement.state.index.rooms.fleet]

    plan(placement, spec("b", 50), spec("c", 79), spec("huge", 500))

    assert digest(placement.state) == before
    assert [room.free_units for room in placement.state.index.rooms.fleet] == free
    assert placement.state.index.rooms.verdict(placement.state.index.demand_of("", spec("c", 79)), 200.0) is None


def test_what_has_no_place_says_how_much_is_missing_and_what_would_help() -> None:
    placement = two_gpus()
    placement.deploy(spec("a", 50, is_parkable=False))
    placement.deploy(spec("b", 50, is_parkable=False))

    (planned,) = plan(placement, spec("c", 40, is_parkable=False)).deployments

    assert planned.verdict is PlanVerdict.NEW
    assert planned.replicas == ()
    assert planned.missing_bytes == 10 * GiB
    assert planned.remedy
    assert [(c.code, c.gpu_count, c.short_by_bytes) for c in planned.constraints] == [
        (ReasonCode.NO_GPU_ROOM, 2, 10 * GiB)
    ]


def test_each_wish_is_planned_on_top_of_the_last() -> None:
    answer = plan(two_gpus(), *(spec(f"m{n}", 50, is_parkable=False) for n in range(3)))

    assert [len(planned.replicas) for planned in answer.deployments] == [1, 1, 0]
    assert not answer.has_room_for_all


def test_a_gang_that_does_not_fit_takes_nothing_from_who_comes_after() -> None:
    gang = spec("gang", 50, is_parkable=False, replica_count=3, placing={"is_gang": True})

    answer = plan(two_gpus(), gang, spec("b", 50, is_parkable=False), spec("c", 50, is_parkable=False))

    assert [len(planned.replicas) for planned in answer.deployments] == [0, 1, 1]
    assert answer.deployments[0].problem.startswith("2 of 3 replicas fit")


def test_who_could_give_way_is_not_spared_for_a_gang_that_does_not_fit() -> None:
    placement = two_gpus()
    for outcome in placement.deploy(spec("tune", 60, is_parkable=False, priority="low")):
        if isinstance(outcome, PlacementProposed):
            placement.grant(outcome)
    gang = spec("gang", 70, is_parkable=False, replica_count=3, placing={"is_gang": True})

    answer = plan(placement, gang, spec("b", 70, is_parkable=False), spec("c", 70, is_parkable=False))

    assert [len(planned.replicas) for planned in answer.deployments] == [0, 1, 1]
    assert [victim.model for victim in answer.deployments[2].replicas[0].victims] == ["tune"]


def test_what_is_deployed_already_is_unchanged_and_another_wish_replaces_it() -> None:
    placement = two_gpus()
    placement.deploy(spec("a", 50))

    same, other = plan(placement, spec("a", 50)).deployments, plan(placement, spec("a", 30)).deployments

    assert [same[0].verdict, other[0].verdict] == [PlanVerdict.UNCHANGED, PlanVerdict.REPLACED]
    assert [replica.node for replica in same[0].replicas] == ["node-0"]


def test_an_unsound_wish_is_rejected_with_its_reasons() -> None:
    wish = spec("a", 50)
    unsound = type(wish)(name="a", engine=wish.engine, share=ShareSpec())

    (planned,) = plan(two_gpus(), unsound).deployments

    assert planned.verdict is PlanVerdict.REJECTED
    assert "exactly one of request_portion and request_bytes" in planned.problem


def test_who_would_give_way_is_named() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    for outcome in placement.deploy(spec("tune", 60, is_parkable=False, priority="low")):
        if isinstance(outcome, PlacementProposed):
            placement.grant(outcome)

    (planned,) = plan(placement, spec("chat", 60, is_parkable=False, priority="very-high")).deployments

    (replica,) = planned.replicas
    assert replica.codes == (ReasonCode.ROOM_BY_PREEMPTION,)
    assert [victim.model for victim in replica.victims] == ["tune"]
    assert placement.state.claims == {}


def test_the_rest_of_a_quota_is_counted_over_the_plan() -> None:
    placement = two_gpus()
    placement.state.quotas["default"] = Quota(tenant="default", parts=PARTS, over_quota_weight=1.0)
    wishes = [spec(f"m{n}", 50, is_parkable=False, priority="very-high") for n in range(2)]

    first, second = plan(placement, *wishes).deployments

    assert (first.problem, second.codes) == ("", (ReasonCode.OVER_QUOTA,))

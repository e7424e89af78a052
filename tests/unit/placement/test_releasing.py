"""Many replicas that nobody wants any more: as many in one input as one append may hold, and no one is forgotten."""

from kit.outcomes import Context, Outcome, Timer
from schemas.inbox import RetireRequested
from schemas.placement import ReleaseProposed
from services.placement.core import SERVICE
from services.placement.placing import ReleaseNext
from tests.unit.placement.builders import Placement, gpu, spec


def crowd() -> tuple[Placement, str]:
    """Five replicas, of which one input may decide two."""
    placement = Placement(settings={"placed_per_input_count": 2})
    placement.join(*(gpu(f"gpu-{number}") for number in range(5)))
    placement.deploy(spec("a", 50, is_parkable=False, replica_count=5))
    assert 5 == len(placement.state.replicas)
    return placement, placement.id_of("a")


def released(outcomes: list[Outcome]) -> list[str]:
    return [outcome.replica_id for outcome in outcomes if isinstance(outcome, ReleaseProposed)]


def rest_of(outcomes: list[Outcome]) -> list[ReleaseNext]:
    return [o.input for o in outcomes if isinstance(o, Timer) and isinstance(o.input, ReleaseNext)]


def test_all_of_a_retired_crowd_are_released_some_in_each_input() -> None:
    placement, deployment_id = crowd()

    seen = placement.handle(RetireRequested(command_id="r", model="a"))
    counts = [len(released(seen))]
    ids = released(seen)
    while due := rest_of(seen):
        seen = placement.handle(due[0])
        counts.append(len(released(seen)))
        ids += released(seen)

    assert [2, 2, 1] == counts
    assert [f"a-{deployment_id}-{number}" for number in range(1, 6)] == ids


def test_scaling_down_goes_on_until_the_wish_is_met_and_stops_when_it_grows() -> None:
    placement, deployment_id = crowd()

    first = placement.scale(deployment_id, 1)
    placement.scale(deployment_id, 3)
    second = placement.handle(rest_of(first)[0])

    assert [2, 0] == [len(released(first)), len(released(second))]
    assert not rest_of(second)


def test_a_new_instance_goes_on_with_what_the_old_one_had_begun() -> None:
    placement, deployment_id = crowd()
    placement.handle(RetireRequested(command_id="r", model="a"))

    begun = SERVICE.on_start(placement.state, Context(now_s=placement.now_s, writer_epoch=2, cause_seq=0))

    assert [deployment_id] == [due.deployment_id for due in rest_of(list(begun))]

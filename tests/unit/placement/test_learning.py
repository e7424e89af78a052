"""Policies learn what is asked for from the deployments that there are."""

from schemas.units import GiB
from services.placement.packing.potential import Potential
from services.placement.rooms import Rooms
from services.placement.state import ClusterState
from tests.unit.placement.builders import Placement, gpu, spec


def known_counts(rooms: Rooms) -> dict[int, int]:
    """What the default policy was told: {bytes that each replica asks for: weight}."""
    policy = rooms.packer(spreads_nodes=False).policy
    assert isinstance(policy, Potential)
    return {ask.size_units or 0: weight for ask, weight in policy.typical}


def rooms_of(placement: Placement) -> Rooms:
    state = placement.state
    assert isinstance(state, ClusterState)
    return state.index.rooms


def test_each_replica_that_there_should_be_counts_placed_or_not() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.deploy(spec("a", 30))
    placement.deploy(spec("b", 60))
    placement.scale(placement.id_of("b"), 3)

    assert {60 * GiB: 7500, 30 * GiB: 2500} == known_counts(rooms_of(placement))


def test_deployments_that_came_before_the_first_node_count_too() -> None:
    placement = Placement()
    placement.deploy(spec("a", 30))
    placement.join(gpu("gpu-0"))

    assert {30 * GiB: 10_000} == known_counts(rooms_of(placement))


def test_a_deployment_that_is_gone_does_not_count() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.deploy(spec("a", 30))
    placement.deploy(spec("b", 60))
    rooms = rooms_of(placement)
    assert 2 == len(known_counts(rooms))

    rooms.wish(placement.id_of("a"), None, 0)

    assert {60 * GiB: 10_000} == known_counts(rooms)
    rooms.wish(placement.id_of("a"), None, 0)
    assert {60 * GiB: 10_000} == known_counts(rooms), "once is enough"


def test_nodes_that_come_later_change_nothing_about_what_is_asked_for() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.deploy(spec("a", 30))
    rooms = rooms_of(placement)
    assert {30 * GiB: 10_000} == known_counts(rooms)

    placement.join(gpu("gpu-1"), node="node-1")
    placement.deploy(spec("b", 30))
    placement.join(gpu("gpu-2"), node="node-2")

    assert {30 * GiB: 10_000} == known_counts(rooms)
    placement.scale(placement.id_of("a"), 0)
    placement.scale(placement.id_of("b"), 0)
    assert {} == known_counts(rooms)

"""`choose`: the tightest GPU that has room, else the least promised one that can be shared by turns."""

import pytest

from schemas.placement import ReasonCode
from schemas.units import GiB
from services.placement.choosing import Choice, NoChoice, choose
from services.placement.demands import limit_bytes_on, request_bytes_on
from tests.unit.placement.builders import Placement, gpu, spec


def choice(placement: Placement, *args: object, **values: object) -> Choice:
    found = choose(placement.state, spec(*args, **values), now_s=0.0)  # type: ignore[arg-type]  # Passed through as they are.
    assert isinstance(found, Choice), found
    return found


def test_portions_are_of_what_can_be_given_so_that_two_halves_fit() -> None:
    offer = gpu("gpu-0", allocatable_gib=80)

    assert 40 * GiB == request_bytes_on(offer, spec("a", portion=0.5).share)
    assert 80 * GiB == request_bytes_on(offer, spec("a", portion=1.0).share)


@pytest.mark.parametrize(("limit_gib", "expected_gib"), [(None, 30), (50, 50), (500, 80)])
def test_a_limit_lies_between_the_request_and_the_gpu(limit_gib: int | None, expected_gib: int) -> None:
    assert expected_gib * GiB == limit_bytes_on(gpu("gpu-0"), spec("a", 30, limit_gib=limit_gib).share)


def test_partly_used_gpus_are_filled_before_a_fresh_one_is_touched() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))
    placement.placed(spec("a", 30))

    assert "gpu-0" == choice(placement, "b", 40).gpu_uuids[0]


def test_the_tightest_fit_wins() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", allocatable_gib=80), gpu("gpu-1", allocatable_gib=40), gpu("gpu-2", allocatable_gib=20))

    chosen = choice(placement, "a", 30)

    assert "gpu-1" == chosen.gpu_uuids[0]


def test_ties_go_to_the_smaller_name_whatever_the_order_of_joining() -> None:
    placement = Placement()
    placement.join(gpu("gpu-7"), node="node-1")
    placement.join(gpu("gpu-9"), node="node-0")

    assert "gpu-9" == choice(placement, "a", 30).gpu_uuids[0]


def test_when_no_gpu_has_room_for_all_the_least_promised_one_is_shared_by_turns() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))
    placement.placed(spec("a", 70))
    placement.placed(spec("b", 60))

    chosen = choice(placement, "c", 50)

    assert ("gpu-1", "shares by taking turns: requests exceed the GPU by 30.0 GiB") == (
        chosen.gpu_uuids[0],
        chosen.reason,
    )


def test_what_never_parks_is_not_put_where_it_would_keep_another_from_its_return() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 70))

    assert isinstance(choose(placement.state, spec("fixed", 20, is_parkable=False), now_s=0.0), NoChoice)
    assert isinstance(choose(placement.state, spec("fixed", 10, is_parkable=False), now_s=0.0), Choice)


def test_residues_bound_how_many_can_take_turns() -> None:
    """79 + 1 fill the GPU; a second one's residue of 1 has no room beside the larger share."""
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 80))

    missing = choose(placement.state, spec("b", 40), now_s=0.0)

    assert isinstance(missing, NoChoice)
    assert GiB == missing.missing_bytes


def test_a_replica_that_failed_for_good_holds_no_place() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("fixed", 60, is_parkable=False))
    placement.fail("fixed-d2-1")

    assert "room beside all requests: 20.0 GiB left to promise" == choice(placement, "b", 60).reason


def test_nodes_that_refused_are_left_out_with_that_reason() -> None:
    placement = Placement()
    placement.join(node="node-0")
    placement.join(gpu("gpu-1"), node="node-1")

    chosen = choose(placement.state, spec("a", 30), now_s=0.0, refused_nodes=("node-0",))
    missing = choose(placement.state, spec("a", 30), now_s=0.0, refused_nodes=("node-0", "node-1"))

    assert isinstance(chosen, Choice)
    assert "node-1" == chosen.node
    assert isinstance(missing, NoChoice)
    assert (ReasonCode.NODE_REFUSED,) == missing.codes

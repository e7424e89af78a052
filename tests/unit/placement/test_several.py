"""Several replicas, several GPUs for each, and all that narrows where they go."""

from typing import Any

import pytest

from schemas.deployments import AntiAffinity, DeploymentSpec, HostSpec, Strategy
from schemas.gateways import LoadSampled, ModelLoad
from schemas.inbox import RetireRequested
from schemas.placement import FailureReason, PlacementProposed, ReasonCode, ReleaseProposed
from schemas.units import GiB
from services.placement.core import SERVICE
from services.placement.gangs import PlaceNext
from tests.unit.placement.builders import Placement, failure, gpu, kinds, proposal, spec


def placed_on(placement: Placement, wish: DeploymentSpec) -> list[tuple[str, ...]]:
    """Deploy it; the GPUs of each of its replicas, in the order of their names."""
    placement.deploy(wish)
    return [replica.gpu_uuids for replica in placement.state.replicas_of(placement.id_of(wish.name))]


def test_all_replicas_of_a_deployment_are_placed_in_one_input() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))

    proposed = proposal(placement.deploy(spec("a", 40, replica_count=3)))

    assert ["a-d2-1", "a-d2-2", "a-d2-3"] == [replica.replica_id for replica in proposed.replicas]
    assert ["gpu-0", "gpu-0", "gpu-1"] == [replica.shares[0].gpu_uuid for replica in proposed.replicas]


def test_what_fits_is_placed_and_the_rest_is_explained() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))

    outcomes = placement.deploy(spec("a", 50, is_parkable=False, replica_count=2))

    assert 1 == len(proposal(outcomes).replicas)
    assert (FailureReason.NO_GPU_HAS_ROOM, 20 * GiB) == (failure(outcomes).reason, failure(outcomes).missing_bytes)


def test_fewer_replicas_release_those_that_serve_least_and_more_are_placed() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))
    placement.placed(spec("a", 20, replica_count=3))
    deployment_id = placement.id_of("a")

    released = placement.scale(deployment_id, 1)

    assert ["a-d2-2", "a-d2-3"] == [o.replica_id for o in released if isinstance(o, ReleaseProposed)]
    assert [] == placement.scale(deployment_id, 1)
    for replica_id in ("a-d2-2", "a-d2-3"):
        placement.release(replica_id)
    assert ["a-d2-4"] == [r.replica_id for r in proposal(placement.scale(deployment_id, 2)).replicas]


def test_a_replica_on_several_gpus_has_a_share_of_each_all_on_one_node() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), node="node-0")
    placement.join(gpu("gpu-1"), gpu("gpu-2", allocatable_gib=40), node="node-1")

    proposed = proposal(placement.deploy(spec("wide", portion=0.5, gpu_count=2)))

    (replica,) = proposed.replicas
    assert ("node-1", [0, 1]) == (proposed.node, [share.shard_index for share in replica.shares])
    assert [("gpu-1", 40 * GiB), ("gpu-2", 20 * GiB)] == [(s.gpu_uuid, s.request_bytes) for s in replica.shares]


def test_better_linked_gpus_are_preferred() -> None:
    placement = Placement()
    fast = {"gpu-1": {"gpu-3": 9e11}, "gpu-3": {"gpu-1": 9e11}}
    placement.join(*(gpu(f"gpu-{n}", peers=fast.get(f"gpu-{n}", {f"gpu-{n ^ 2}": 1e9})) for n in range(4)))

    assert [("gpu-1", "gpu-3")] == placed_on(placement, spec("wide", 30, gpu_count=2))


def test_too_few_gpus_on_every_node_is_explained() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))

    failed = failure(placement.deploy(spec("wide", 30, gpu_count=2)))

    assert (FailureReason.CONSTRAINTS, ReasonCode.TOO_FEW_GPUS) == (failed.reason, failed.codes[0])


@pytest.mark.parametrize(
    ("placing", "expected"),
    [
        ({"gpu_models": ("b200", "a100")}, "gpu-1"),
        ({"node_labels": {"zone": "east"}}, "gpu-2"),
        ({}, "gpu-0"),
    ],
)
def test_models_by_a_part_of_the_name_and_labels_narrow_the_choice(placing: dict[str, Any], expected: str) -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", name="NVIDIA H100 80GB HBM3"), node="node-0", labels={"zone": "west"})
    placement.join(gpu("gpu-1", name="NVIDIA A100-SXM4-80GB"), node="node-1")
    placement.join(gpu("gpu-2", name="NVIDIA H100 80GB HBM3"), node="node-2", labels={"zone": "east"})

    assert [(expected,)] == placed_on(placement, spec("a", 30, placing=placing))


def test_a_model_that_nobody_has_is_explained_and_placed_when_it_comes() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))

    failed = failure(placement.deploy(spec("a", 30, placing={"gpu_models": ("B200",)})))

    assert (FailureReason.CONSTRAINTS, ReasonCode.GPU_MODEL) == (failed.reason, failed.codes[0])
    assert "PlacementProposed" in kinds(placement.join(gpu("gpu-1", name="NVIDIA B200"), node="node-1"))


def test_what_a_host_did_not_tell_is_not_there_for_those_who_ask() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), node="node-0")
    wish = spec("a", 10, replica_count=3, host=HostSpec(cpu_millicores=4000, memory_bytes=10 * GiB))

    assert ReasonCode.NO_HOST_CPU == failure(placement.deploy(wish)).codes[0]

    told = placement.join(gpu("gpu-1"), node="node-1", cpu_millicores=9000, memory_bytes=100 * GiB)

    assert 2 == len(proposal(told).replicas)
    assert FailureReason.NO_HOST_CPU == failure(told).reason


@pytest.mark.parametrize(
    ("placing", "expected"),
    [
        ({"anti_affinity": AntiAffinity.GPU}, [("gpu-0",), ("gpu-1",), ("gpu-2",)]),
        ({"anti_affinity": AntiAffinity.NODE}, [("gpu-0",), ("gpu-2",)]),
        ({"node_strategy": Strategy.SPREAD}, [("gpu-0",), ("gpu-1",), ("gpu-0",)]),
        ({"gpu_strategy": Strategy.SPREAD}, [("gpu-0",), ("gpu-1",), ("gpu-0",)]),
        ({}, [("gpu-0",), ("gpu-0",), ("gpu-0",)]),
    ],
)
def test_replicas_keep_apart_as_far_as_is_asked(placing: dict[str, Any], expected: list[tuple[str, ...]]) -> None:
    placement = Placement(settings={"policy": "first-fit"})
    placement.join(gpu("gpu-0"), gpu("gpu-1"), node="node-0")
    placement.join(gpu("gpu-2"), node="node-1")

    found = placed_on(placement, spec("a", 20, is_parkable=False, replica_count=3, placing=placing))

    assert sorted(expected) == sorted(found)


def test_anti_affinity_that_leaves_no_place_is_explained() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))

    outcomes = placement.deploy(spec("a", 20, replica_count=2, placing={"anti_affinity": AntiAffinity.GPU}))

    assert 1 == len(proposal(outcomes).replicas)
    assert ReasonCode.ANTI_AFFINITY == failure(outcomes).codes[0]


def test_memory_of_strangers_counts_as_taken_and_is_named_when_it_alone_is_in_the_way() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", foreign_gib=30))

    failed = failure(placement.deploy(spec("a", 60)))

    assert (ReasonCode.FOREIGN_MEMORY, 10 * GiB) == (failed.codes[0], failed.missing_bytes)
    assert "end the processes that are not ours and use 10.0 GiB of it" == failed.remedy
    assert "PlacementProposed" in kinds(placement.join(gpu("gpu-0", foreign_gib=20)))


def test_portions_do_not_shrink_with_what_strangers_use() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0", foreign_gib=20))

    assert 40 * GiB == proposal(placement.deploy(spec("a", portion=0.5))).replicas[0].shares[0].request_bytes


# --- Turns ------------------------------------------------------------------------------------------------------------


def load(deployment_id: str, *, is_busy: bool) -> ModelLoad:
    return ModelLoad(
        deployment_id=deployment_id,
        in_flight_count=int(is_busy),
        waiting_count=0,
        arrived_count=0,
        last_arrival_s=0.0,
    )


def loads(placement: Placement, busy: list[str], idle: list[str], *, lasts_s: int, gateway: str = "g") -> None:
    """One gateway's samples, one a second."""
    for _ in range(lasts_s):
        placement.now_s += 1.0
        models = tuple(load(placement.id_of(name), is_busy=name in busy) for name in (*busy, *idle))
        sample = LoadSampled(gateway=gateway, models=models)
        SERVICE.observers[LoadSampled](placement.state, sample, placement.now_s)


def test_models_that_are_in_use_all_the_time_do_not_take_turns() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.placed(spec("a", 70))
    loads(placement, ["a"], [], lasts_s=3600)

    failed = failure(placement.deploy(spec("b", 60)))

    assert (FailureReason.NO_GPU_HAS_ROOM, ReasonCode.TURNS_TAKEN) == (failed.reason, failed.codes[0])


def test_models_that_are_seldom_in_use_do_and_what_was_refused_is_tried_again_after_a_while() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.placed(spec("a", 70))
    loads(placement, ["a"], [], lasts_s=3600)
    placement.deploy(spec("b", 60))

    loads(placement, [], ["a"], lasts_s=3600)

    proposed = placement.handle(PlaceNext())[0]
    assert isinstance(proposed, PlacementProposed)
    assert (ReasonCode.TAKES_TURNS,) == proposed.codes


def test_a_model_of_which_nobody_spoke_lately_counts_as_used_as_much_as_is_assumed() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.placed(spec("a", 70))
    loads(placement, [], ["a"], lasts_s=3600)
    uses, settings, its = placement.state.observed.uses, placement.state.settings, placement.id_of("a")

    assert uses.part_of(its, placement.now_s, settings) < 0.01
    assert settings.assumed_use_fraction == uses.part_of(its, placement.now_s + 3600, settings)
    assert settings.assumed_use_fraction == uses.part_of("unknown", placement.now_s, settings)


def test_a_gateway_that_is_gone_keeps_no_model_in_use() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.placed(spec("a", 70))
    loads(placement, ["a"], [], lasts_s=600)
    its = placement.id_of("a")

    loads(placement, [], ["a"], lasts_s=3600, gateway="another")

    assert placement.state.observed.uses.part_of(its, placement.now_s, placement.state.settings) < 0.01


def test_nothing_is_kept_about_deployments_that_are_gone() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.placed(spec("a", 70))
    loads(placement, ["a"], [], lasts_s=1)
    sample = LoadSampled(gateway="g", models=(load("unknown", is_busy=True),))
    SERVICE.observers[LoadSampled](placement.state, sample, placement.now_s)

    placement.handle(RetireRequested(command_id="r", model="a"))

    assert not placement.state.observed.uses.by_deployment


def test_always_resident_ones_never_take_turns_with_one_another() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.placed(spec("a", 50, is_parkable=False))

    assert FailureReason.NO_GPU_HAS_ROOM == failure(placement.deploy(spec("b", 40, is_parkable=False))).reason

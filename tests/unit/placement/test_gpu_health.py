"""GPUs that misbehave, strangers on them, and MIG instances, as placement takes them."""

from typing import Any

from msgspec.structs import replace

from schemas.inbox import GpuCloseRequested, GpuReinstateRequested
from schemas.nodes import GpuObserved, GpuOffer, GpuQuarantined, GpuReinstated
from schemas.placement import GpuCloseAsked, GpuReinstateAsked, PlacementFailed, PlacementProposed, ReasonCode
from schemas.queries import Explain, ListNodes, PlanDeployments
from schemas.units import GiB
from services.placement.index import Index
from tests.unit.placement.builders import Placement, failure, gpu, kinds, message, proposal, spec, verdict

NODE = "node-0"


def quarantined(uuid: str = "gpu-0") -> GpuQuarantined:
    return GpuQuarantined(node=NODE, at_s=1.0, gpu_uuid=uuid, reason="XID 95", fault_count=1, quarantine_s=60.0)


def well(uuid: str = "gpu-0") -> GpuReinstated:
    return GpuReinstated(node=NODE, at_s=1.0, gpu_uuid=uuid, away_s=60.0)


def strangers(gib: int, uuid: str = "gpu-0") -> GpuObserved:
    return GpuObserved(node=NODE, at_s=1.0, gpu_uuid=uuid, foreign_bytes=gib * GiB, used_fraction=0.5)


def mig(uuid: str, gib: int = 20) -> GpuOffer:
    return replace(gpu(uuid, allocatable_gib=gib, name="H100 MIG 2g.20gb"), is_mig=True)


def numbers(placement: Placement, index: Index) -> dict[str, Any]:
    """What each GPU has left."""
    rooms = index.rooms
    return {
        f"{node}/{uuid}": (room.free_units[at], rooms.accounts[node][at].allocatable_bytes, rooms.is_taken(node, at))
        for node, room in rooms.fleet.nodes.items()
        for at, uuid in enumerate(rooms.gpu_uuids[node])
    }


def is_kept(placement: Placement) -> bool:
    """The numbers that folds kept up equal those that are made anew."""
    return numbers(placement, placement.state.index) == numbers(placement, Index(placement.state))


# --- Quarantine -------------------------------------------------------------------------------------------------------


def test_nothing_new_goes_to_a_quarantined_gpu() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))
    placement.handle(quarantined("gpu-1"))

    places = [proposal(placement.deploy(spec(name, 30))).replicas[0].shares[0].gpu_uuid for name in "ab"]

    assert ["gpu-0", "gpu-0"] == places
    assert is_kept(placement)


def test_who_finds_only_quarantined_gpus_is_told_so_and_placed_when_one_is_well() -> None:
    placement = Placement()
    placement.join()
    placement.handle(quarantined())

    told = failure(placement.deploy(spec("a", 30)))
    explained = placement.ask(Explain(model="a"))

    assert ReasonCode.GPU_QUARANTINED == told.codes[0]
    assert "it is quarantined: XID 95" in told.message
    assert "sublet gpu reinstate" in explained.remedy
    assert ["PlacementProposed"] == kinds(placement.handle(well()))
    assert is_kept(placement)


def test_a_plan_counts_with_quarantines() -> None:
    placement = Placement()
    placement.join()
    placement.handle(quarantined())

    (planned,) = placement.ask(PlanDeployments(deployments=(spec("a", 30),))).deployments

    assert ReasonCode.GPU_QUARANTINED == planned.codes[0]


def test_what_is_on_a_quarantined_gpu_keeps_its_place() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 30))

    placement.handle(quarantined())

    assert 1 == placement.state.placed_count(placement.id_of("a"))
    assert is_kept(placement)


def test_nobody_is_displaced_for_a_place_on_a_quarantined_gpu() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 70, is_parkable=False, priority="low", is_preemptible=True))
    placement.handle(quarantined())

    assert ["PlacementFailed"] == [kind for kind in kinds(placement.deploy(spec("b", 60))) if "Placement" in kind]


def test_a_node_that_joins_again_tells_what_is_quarantined() -> None:
    placement = Placement()
    placement.join(replace(gpu("gpu-0"), quarantine_reason="XID 95"))

    assert ReasonCode.GPU_QUARANTINED == failure(placement.deploy(spec("a", 30))).codes[0]


def test_nodes_are_listed_with_what_is_wrong_with_their_gpus() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), mig("MIG-1"))
    placement.handle(quarantined())
    placement.handle(strangers(3))

    whole, part = placement.ask(ListNodes()).nodes[0].gpus

    assert ("XID 95", 3 * GiB, False) == (whole.quarantine_reason, whole.foreign_bytes, whole.is_mig)
    assert part.is_mig


# --- An operator opens it ---------------------------------------------------------------------------------------------


def test_an_operators_word_goes_to_the_node() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))
    placement.handle(quarantined())

    (asked, _) = placement.handle(GpuReinstateRequested(command_id="1", node=NODE, gpu_uuid="gpu"))

    assert isinstance(asked, GpuReinstateAsked)
    assert (NODE, "gpu-0") == (asked.node, asked.gpu_uuid)


def test_only_the_operator_opens_gpus_and_only_those_that_are_closed() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))

    unclear = placement.handle(GpuReinstateRequested(command_id="1", node=NODE, gpu_uuid="gpu"))
    open_one = placement.handle(GpuReinstateRequested(command_id="2", node=NODE, gpu_uuid="gpu-0"))
    placement.tenant = "somebody"
    stranger = placement.handle(GpuReinstateRequested(command_id="3", node=NODE, gpu_uuid="gpu-0"))

    assert ("CommandRejected", "rejected", "SUB-OPR-002") == verdict(unclear)
    assert ("CommandDuplicated", "duplicate", "") == verdict(open_one)
    assert ("CommandRejected", "rejected", "SUB-OPR-001") == verdict(stranger)


def test_an_operator_closes_a_gpu_that_is_well() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"))

    outcomes = placement.handle(GpuCloseRequested(command_id="1", node=NODE, gpu_uuid="gpu", reason="a new fan"))

    asked = outcomes[0]
    assert isinstance(asked, GpuCloseAsked)
    assert (NODE, "gpu-0", False, "a new fan") == (asked.node, asked.gpu_uuid, asked.is_draining, asked.reason)
    assert "node-0/gpu0 takes no new replicas until it is reinstated" == message(outcomes)


def test_only_the_operator_closes_gpus_and_only_one_at_a_time() -> None:
    placement = Placement()
    placement.join(gpu("gpu-0"), gpu("gpu-1"))

    unclear = placement.handle(GpuCloseRequested(command_id="1", node=NODE, gpu_uuid="gpu"))
    placement.tenant = "somebody"
    stranger = placement.handle(GpuCloseRequested(command_id="2", node=NODE, gpu_uuid="gpu-0"))

    assert ("CommandRejected", "rejected", "SUB-OPR-002") == verdict(unclear)
    assert ("CommandRejected", "rejected", "SUB-OPR-001") == verdict(stranger)


# --- Strangers --------------------------------------------------------------------------------------------------------


def test_what_strangers_use_counts_as_taken_and_their_leaving_is_an_occasion() -> None:
    placement = Placement()
    placement.join()
    placement.handle(strangers(60))

    told = failure(placement.deploy(spec("a", 30)))

    assert ReasonCode.FOREIGN_MEMORY == told.codes[0]
    assert ["PlacementProposed"] == kinds(placement.handle(strangers(10)))
    assert is_kept(placement)


def test_strangers_beyond_what_is_left_take_no_place_away() -> None:
    placement = Placement()
    placement.join()
    placement.placed(spec("a", 60, is_parkable=False))

    placement.handle(strangers(70))

    assert 1 == placement.state.placed_count(placement.id_of("a"))
    assert is_kept(placement)


# --- MIG --------------------------------------------------------------------------------------------------------------


def test_a_mig_instance_takes_one_replica_whatever_it_leaves_of_it() -> None:
    placement = Placement()
    placement.join(mig("MIG-1"), mig("MIG-2"))

    places = [placement.placed(spec(name, 5)).replicas[0].shares[0].gpu_uuid for name in "ab"]
    told = failure(placement.deploy(spec("c", 5)))

    assert {"MIG-1", "MIG-2"} == set(places)
    assert ReasonCode.MIG_TAKEN == told.codes[0]
    assert is_kept(placement)


def test_a_mig_instance_is_free_again_when_its_replica_is_gone() -> None:
    placement = Placement()
    placement.join(mig("MIG-1"))
    first = placement.placed(spec("a", 5))
    placement.deploy(spec("b", 5))

    placement.scale(placement.id_of("a"), 0)
    told = placement.release(first.replicas[0].replica_id)

    assert ["PlacementProposed"] == [type(t).__name__ for t in told if isinstance(t, PlacementProposed)]
    assert is_kept(placement)


def test_several_replicas_in_one_input_get_a_mig_instance_each() -> None:
    placement = Placement()
    placement.join(mig("MIG-1"), mig("MIG-2"))

    told = placement.deploy(spec("a", 5, replica_count=3))

    proposed = [
        share.gpu_uuid for t in told if isinstance(t, PlacementProposed) for r in t.replicas for share in r.shares
    ]
    assert {"MIG-1", "MIG-2"} == set(proposed)
    assert 2 == len(proposed)
    assert 1 == len([t for t in told if isinstance(t, PlacementFailed)])
    assert is_kept(placement)


def test_a_replica_over_several_gpus_goes_to_no_mig_instances() -> None:
    """A process can use one of them."""
    placement = Placement()
    placement.join(mig("MIG-1"), mig("MIG-2"), gpu("gpu-3"))

    assert ReasonCode.GPU_MODEL in failure(placement.deploy(spec("a", 5, gpu_count=2))).codes

    placement.join(gpu("gpu-4"), gpu("gpu-5"), node="node-1")
    assert ["node-1"] == [replica.node for replica in placement.state.replicas.values()]

"""What a run's facts come to: wakes, parks, and how many models the GPUs hold at once."""

from typing import Any

from benchmarks.history import Tally
from schemas.deployments import DeploymentSpec, EngineSpec, IsolationGrade, ShareSpec
from schemas.nodes import (
    GpuOffer,
    Lease,
    LeaseGranted,
    NodeJoined,
    Ready,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
)
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB

GPU = "GPU-0"


def joined(*, gib: int) -> NodeJoined:
    offer = GpuOffer(
        gpu_uuid=GPU,
        index=0,
        name="H100",
        capacity_bytes=(gib + 2) * GiB,
        reserve_bytes=2 * GiB,
        grade=IsolationGrade.WATCHED,
        grade_reason="",
        link_bytes_per_s=1e9,
        is_software=True,
    )
    return NodeJoined(
        node="n", at_s=0.0, machine_id="x", gpus=(offer,), host_budget_bytes=0, holder_url="", label="software GPU"
    )


def granted(model: str, *, share_gib: int, residue_gib: int) -> LeaseGranted:
    spec = DeploymentSpec(name=model, engine=EngineSpec(weights_bytes=GiB), share=ShareSpec(request_portion=0.3))
    share = ShareProposal(
        replica_id=model, shard_index=0, gpu_uuid=GPU, request_bytes=share_gib * GiB, limit_bytes=share_gib * GiB
    )
    proposal = ReplicaProposal(
        replica_id=model, deployment_id=f"d-{model}", tenant="default", deployment=spec, shares=(share,)
    )
    lease = Lease(
        replica_id=model,
        shard_index=0,
        gpu_uuid=GPU,
        request_bytes=share_gib * GiB,
        granted_bytes=share_gib * GiB,
        limit_bytes=share_gib * GiB,
        residue_bytes=residue_gib * GiB,
        lease_epoch=1,
    )
    return LeaseGranted(node="n", at_s=0.0, proposal_id=model, leases=(lease,), replicas=(proposal,))


def names(model: str) -> dict[str, Any]:
    return {"replica_id": model, "deployment_id": f"d-{model}", "model": model, "node": "n"}


def ready(model: str) -> ReplicaReady:
    replica = Ready(
        replica_id=model,
        deployment_id=f"d-{model}",
        model=model,
        endpoint="",
        wake_epoch=1,
        start_s=1.0,
        enforced_bytes=0,
    )
    return ReplicaReady(node="n", at_s=0.0, replicas=(replica,))


def parked(model: str, *, residue_gib: int = 1) -> ReplicaParked:
    return ReplicaParked(
        **names(model),
        at_s=0.0,
        wake_epoch=2,
        residue_bytes=residue_gib * GiB,
        host_bytes=0,
        copied_bytes=0,
        park_s=0.1,
        drain_s=0.0,
        reason="",
    )


def resident(model: str, *, wake_s: float) -> ReplicaResident:
    return ReplicaResident(
        **names(model),
        at_s=0.0,
        wake_epoch=2,
        endpoint="",
        copied_bytes=0,
        reserve_s=0.0,
        restore_s=wake_s,
        verify_s=0.0,
        wake_s=wake_s,
    )


def tally_of(*facts: object) -> Tally:
    tally = Tally()
    for fact in facts:
        tally.fold(fact)  # type: ignore[arg-type]  # All are messages.
    return tally


def test_wakes_parks_and_the_most_residents_at_once_are_counted_from_the_restart_on() -> None:
    grants = [granted(model, share_gib=24, residue_gib=1) for model in "abc"]
    tally = tally_of(joined(gib=78), *grants, *(ready(model) for model in "abc"), *(parked(model) for model in "abc"))
    assert (3, 0, 3) == (tally.ready_count, tally.resident_count, tally.counts.resident_max_count)

    tally.restart()
    for fact in (resident("a", wake_s=0.5), resident("b", wake_s=0.7), parked("a"), resident("c", wake_s=0.6)):
        tally.fold(fact)

    assert [0.5, 0.7, 0.6] == tally.counts.wakes_s
    assert (1, 2, 0) == (tally.counts.park_count, tally.counts.resident_max_count, tally.counts.cold_start_count)


def test_an_engine_that_failed_is_resident_no_more_and_its_reason_is_kept() -> None:
    tally = tally_of(joined(gib=78), granted("a", share_gib=24, residue_gib=1), ready("a"))

    tally.fold(ReplicaFailed(**names("a"), at_s=0.0, reason="it ended", attempt_count=1, is_final=False, wake_epoch=2))

    assert (0, 1) == (tally.resident_count, tally.counts.failed_count)
    assert ["a: it ended"] == tally.problems


def test_residues_of_parked_engines_take_the_room_of_residents() -> None:
    """78 GiB: three shares of 24 beside each other, but only two beside ten residues of 1 GiB."""
    grants = [granted(f"m{number}", share_gib=24, residue_gib=1) for number in range(12)]
    tally = tally_of(joined(gib=78), *grants)

    assert 2 == tally.resident_possible_count(residues_count=True)
    assert 3 == tally.resident_possible_count(residues_count=False)


def test_no_more_can_be_resident_than_there_are() -> None:
    tally = tally_of(joined(gib=78), granted("a", share_gib=24, residue_gib=1))

    assert 1 == tally.resident_possible_count(residues_count=False)

"""Facts of node agents: what a host has, what it granted, and what its replicas do."""

from enum import StrEnum
from typing import ClassVar

from msgspec import Struct, field

from schemas.deployments import IsolationGrade
from schemas.messages import NODE_WRITER, Fact, Signal
from schemas.placement import ReplicaProposal
from schemas.units import (
    Bytes,
    Count,
    Epoch,
    Fraction,
    Identifier,
    ModelName,
    Name,
    Seconds,
    UnixSeconds,
    spread_evenly,
)


class NodeFact(Fact, frozen=True):
    writer: ClassVar[str] = NODE_WRITER

    node: Name
    at_s: UnixSeconds


class GpuOffer(Struct, frozen=True, kw_only=True):
    """One GPU as its node offers it."""

    gpu_uuid: str
    index: int
    name: str
    capacity_bytes: Bytes
    reserve_bytes: Bytes
    """Kept free always: what leases cannot see. Portions are of `allocatable_bytes`."""
    foreign_bytes: Bytes = 0
    """Used by processes that are not ours; counts as taken."""
    grade: IsolationGrade
    grade_reason: str
    link_bytes_per_s: float
    is_software: bool
    peer_bytes_per_s: dict[str, float] = {}
    """{gpu_uuid: rate of the direct link to that GPU of the same node}; one that is not named has no direct link."""

    @property
    def allocatable_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.reserve_bytes - self.foreign_bytes)


class NodeJoined(NodeFact, frozen=True, tag="nodes.joined.v1"):
    """The node offers these GPUs; sent at each start of its agent and when what it has changes."""

    machine_id: str
    gpus: tuple[GpuOffer, ...]
    host_budget_bytes: Bytes
    """Host memory for parked weights."""
    holder_url: str
    """Where gateways get their route leases."""
    label: str
    """``software GPU`` or ``real GPU``; shown beside every figure."""
    cpu_millicores: Count | None = None
    """What replicas may ask of the host's CPU; None: the node did not tell, so nothing that asks for it goes there."""
    memory_bytes: Bytes | None = None
    """What replicas may ask of the host's memory, the budget for parked weights not included; None: not told."""
    labels: dict[str, str] = field(default_factory=dict)
    """Set by the operator; deployments select by them."""


class Lease(Struct, frozen=True, kw_only=True):
    """A granted share. `residue_bytes` is what a parked replica is expected, later measured, to keep on the device."""

    replica_id: Identifier
    shard_index: int
    gpu_uuid: str
    request_bytes: Bytes
    granted_bytes: Bytes
    limit_bytes: Bytes
    residue_bytes: Bytes
    lease_epoch: Epoch


class LeaseGranted(NodeFact, frozen=True, tag="nodes.lease_granted.v1"):
    """The proposal is granted as a whole. Engines start when there is room, at the latest on a wake."""

    proposal_id: Identifier
    leases: tuple[Lease, ...]
    """One per share: those of the first replica first, by shard."""
    replicas: tuple[ReplicaProposal, ...]
    """What was granted, whole, so that this node's part of history explains itself."""
    gang_id: str = ""
    """Not empty: the leases are held for a gang, and end by themselves unless `GangCommitted` comes in time."""
    gang_hold_s: Seconds = 0.0
    """That time, counted from this fact."""


class NodeAlive(Signal, frozen=True, tag="nodes.alive.v1"):
    """The node's agent is there; every few seconds. A node that is silent for long is lost."""

    node: Name
    machine_id: str
    writer_epoch: Epoch


class RefusalReason(StrEnum):
    UNKNOWN_GPU = "unknown_gpu"
    NO_ROOM = "no_room"
    NO_HOST_MEMORY = "no_host_memory"
    GRADE_NOT_AVAILABLE = "grade_not_available"
    ALREADY_HERE = "already_here"
    STALE_WRITER = "stale_writer"


class LeaseRefused(NodeFact, frozen=True, tag="nodes.lease_refused.v1"):
    """The node agent will not grant the proposal; placement should look elsewhere."""

    proposal_id: Identifier
    replica_ids: tuple[Identifier, ...]
    reason: RefusalReason
    message: str
    free_bytes: Bytes


class LeaseReleased(NodeFact, frozen=True, tag="nodes.lease_released.v1"):
    """The engine is gone and its bytes are proven free."""

    replica_id: Identifier
    reason: str


class ReplicaFact(NodeFact, frozen=True):
    replica_id: Identifier
    deployment_id: Identifier
    model: ModelName


class ReplicaStarting(ReplicaFact, frozen=True, tag="nodes.replica_starting.v1"):
    """The share is reserved and the engine is being started (cold)."""

    wake_epoch: Epoch


class Ready(Struct, frozen=True, kw_only=True):
    """One replica that became ready after a cold start."""

    replica_id: Identifier
    deployment_id: Identifier
    model: ModelName
    endpoint: str
    wake_epoch: Epoch
    start_s: Seconds
    enforced_bytes: Bytes
    """The hard limit as read back from the guard before the engine's gate was opened; of all its shards together."""


class ReplicaReady(NodeFact, frozen=True, tag="nodes.replica_ready.v1"):
    """Started, limit read back, one token verified: gateways may route to these."""

    replicas: tuple[Ready, ...]


class ReplicaDraining(ReplicaFact, frozen=True, tag="nodes.replica_draining.v1"):
    """No new request is routed to it; it parks, or is released, when its last one has ended."""

    reason: str
    is_release: bool = False


class ReplicaParked(ReplicaFact, frozen=True, tag="nodes.replica_parked.v1"):
    """Weights are in host memory, the process is alive, the device bytes are proven free."""

    wake_epoch: Epoch
    """Raised at each park; all gateways name it when they want the model back."""
    residue_bytes: Bytes
    """Of all its shards together."""
    host_bytes: Bytes
    copied_bytes: Bytes
    park_s: Seconds
    drain_s: Seconds
    reason: str
    shard_residue_bytes: tuple[Bytes, ...] = ()
    """Of each shard, as measured on its GPU; empty: only the sum is known."""

    def residues(self, shard_count: int) -> tuple[int, ...]:
        """What each shard keeps on its GPU, by shard; a sum alone is spread evenly."""
        return self.shard_residue_bytes or spread_evenly(self.residue_bytes, shard_count)


class ReplicaWaking(ReplicaFact, frozen=True, tag="nodes.replica_waking.v1"):
    """On its way back.

    First its victims give their bytes; with `is_reserved` its own share is held and restore starts.
    """

    wake_epoch: Epoch
    victim_ids: tuple[Identifier, ...] = ()
    is_reserved: bool = False


class ParkAbandoned(ReplicaFact, frozen=True, tag="nodes.park_abandoned.v1"):
    """The replica stays resident: it was still busy at the deadline, or its engine refused to park."""

    wake_epoch: Epoch
    reason: str


class ReplicaResident(ReplicaFact, frozen=True, tag="nodes.replica_resident.v1"):
    """Awake, verified with one token; the phases of its return in seconds."""

    wake_epoch: Epoch
    endpoint: str
    copied_bytes: Bytes
    reserve_s: Seconds
    """From the order until its bytes were proven free, victims' parks included."""
    restore_s: Seconds
    verify_s: Seconds
    wake_s: Seconds


class WakeRefused(ReplicaFact, frozen=True, tag="nodes.wake_refused.v1"):
    """An order that the node agent could not carry out, with the bytes that are missing."""

    wake_epoch: Epoch
    reason: str
    short_by_bytes: Bytes
    """On the GPU that lacks most."""


class ReplicaFailed(ReplicaFact, frozen=True, tag="nodes.replica_failed.v1"):
    """The engine died or would not start; `is_final` when it will not be tried again."""

    reason: str
    attempt_count: int
    is_final: bool
    wake_epoch: Epoch
    """Of its next start."""
    retry_s: Seconds = 0.0
    """When it is tried again by its node, counted from this fact; nobody should ask for it sooner."""


class GpuObserved(NodeFact, frozen=True, tag="nodes.gpu_observed.v1"):
    """Foreign or missing memory on a GPU changed what the node offers."""

    gpu_uuid: str
    foreign_bytes: Bytes
    used_fraction: Fraction

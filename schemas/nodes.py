"""Facts of node agents: what a host has, what it granted, and what its replicas do."""

from enum import StrEnum
from typing import ClassVar

from msgspec import Struct, field

from schemas.deployments import ComputeSharing, IsolationGrade, SwapDriver
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
    compute_sharing: ComputeSharing = ComputeSharing.TIME_SLICED
    compute_sharing_reason: str = ""
    numa_index: int | None = None
    """Of the host memory that is nearest; None: the host has one, or does not tell."""
    is_mig: bool = False
    """A part that the hardware keeps apart; it is offered as a GPU of its own, to one replica at a time."""
    swap_drivers: tuple[SwapDriver, ...] = ()
    """What this node can do for engines on this GPU, quickest return first; empty: not told."""
    quarantine_reason: str = ""
    """Not empty: it misbehaved, and takes no new lease before it is well again."""

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
    QUARANTINED = "quarantined"
    SWAP_NOT_AVAILABLE = "swap_not_available"
    COMPUTE_NOT_AVAILABLE = "compute_not_available"
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
    lease_epoch: Epoch = 0
    """Of its last engine. 0: not told."""


class ReplicaFact(NodeFact, frozen=True, kw_only=True):
    replica_id: Identifier
    deployment_id: Identifier
    model: ModelName
    lease_epoch: Epoch = 0
    """Whose work it tells of: raised whenever the engine is given up. 0: not told."""
    ends_within_s: Seconds = 0.0
    """How long the step that it begins may take, counted from this fact; a while later it is suspect. 0: no step."""


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
    lease_epoch: Epoch = 0
    """0: not told."""
    start_s: Seconds
    enforced_bytes: Bytes
    """The hard limit as read back from the guard before the engine's gate was opened; of all its shards together."""
    grade: IsolationGrade | None = None
    """How its share is enforced; the weakest of its GPUs. None: not told."""
    swap_driver: SwapDriver | None = None
    """How it will be parked; None: not told, or never."""


class ReplicaReady(NodeFact, frozen=True, tag="nodes.replica_ready.v1"):
    """Started, limit read back, one token verified: gateways may route to these."""

    replicas: tuple[Ready, ...]


class ReplicaDraining(ReplicaFact, frozen=True, tag="nodes.replica_draining.v1"):
    """No new request is routed to it; it parks, or is released, when its last one has ended."""

    reason: str
    is_release: bool = False


class ParkTier(StrEnum):
    """Where the weights of a parked replica lie."""

    HOST = "host"
    DISK = "disk"
    NOWHERE = "nowhere"
    """They are loaded again."""


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
    swap_driver: SwapDriver | None = None
    tier: ParkTier | None = None

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
    swap_driver: SwapDriver | None = None
    map_s: Seconds = 0.0
    """Of `restore_s`: putting memory behind its addresses. 0: not told apart."""
    copy_s: Seconds = 0.0
    """Of `restore_s`: from the first byte on the link to the last. 0: not told apart."""


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


class ReplicaSuspect(ReplicaFact, frozen=True, tag="nodes.replica_suspect.v1"):
    """What runs is not what should, or a step has not ended in its time.

    It keeps its bytes and gets no request until its agent has found out: then it is adopted, or `ReplicaFailed`.
    """

    wake_epoch: Epoch
    reason: str
    look_count: Count = 0
    """Looks at it so far that could not tell."""


class ResizeReason(StrEnum):
    BURST = "burst"
    """More than its request, from what no lease claims now."""
    GIVE_BACK = "give_back"
    """An owner wants its bytes, or other borrowers their part."""
    FREEZE = "freeze"
    """At what it uses now, so that freed bytes cannot be taken again while others give back."""


class LeaseResized(ReplicaFact, frozen=True, tag="nodes.lease_resized.v1"):
    """The grant of a resident replica changed; never below its request.

    A grant that grows is told before the engine may use it; one that shrinks, after its bytes are proven free.
    """

    granted_bytes: tuple[Bytes, ...]
    """Of each shard, by shard."""
    reason: ResizeReason
    resize_s: Seconds = 0.0
    """From the decision until the engine lived in the new grant."""
    problem: str = ""
    """Not empty: it was to grow and could not, so that it has what it had."""
    is_able: bool = True
    """False: its engine has nothing that takes another grant while it serves, and is not asked again before its next
    start."""


class GiveBackStep(StrEnum):
    """The ladder, least harm first."""

    FREEZE = "freeze"
    SHRINK = "shrink"
    PARK = "park"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


class GiveBackAsked(ReplicaFact, frozen=True, tag="nodes.give_back_asked.v1"):
    """A borrower must give bytes: the ladder begins. Each of its steps ends with `GaveBack`."""

    for_replica_id: str
    """Who wants its bytes; the first of several. Empty: nobody of ours, but strangers left the GPU too little; or
    nobody at all, where it is not owed: it does not use them."""
    asked_bytes: Bytes
    """What is missing on the GPU that lacks most, of all its borrowers together."""
    is_owed: bool = True
    """An owner wants them, so that the ladder goes on to its end. False: other borrowers want their part, so that it is
    asked to shrink and no more."""


class GaveBack(ReplicaFact, frozen=True, tag="nodes.gave_back.v1"):
    """One step of a borrower towards what it owes, with what it brought."""

    step: GiveBackStep
    for_replica_id: str
    """Who wants its bytes; the first of several. Empty: nobody of ours, but strangers left the GPU too little."""
    asked_bytes: Bytes
    freed_bytes: Bytes
    step_s: Seconds
    is_enough: bool
    """False: the next step follows."""
    reason: str = ""


class Borrowing(Struct, frozen=True, kw_only=True):
    """What one replica lent and borrowed on one GPU in a while; both in bytes times seconds."""

    replica_id: Identifier
    tenant: str
    lent_byte_s: Count
    """Of its request, what others used while it did not."""
    borrowed_byte_s: Count
    """What it was granted beyond its request."""


class BorrowAccounted(NodeFact, frozen=True, tag="nodes.borrow_accounted.v1"):
    """The account of a while on one GPU: all that was borrowed was lent by somebody, or by nobody's free bytes."""

    gpu_uuid: str
    from_s: UnixSeconds
    entries: tuple[Borrowing, ...]
    free_byte_s: Count
    """Borrowed of what no lease asks for."""


class GpuObserved(NodeFact, frozen=True, tag="nodes.gpu_observed.v1"):
    """Foreign or missing memory on a GPU changed what the node offers."""

    gpu_uuid: str
    foreign_bytes: Bytes
    used_fraction: Fraction


class GpuFaultKind(StrEnum):
    XID = "xid"
    LOST = "lost"
    """It fell off the bus: its memory is gone."""
    ECC = "ecc"
    THERMAL = "thermal"
    """The driver slows it down because it is too hot."""
    OVERUSE = "overuse"
    """A workload was seen beyond its grant."""
    UNANSWERED = "unanswered"
    """The driver does not say any more how it is."""


class GpuFaulted(NodeFact, frozen=True, tag="nodes.gpu_faulted.v1"):
    """Something is wrong with a GPU, or with somebody on it."""

    gpu_uuid: str
    kind: GpuFaultKind
    message: str
    code: int = 0
    """NVIDIA's XID number; 0 for the other kinds."""
    replica_id: str = ""
    """Of the workload that caused it; empty: not known, or not one of ours."""


class GpuQuarantined(NodeFact, frozen=True, tag="nodes.gpu_quarantined.v1"):
    """No new lease is granted on it; what serves there goes on as long as it can."""

    gpu_uuid: str
    reason: str
    fault_count: Count
    """Quarantines of this GPU so far, this one included: each lasts longer. One that an operator asked for is none."""
    quarantine_s: Seconds
    """Until it is tried again, counted from this fact; 0: until an operator says so."""


class GpuReinstated(NodeFact, frozen=True, tag="nodes.gpu_reinstated.v1"):
    """It was tried and is well again."""

    gpu_uuid: str
    away_s: Seconds

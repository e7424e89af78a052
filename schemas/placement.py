"""Facts of placement: what was admitted, where replicas shall go, and why not."""

from enum import StrEnum
from typing import ClassVar

from msgspec import Struct

from schemas.deployments import DeploymentSpec
from schemas.messages import Fact
from schemas.units import Bytes, Count, Identifier, ModelName, Name, Seconds, Sequence, UnixSeconds


class PlacementFact(Fact, frozen=True):
    writer: ClassVar[str] = "placement"

    at_s: UnixSeconds
    """When it was decided, in stream time."""


class CommandFact(PlacementFact, frozen=True):
    """One per inbox message; the highest `inbox_seq` is placement's inbox cursor."""

    inbox_seq: Sequence
    command_id: str
    tenant: Name


class DeploymentAdmitted(CommandFact, frozen=True, tag="placement.deployment_admitted.v1"):
    """The wish is sound; it will be placed, explained or retired."""

    deployment_id: Identifier
    revision_count: Count
    deployment: DeploymentSpec


class CommandRejected(CommandFact, frozen=True, tag="placement.command_rejected.v1"):
    """The command cannot be carried out as it stands; `message` says what to change."""

    code: str
    message: str


class CommandDuplicated(CommandFact, frozen=True, tag="placement.command_duplicated.v1"):
    """This command was handled before, or what it wishes for is so already; nothing changes."""

    message: str


class DeploymentRetired(CommandFact, frozen=True, tag="placement.deployment_retired.v1"):
    """The deployment is gone from the wish list; its replicas are being released."""

    deployment_id: Identifier
    model: ModelName


class ParkAsked(CommandFact, frozen=True, tag="placement.park_asked.v1"):
    """An operator wants the model parked; the swapper carries it out."""

    deployment_id: Identifier


class WakeAsked(CommandFact, frozen=True, tag="placement.wake_asked.v1"):
    """An operator wants the model resident; the swapper, or for a cold model the autoscaler, carries it out."""

    deployment_id: Identifier


class KeyAdded(CommandFact, frozen=True, tag="placement.key_added.v1"):
    """Gateways accept the key from now on."""

    key_id: Identifier
    key_hash: str
    name: str


class KeyRevoked(CommandFact, frozen=True, tag="placement.key_revoked.v1"):
    """Gateways refuse the key from now on."""

    key_id: Identifier


class ShareProposal(Struct, frozen=True, kw_only=True):
    """One shard's share on one GPU, with all that the node agent needs to start it."""

    replica_id: Identifier
    shard_index: int
    gpu_uuid: str
    request_bytes: Bytes
    limit_bytes: Bytes


class ReplicaProposal(Struct, frozen=True, kw_only=True):
    """One replica on one node, with its shards."""

    replica_id: Identifier
    deployment_id: Identifier
    tenant: Name
    deployment: DeploymentSpec
    shares: tuple[ShareProposal, ...]
    reason: str = ""
    """Why there, where that is not what the whole proposal says."""


class ReasonCode(StrEnum):
    """Why a replica is where it is, why it is not elsewhere, or why it is nowhere. Stable: machines match them."""

    ROOM_BESIDE_ALL = "room_beside_all"
    """Its request fits beside all other requests."""
    TAKES_TURNS = "takes_turns"
    """It shares bytes with replicas that may be parked."""
    ROOM_BY_PREEMPTION = "room_by_preemption"
    """Others of lower priority gave their place."""
    ROOM_BY_MOVING = "room_by_moving"
    """Others were moved elsewhere."""
    GANG = "gang"
    """Placed together with all replicas of its gang."""
    NO_NODE = "no_node"
    """No node has joined."""
    NODE_LOST = "node_lost"
    NODE_QUARANTINED = "node_quarantined"
    GPU_QUARANTINED = "gpu_quarantined"
    """It misbehaved, and is not well again."""
    MIG_TAKEN = "mig_taken"
    """A part that the hardware keeps apart takes one replica, and has one."""
    NODE_REFUSED = "node_refused"
    """Its agent refused again and again."""
    GPU_MODEL = "gpu_model"
    NODE_LABELS = "node_labels"
    ANTI_AFFINITY = "anti_affinity"
    GRADE_NOT_AVAILABLE = "grade_not_available"
    TOO_FEW_GPUS = "too_few_gpus"
    """The node has fewer GPUs than the replica spans."""
    LARGER_THAN_GPU = "larger_than_gpu"
    NO_GPU_ROOM = "no_gpu_room"
    """Its request does not fit beside what is always resident and what must come back."""
    TURNS_TAKEN = "turns_taken"
    """Those who would take turns here are expected to be in use at once."""
    NO_HOST_CPU = "no_host_cpu"
    NO_HOST_MEMORY = "no_host_memory"
    NO_PARK_MEMORY = "no_park_memory"
    """No host memory for its parked weights."""
    FOREIGN_MEMORY = "foreign_memory"
    """It would fit but for memory that processes of others use."""
    OVER_QUOTA = "over_quota"
    """Its tenant's quota is used up, and it is not preemptible."""
    GANG_INCOMPLETE = "gang_incomplete"
    """Not all replicas of its gang fit at once."""
    WAITS_FOR_VICTIMS = "waits_for_victims"
    """Room is being made for it."""
    PREEMPTED = "preempted"
    """It gave its place to a workload of higher priority."""


class Constraint(Struct, frozen=True, kw_only=True):
    """One reason against, summed over all places that it ruled out."""

    code: ReasonCode
    gpu_count: Count
    """GPUs that it rules out."""
    node_count: Count
    short_by_bytes: Bytes = 0
    """The least that is missing on any of them; 0 where bytes are not the matter."""


class Alternative(Struct, frozen=True, kw_only=True):
    """Why a GPU was not chosen."""

    node: Name
    gpu_uuid: str
    reason: str
    short_by_bytes: Bytes = 0
    code: ReasonCode = ReasonCode.NO_GPU_ROOM


class PlacementProposed(PlacementFact, frozen=True, tag="placement.proposed.v1"):
    """Where replicas shall go; the node agent grants or refuses against what it measures."""

    is_sharded: ClassVar[bool] = True

    proposal_id: Identifier
    node: Name
    replicas: tuple[ReplicaProposal, ...]
    reason: str
    alternatives: tuple[Alternative, ...] = ()
    """The nearest ones, a few; `constraints` counts all."""
    codes: tuple[ReasonCode, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    policy: str = ""
    """The packing policy that chose."""
    gang_id: str = ""
    """Not empty: hold the leases and start nothing before `GangCommitted`."""
    gang_hold_s: Seconds = 0.0
    """Held leases end by themselves after this time."""


class GangCommitted(PlacementFact, frozen=True, tag="placement.gang_committed.v1"):
    """Every replica of the gang has its lease: this node starts its part. One fact for each node, all in one batch."""

    is_sharded: ClassVar[bool] = True

    node: Name
    gang_id: Identifier
    replica_ids: tuple[Identifier, ...]


class GangAbandoned(PlacementFact, frozen=True, tag="placement.gang_abandoned.v1"):
    """Not every replica got its lease: this node gives its part back. One fact for each node."""

    is_sharded: ClassVar[bool] = True

    node: Name
    gang_id: Identifier
    replica_ids: tuple[Identifier, ...]
    reason: str


class Victim(Struct, frozen=True, kw_only=True):
    """A replica that gives its place, and why this one."""

    replica_id: Identifier
    deployment_id: Identifier
    model: ModelName
    tenant: Name
    priority: int
    freed_bytes: Bytes
    reason: str


class PreemptionDecided(PlacementFact, frozen=True, tag="placement.preemption_decided.v1"):
    """These make room for that one. The room is claimed: nobody else is placed there until the claim ends."""

    preemption_id: Identifier
    deployment_id: Identifier
    replica_id: Identifier
    """The newcomer, by the name that its proposal will have."""
    model: ModelName
    node: Name
    gpu_uuids: tuple[str, ...]
    request_bytes: tuple[Bytes, ...]
    """On each of these GPUs."""
    victims: tuple[Victim, ...]
    reason: str


class PreemptionEnded(PlacementFact, frozen=True, tag="placement.preemption_ended.v1"):
    """The claim is over: its newcomer was proposed there, or is not wanted any more, or the node is gone."""

    preemption_id: Identifier
    reason: str


class MoveDecided(PlacementFact, frozen=True, tag="placement.move_decided.v1"):
    """A replica shall live elsewhere, so that whole GPUs turn free: a replacement first, then the old one ends."""

    move_id: Identifier
    replica_id: Identifier
    replacement_id: Identifier
    deployment_id: Identifier
    model: ModelName
    from_node: Name
    from_gpu_uuids: tuple[str, ...]
    to_node: Name
    to_gpu_uuids: tuple[str, ...]
    reason: str


class MoveEnded(PlacementFact, frozen=True, tag="placement.move_ended.v1"):
    """The move is done, or given up and the replica stays where it is."""

    move_id: Identifier
    is_done: bool
    reason: str


class RepackAsked(CommandFact, frozen=True, tag="placement.repack_asked.v1"):
    """An operator wants GPUs freed now; moves follow within the budget."""

    move_count_max: Count
    gpus_freed: Count
    """What the plan promises."""


class QuotaSet(CommandFact, frozen=True, tag="placement.quota_set.v1"):
    """What a tenant's workloads are guaranteed together, and its part of what others leave."""

    quota_tenant: Name
    gpu_quota: float | None
    """GPUs; None: no limit."""
    over_quota_weight: float


class GpuReinstateAsked(CommandFact, frozen=True, tag="placement.gpu_reinstate_asked.v1"):
    """An operator says that a quarantined GPU is well."""

    is_sharded: ClassVar[bool] = True

    node: Name
    gpu_uuid: str


class GpuCloseAsked(CommandFact, frozen=True, tag="placement.gpu_close_asked.v1"):
    """An operator wants nothing new on a GPU; with `is_draining` what may be moved leaves it too."""

    is_sharded: ClassVar[bool] = True

    node: Name
    gpu_uuid: str
    is_draining: bool = False
    reason: str = ""


class NodeLost(PlacementFact, frozen=True, tag="placement.node_lost.v1"):
    """The node was silent for too long: nothing goes there, and its replicas get another place."""

    node: Name
    silent_s: Seconds
    replica_ids: tuple[Identifier, ...]
    """Replaced elsewhere; released if the node comes back with them."""


class NodeReturned(PlacementFact, frozen=True, tag="placement.node_returned.v1"):
    """The node is heard again; with `quarantine_s` nothing new goes there so long, because it came and went."""

    node: Name
    away_s: Seconds
    quarantine_s: Seconds = 0.0
    loss_count: Count = 1
    """Losses within the time that is remembered."""


class FailureReason(StrEnum):
    NO_NODE = "no_node"
    LARGER_THAN_ANY_GPU = "larger_than_any_gpu"
    NO_GPU_HAS_ROOM = "no_gpu_has_room"
    NO_HOST_MEMORY = "no_host_memory"
    GRADE_NOT_AVAILABLE = "grade_not_available"
    REFUSED_BY_NODE = "refused_by_node"
    CONSTRAINTS = "constraints"
    """No node has the GPU model, the labels, the GPUs or the distance that it asks for."""
    NO_HOST_CPU = "no_host_cpu"
    OVER_QUOTA = "over_quota"
    GANG_INCOMPLETE = "gang_incomplete"


class PlacementFailed(PlacementFact, frozen=True, tag="placement.failed.v1"):
    """Nothing fits now; tried again when a node reports more room."""

    deployment_id: Identifier
    replica_id: Identifier
    model: ModelName
    reason: FailureReason
    message: str
    missing_bytes: Bytes
    remedy: str
    """What would make it fit."""
    alternatives: tuple[Alternative, ...] = ()
    """The nearest ones, a few; `constraints` counts all."""
    codes: tuple[ReasonCode, ...] = ()
    constraints: tuple[Constraint, ...] = ()


class ReleaseProposed(PlacementFact, frozen=True, tag="placement.release_proposed.v1"):
    """The replica's lease shall end: drain, stop the engine, give everything back."""

    is_sharded: ClassVar[bool] = True

    node: Name
    replica_id: Identifier
    reason: str
    drain_s: Seconds = 30.0

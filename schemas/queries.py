"""Questions to services, and their answers. Request and reply; answers come from acknowledged state."""

from enum import StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta, Struct

from schemas.deployments import ComputeSharing, DeploymentSpec, IsolationGrade
from schemas.messages import Query
from schemas.placement import Alternative, Constraint, ReasonCode, Victim
from schemas.units import Bytes, Count, Epoch, Identifier, ModelName, Name, Seconds, Sequence, UnixSeconds


class ListDeployments(Query, frozen=True, tag="queries.list_deployments.v1"):
    """All deployments of the tenant with their replicas."""

    service: ClassVar[str] = "placement"


class ReplicaView(Struct, frozen=True, kw_only=True):
    """One replica as placement knows it from the node's facts."""

    replica_id: Identifier
    node: Name
    gpu_uuid: str
    gpu_index: int
    state: str
    """``proposed``, ``granted``, ``starting``, ``resident``, ``draining``, ``parked``, ``waking``, ``failed``."""
    since_s: UnixSeconds
    request_bytes: Bytes
    granted_bytes: Bytes
    limit_bytes: Bytes
    residue_bytes: Bytes
    wake_epoch: Epoch
    endpoint: str = ""
    last_wake_s: Seconds | None = None
    last_start_s: Seconds | None = None
    problem: str = ""
    gpu_uuids: tuple[str, ...] = ()
    """All GPUs that it spans; `gpu_uuid` is the first of them, and the bytes are of all together."""
    gpu_indices: tuple[int, ...] = ()


class DeploymentView(Struct, frozen=True, kw_only=True):
    """A deployment and what became of it."""

    deployment_id: Identifier
    tenant: Name
    deployment: DeploymentSpec
    replicas: tuple[ReplicaView, ...]
    admitted_at_s: UnixSeconds
    problem: str = ""
    """Why it is not placed; empty when it is."""
    remedy: str = ""


class DeploymentList(Struct, frozen=True, kw_only=True):
    deployments: tuple[DeploymentView, ...]
    labels: tuple[str, ...] = ()
    """Kinds of GPU in the fleet, for example ``software GPU``."""
    as_of_seq: Sequence = 0


class ListNodes(Query, frozen=True, tag="queries.list_nodes.v1"):
    """All nodes and their GPUs, by names and sizes only: other tenants' deployments are not named."""

    service: ClassVar[str] = "placement"


class GpuView(Struct, frozen=True, kw_only=True):
    gpu_uuid: str
    index: int
    name: str
    capacity_bytes: Bytes
    reserve_bytes: Bytes
    allocatable_bytes: Bytes
    promised_bytes: Bytes
    """Sum of requests of all replicas placed here, parked ones included; may exceed allocatable."""
    held_bytes: Bytes
    """What leases hold now: shares of resident replicas, residues of parked ones."""
    grade: IsolationGrade
    grade_reason: str
    resident_count: Count
    parked_count: Count
    foreign_bytes: Bytes = 0
    """Used by processes that are not ours."""
    quarantine_reason: str = ""
    """Not empty: it misbehaved, and takes no new replica before it is well again."""
    compute_sharing: ComputeSharing = ComputeSharing.TIME_SLICED
    is_mig: bool = False


class NodeView(Struct, frozen=True, kw_only=True):
    node: Name
    label: str
    gpus: tuple[GpuView, ...]
    host_budget_bytes: Bytes
    host_parked_bytes: Bytes
    joined_at_s: UnixSeconds
    cpu_millicores: Count | None = None
    """What replicas may ask of its CPU; None: not told."""
    cpu_left_millicores: int = 0
    memory_bytes: Bytes | None = None
    memory_left_bytes: int = 0
    labels: dict[str, str] = {}
    condition: str = "open"
    """``open``, ``lost`` (silent for too long) or ``quarantined`` (came and went: nothing new goes there)."""
    condition_until_s: UnixSeconds = 0.0
    """When the quarantine ends."""


class NodeList(Struct, frozen=True, kw_only=True):
    nodes: tuple[NodeView, ...]
    as_of_seq: Sequence = 0


class Explain(Query, frozen=True, tag="queries.explain.v1"):
    """Why a deployment is where it is, or why it is not placed."""

    service: ClassVar[str] = "placement"

    model: ModelName


class Explanation(Struct, frozen=True, kw_only=True):
    is_known: bool
    model: str
    summary: str = ""
    decisions: tuple["EventView", ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    """The GPUs that come nearest to having room for one more replica."""
    remedy: str = ""
    deployment: DeploymentView | None = None
    codes: tuple[ReasonCode, ...] = ()
    """Of the newest decision about it."""
    policy: str = ""
    """The packing policy that chose."""
    constraints: tuple[Constraint, ...] = ()
    """What speaks against GPUs for one more replica as things are now, counted over all of them."""
    one_more: str = ""
    """Where one more replica would go as things are now, or why it would go nowhere."""
    displaced: tuple[Victim, ...] = ()
    """Who gave their places to it, newest last."""
    displaced_by: str = ""
    """The model that took the place of one of its replicas, while it lacks one."""
    moves: tuple[str, ...] = ()
    """Its replicas that are being moved, and where to."""
    ways: tuple[str, ...] = ()
    """What would give one more replica a place; each was tried by the same decision. Empty where there is one."""
    engine: tuple[str, ...] = ()
    """What can be done with its engine where it runs: how it is parked, what stays, how it drains, how it bursts."""


class PlanDeployments(Query, frozen=True, tag="queries.plan_deployments.v1"):
    """What would become of these wishes, in their order, each on top of the last. Nothing is changed."""

    service: ClassVar[str] = "placement"

    deployments: tuple[DeploymentSpec, ...]


class PlanVerdict(StrEnum):
    NEW = "new"
    REPLACED = "replaced"
    """Another wish of that name is deployed; its replicas end when these are admitted."""
    UNCHANGED = "unchanged"
    REJECTED = "rejected"


class PlannedReplica(Struct, frozen=True, kw_only=True):
    """One replica and its place, or, with `victims`, the place that is made for it."""

    node: Name
    gpu_uuids: tuple[str, ...]
    gpu_indices: tuple[int, ...]
    request_bytes: tuple[Bytes, ...]
    """On each of these GPUs."""
    codes: tuple[ReasonCode, ...]
    reason: str
    victims: tuple[Victim, ...] = ()


class PlannedDeployment(Struct, frozen=True, kw_only=True):
    model: ModelName
    verdict: PlanVerdict
    wanted_count: Count
    """Replicas that it shall have."""
    replicas: tuple[PlannedReplica, ...] = ()
    problem: str = ""
    """Why it is rejected, or why not every replica gets a place; empty when all is well."""
    remedy: str = ""
    missing_bytes: Bytes = 0
    codes: tuple[ReasonCode, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    ways: tuple[str, ...] = ()
    """What would give the next replica a place; each was tried by the same decision."""


class Plan(Struct, frozen=True, kw_only=True):
    """What would happen now. Others may be faster: it is no reservation."""

    deployments: tuple[PlannedDeployment, ...]
    has_room_for_all: bool
    as_of_seq: Sequence = 0


class PlanRepack(Query, frozen=True, tag="queries.plan_repack.v1"):
    """Which whole GPUs so many moves would free, and which moves these are. For the operator's tenant."""

    service: ClassVar[str] = "placement"

    move_count_max: Count = 8


class PlannedMove(Struct, frozen=True, kw_only=True):
    """A replica that would move behind a ready replacement."""

    replica_id: Identifier
    model: ModelName
    tenant: Name
    from_node: Name
    from_gpu_indices: tuple[int, ...]
    to_node: Name
    to_gpu_indices: tuple[int, ...]
    moved_bytes: Bytes
    """Weights that have to be loaded there."""
    is_serving: bool
    """It has requests, or nobody knows that it has none."""


class FreedGpu(Struct, frozen=True, kw_only=True):
    node: Name
    gpu_uuid: str
    gpu_index: int


class RepackPlan(Struct, frozen=True, kw_only=True):
    """What `RepackRequested` would begin now. Others may be faster: it is no reservation."""

    moves: tuple[PlannedMove, ...] = ()
    freed: tuple[FreedGpu, ...] = ()
    problem: str = ""
    """Why nothing may be asked; empty when all is well."""
    as_of_seq: Sequence = 0


class ListQuotas(Query, frozen=True, tag="queries.list_quotas.v1"):
    """What tenants are guaranteed and hold; all of them for the operator's tenant, else the asking one's."""

    service: ClassVar[str] = "placement"


class QuotaView(Struct, frozen=True, kw_only=True):
    """In GPUs: the sum of requested portions."""

    tenant: Name
    gpu_quota: float | None
    """None: no limit."""
    over_quota_weight: float
    used_gpus: float
    never_preempted_gpus: float
    """Of those: what workloads hold that are never preempted; bound by the quota."""
    waiting_count: Count
    """Deployments that lack replicas."""


class QuotaList(Struct, frozen=True, kw_only=True):
    quotas: tuple[QuotaView, ...]


class ListEvents(Query, frozen=True, tag="queries.list_events.v1"):
    """The tenant's part of history after a sequence; waits up to `wait_s` when there is nothing yet."""

    service: ClassVar[str] = "placement"

    after_seq: Sequence = 0
    model: str = ""
    limit_count: Annotated[int, Meta(ge=1, le=1000)] = 100
    wait_s: Annotated[float, Meta(ge=0, le=10)] = 0.0


class EventView(Struct, frozen=True, kw_only=True):
    """One fact in words."""

    seq: Sequence
    at_s: UnixSeconds
    writer: str
    type: str
    model: str
    text: str
    cause_seq: Sequence = 0
    body: msgspec.Raw = msgspec.Raw(b"null")


class EventList(Struct, frozen=True, kw_only=True):
    events: tuple[EventView, ...]
    last_seq: Sequence


class ListKeys(Query, frozen=True, tag="queries.list_keys.v1"):
    """The tenant's keys, without anything that could be used as one."""

    service: ClassVar[str] = "placement"


class KeyView(Struct, frozen=True, kw_only=True):
    key_id: Identifier
    name: str
    created_at_s: UnixSeconds


class KeyList(Struct, frozen=True, kw_only=True):
    keys: tuple[KeyView, ...]


class ReadLogs(Query, frozen=True, tag="queries.read_logs.v1"):
    """The end of an engine's log."""

    service: ClassVar[str] = "nodeagent"
    is_per_node: ClassVar[bool] = True

    replica_id: Identifier
    after_bytes: Bytes = 0
    """Where the last answer ended; 0 with `tail_count` for the end."""
    tail_count: Annotated[int, Meta(ge=1, le=10_000)] = 200


class LogChunk(Struct, frozen=True, kw_only=True):
    lines: tuple[str, ...]
    next_bytes: Bytes


class QueryRefused(Struct, frozen=True, kw_only=True):
    """A question that cannot be answered, in one sentence."""

    error: str

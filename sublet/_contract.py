"""The public messages, restated: what the client sends, what it is answered, and where both travel.

The wheel holds this package alone, so nothing is imported from the vocabulary in ``schemas``;
``tests/contract/test_client_matches_schemas.py`` compares the two. Two differences are meant: enumerations are plain
strings here, and bounds are not checked, so that an older client still reads what a newer control plane answers.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import msgspec
from msgspec import Struct

ENGINES: Final = ("simulated", "training", "vllm", "sglang", "nim", "llama-server", "openai")
KINDS: Final = ("inference", "training")
RUNTIMES: Final = ("process", "docker")
SWAP_DRIVERS: Final = ("store", "http-sleep", "http-release", "sleep-checkpoint", "checkpoint", "restart")
GRADES: Final = ("hardware", "driver", "broker", "cooperative", "watched")
"""How a share is enforced, strongest first."""
PRIORITIES: Final = ("very-low", "low", "medium-low", "medium", "medium-high", "high", "very-high")
STRATEGIES: Final = ("binpack", "spread")
ANTI_AFFINITIES: Final = ("none", "gpu", "node")
DEFAULT_PRIORITIES: Final = {"inference": "very-high", "training": "low"}
VERDICTS: Final = ("admitted", "rejected", "duplicate")


class Message(Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of everything that has a tag on the wire."""


class Command(Message, frozen=True, kw_only=True):
    command_id: str


class Query(Message, frozen=True, kw_only=True):
    service: ClassVar[str] = "placement"


# ---- what a client wishes for --------------------------------------------------------------------------------------


class EngineSpec(Struct, frozen=True, kw_only=True):
    kind: str = "simulated"
    model: str = ""
    weights_bytes: int
    cold_start_s: float | None = None
    arguments: dict[str, str] = {}
    image: str = ""
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    secrets: tuple[str, ...] = ()
    runtime: str | None = None
    swap_driver: str | None = None
    is_elastic: bool | None = None


class ShareSpec(Struct, frozen=True, kw_only=True):
    request_portion: float | None = None
    request_bytes: int | None = None
    limit_portion: float | None = None
    limit_bytes: int | None = None
    minimum_grade: str | None = None
    gpu_count: int = 1
    burst_weight: int = 1
    compute_portion: float | None = None


class HostSpec(Struct, frozen=True, kw_only=True):
    cpu_millicores: int = 0
    memory_bytes: int = 0


class PlacementSpec(Struct, frozen=True, kw_only=True):
    gpu_models: tuple[str, ...] = ()
    node_labels: dict[str, str] = {}
    node_strategy: str = "binpack"
    gpu_strategy: str = "binpack"
    anti_affinity: str = "none"
    is_gang: bool = False
    is_movable: bool = True
    minimum_runtime_s: float = 0.0
    preemption_delay_s: float = 0.0


class SwapSpec(Struct, frozen=True, kw_only=True):
    is_parkable: bool = True
    warm_window_s: float = 300.0
    minimum_residency_s: float = 0.5
    cold_after_s: float | None = None
    return_deadline_s: float = 30.0


class DeploymentSpec(Struct, frozen=True, kw_only=True):
    """A model, its engine, its share of a GPU, its priority and how it swaps. `sublet.deployment` builds one."""

    name: str
    kind: str = "inference"
    engine: EngineSpec
    share: ShareSpec
    priority: str | None = None
    is_preemptible: bool | None = None
    swap: SwapSpec = SwapSpec()
    replica_count: int = 1
    host: HostSpec = HostSpec()
    placement: PlacementSpec = PlacementSpec()


# ---- commands ------------------------------------------------------------------------------------------------------


class DeployRequested(Command, frozen=True, tag="inbox.deploy_requested.v1"):
    deployment: DeploymentSpec


class RetireRequested(Command, frozen=True, tag="inbox.retire_requested.v1"):
    model: str


class ParkRequested(Command, frozen=True, tag="inbox.park_requested.v1"):
    model: str


class WakeRequested(Command, frozen=True, tag="inbox.wake_requested.v1"):
    model: str


class RepackRequested(Command, frozen=True, tag="inbox.repack_requested.v1"):
    move_count_max: int = 8


class QuotaRequested(Command, frozen=True, tag="inbox.quota_requested.v1"):
    quota_tenant: str
    gpu_quota: float | None = None
    over_quota_weight: float = 1.0


class GpuReinstateRequested(Command, frozen=True, tag="inbox.gpu_reinstate_requested.v1"):
    node: str
    gpu_uuid: str


class GpuCloseRequested(Command, frozen=True, tag="inbox.gpu_close_requested.v1"):
    node: str
    gpu_uuid: str
    is_draining: bool = False
    reason: str = ""


class KeyCreateRequested(Command, frozen=True, tag="inbox.key_create_requested.v1"):
    key_id: str
    key_hash: str
    name: str = ""


class KeyRevokeRequested(Command, frozen=True, tag="inbox.key_revoke_requested.v1"):
    key_id: str


class CommandAnswered(Message, frozen=True, tag="inbox.command_answered.v1"):
    """What became of a command; `verdict` is one of `VERDICTS`."""

    command_id: str
    verdict: str
    message: str
    code: str = ""
    inbox_seq: int = 0


# ---- queries and their answers -------------------------------------------------------------------------------------


class ListDeployments(Query, frozen=True, tag="queries.list_deployments.v1"):
    pass


class ReplicaView(Struct, frozen=True, kw_only=True):
    replica_id: str
    node: str
    gpu_uuid: str
    gpu_index: int
    state: str
    since_s: float
    request_bytes: int
    granted_bytes: int
    limit_bytes: int
    residue_bytes: int
    wake_epoch: int
    endpoint: str = ""
    last_wake_s: float | None = None
    last_start_s: float | None = None
    problem: str = ""
    gpu_uuids: tuple[str, ...] = ()
    gpu_indices: tuple[int, ...] = ()


class DeploymentView(Struct, frozen=True, kw_only=True):
    deployment_id: str
    tenant: str
    deployment: DeploymentSpec
    replicas: tuple[ReplicaView, ...]
    admitted_at_s: float
    problem: str = ""
    remedy: str = ""


class DeploymentList(Struct, frozen=True, kw_only=True):
    deployments: tuple[DeploymentView, ...]
    labels: tuple[str, ...] = ()
    as_of_seq: int = 0


class ListNodes(Query, frozen=True, tag="queries.list_nodes.v1"):
    pass


class GpuView(Struct, frozen=True, kw_only=True):
    gpu_uuid: str
    index: int
    name: str
    capacity_bytes: int
    reserve_bytes: int
    allocatable_bytes: int
    promised_bytes: int
    held_bytes: int
    grade: str
    grade_reason: str
    resident_count: int
    parked_count: int
    foreign_bytes: int = 0
    quarantine_reason: str = ""
    compute_sharing: str = "time-sliced"
    is_mig: bool = False


class NodeView(Struct, frozen=True, kw_only=True):
    node: str
    label: str
    gpus: tuple[GpuView, ...]
    host_budget_bytes: int
    host_parked_bytes: int
    joined_at_s: float
    cpu_millicores: int | None = None
    cpu_left_millicores: int = 0
    memory_bytes: int | None = None
    memory_left_bytes: int = 0
    labels: dict[str, str] = {}
    condition: str = "open"
    condition_until_s: float = 0.0


class NodeList(Struct, frozen=True, kw_only=True):
    nodes: tuple[NodeView, ...]
    as_of_seq: int = 0


class Explain(Query, frozen=True, tag="queries.explain.v1"):
    model: str


class EventView(Struct, frozen=True, kw_only=True):
    seq: int
    at_s: float
    writer: str
    type: str
    model: str
    text: str
    cause_seq: int = 0
    body: Any = None


class Alternative(Struct, frozen=True, kw_only=True):
    node: str
    gpu_uuid: str
    reason: str
    short_by_bytes: int = 0
    code: str = "no_gpu_room"


class Constraint(Struct, frozen=True, kw_only=True):
    code: str
    gpu_count: int
    node_count: int
    short_by_bytes: int = 0


class Victim(Struct, frozen=True, kw_only=True):
    replica_id: str
    deployment_id: str
    model: str
    tenant: str
    priority: int
    freed_bytes: int
    reason: str


class Explanation(Struct, frozen=True, kw_only=True):
    is_known: bool
    model: str
    summary: str = ""
    decisions: tuple[EventView, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    remedy: str = ""
    deployment: DeploymentView | None = None
    codes: tuple[str, ...] = ()
    policy: str = ""
    constraints: tuple[Constraint, ...] = ()
    one_more: str = ""
    displaced: tuple[Victim, ...] = ()
    displaced_by: str = ""
    moves: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()


class PlanDeployments(Query, frozen=True, tag="queries.plan_deployments.v1"):
    deployments: tuple[DeploymentSpec, ...]


class PlannedReplica(Struct, frozen=True, kw_only=True):
    node: str
    gpu_uuids: tuple[str, ...]
    gpu_indices: tuple[int, ...]
    request_bytes: tuple[int, ...]
    codes: tuple[str, ...]
    reason: str
    victims: tuple[Victim, ...] = ()


class PlannedDeployment(Struct, frozen=True, kw_only=True):
    model: str
    verdict: str
    wanted_count: int
    replicas: tuple[PlannedReplica, ...] = ()
    problem: str = ""
    remedy: str = ""
    missing_bytes: int = 0
    codes: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    ways: tuple[str, ...] = ()


class Plan(Struct, frozen=True, kw_only=True):
    deployments: tuple[PlannedDeployment, ...]
    has_room_for_all: bool
    as_of_seq: int = 0


class PlanRepack(Query, frozen=True, tag="queries.plan_repack.v1"):
    move_count_max: int = 8


class PlannedMove(Struct, frozen=True, kw_only=True):
    replica_id: str
    model: str
    tenant: str
    from_node: str
    from_gpu_indices: tuple[int, ...]
    to_node: str
    to_gpu_indices: tuple[int, ...]
    moved_bytes: int
    is_serving: bool


class FreedGpu(Struct, frozen=True, kw_only=True):
    node: str
    gpu_uuid: str
    gpu_index: int


class RepackPlan(Struct, frozen=True, kw_only=True):
    moves: tuple[PlannedMove, ...] = ()
    freed: tuple[FreedGpu, ...] = ()
    problem: str = ""
    as_of_seq: int = 0


class ListQuotas(Query, frozen=True, tag="queries.list_quotas.v1"):
    pass


class QuotaView(Struct, frozen=True, kw_only=True):
    tenant: str
    gpu_quota: float | None
    over_quota_weight: float
    used_gpus: float
    never_preempted_gpus: float
    waiting_count: int


class QuotaList(Struct, frozen=True, kw_only=True):
    quotas: tuple[QuotaView, ...]


class ListEvents(Query, frozen=True, tag="queries.list_events.v1"):
    after_seq: int = 0
    model: str = ""
    limit_count: int = 100
    wait_s: float = 0.0


class EventList(Struct, frozen=True, kw_only=True):
    events: tuple[EventView, ...]
    last_seq: int


class ListKeys(Query, frozen=True, tag="queries.list_keys.v1"):
    pass


class KeyView(Struct, frozen=True, kw_only=True):
    key_id: str
    name: str
    created_at_s: float


class KeyList(Struct, frozen=True, kw_only=True):
    keys: tuple[KeyView, ...]


class ReadLogs(Query, frozen=True, tag="queries.read_logs.v1"):
    service: ClassVar[str] = "nodeagent"

    replica_id: str
    after_bytes: int = 0
    tail_count: int = 200


class LogChunk(Struct, frozen=True, kw_only=True):
    lines: tuple[str, ...]
    next_bytes: int


class QueryRefused(Struct, frozen=True, kw_only=True):
    """A question that cannot be answered. It has no tag: an object with `error` is one of these."""

    error: str


NOTHING_TO_TELL: Final = "nothing to tell"
"""The refusal of a query that waited in vain."""
EVENT_LIMIT_MAX: Final = 1000
LOG_TAIL_MAX: Final = 10_000

COMMANDS: Final = (
    DeployRequested, RetireRequested, ParkRequested, WakeRequested, RepackRequested, QuotaRequested,
    GpuReinstateRequested, GpuCloseRequested, KeyCreateRequested, KeyRevokeRequested,
)  # fmt: skip
ANSWER_OF: Final[dict[type[Query], type[Struct]]] = {
    ListDeployments: DeploymentList,
    ListNodes: NodeList,
    Explain: Explanation,
    PlanDeployments: Plan,
    PlanRepack: RepackPlan,
    ListQuotas: QuotaList,
    ListEvents: EventList,
    ListKeys: KeyList,
    ReadLogs: LogChunk,
}
"""The view that answers each query."""


def token_of(message: Message | type[Message]) -> str:
    """The tag as one subject token, for example ``inbox_deploy_requested_v1``."""
    tag = message.__struct_config__.tag
    assert isinstance(tag, str), message
    return tag.replace(".", "_")


def command_subject(tenant: str, command: Command | type[Command]) -> str:
    return f"sublet.in.{tenant}.{token_of(command)}"


def answer_subject(tenant: str, command_id: str) -> str:
    return f"sublet.out.{tenant}.{command_id}"


def query_subject(tenant: str, query: Query | type[Query], node: str = "") -> str:
    service = f"{query.service}.{node}" if node else query.service
    return f"sublet.query.{tenant}.{service}.{token_of(query)}"


def encode(message: Struct) -> bytes:
    return msgspec.json.encode(message)


def plain(value: Any) -> Any:
    """The value as dicts, lists and scalars, as JSON would carry it."""
    return msgspec.json.decode(msgspec.json.encode(value))

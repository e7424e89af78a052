"""What a client wishes for: a deployment, its engine, its share of a GPU, its priority and how it swaps."""

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from schemas.units import Bytes, Count, ModelName, Portion, Seconds


class WorkloadKind(StrEnum):
    INFERENCE = "inference"
    TRAINING = "training"


class EngineKind(StrEnum):
    """Programs that we know how to start, drain and park."""

    SIMULATED = "simulated"
    TRAINING = "training"
    VLLM = "vllm"
    SGLANG = "sglang"
    NIM = "nim"
    LLAMA_SERVER = "llama-server"
    OPENAI = "openai"
    """Any command that serves the OpenAI routes."""


class Runtime(StrEnum):
    """What runs an engine's program."""

    PROCESS = "process"
    """A child of the holder, in a cgroup leaf of its own."""
    DOCKER = "docker"
    """A container of the host's Docker engine."""


class SwapDriver(StrEnum):
    """How an engine's memory leaves the GPU and comes back; quickest return first."""

    STORE = "store"
    """Weights belong to the memory broker: sealed once in host memory, mapped into the engine at a stable address."""
    HTTP_SLEEP = "http-sleep"
    """vLLM's ``/sleep`` and ``/wake_up``."""
    HTTP_RELEASE = "http-release"
    """SGLang's ``/release_memory_occupation`` and ``/resume_memory_occupation``."""
    SLEEP_CHECKPOINT = "sleep-checkpoint"
    """First `HTTP_SLEEP`, then the driver's checkpoint of what is left: a small image, and nothing stays."""
    CHECKPOINT = "checkpoint"
    """The driver's checkpoint of the whole process; the engine does not know."""
    RESTART = "restart"
    """Stopped and started again: nothing stays, and the return takes a cold start."""


class ComputeSharing(StrEnum):
    """How the engines on one GPU share its processors."""

    TIME_SLICED = "time-sliced"
    """The driver's default: one after the other, whole GPU each."""
    MPS = "mps"
    """At the same time, through the daemon that the node agent runs; each may have a ceiling."""


class IsolationGrade(StrEnum):
    """How a share is enforced, strongest first."""

    HARDWARE = "hardware"
    DRIVER = "driver"
    BROKER = "broker"
    COOPERATIVE = "cooperative"
    WATCHED = "watched"


GRADE_ORDER: Final = tuple(IsolationGrade)

PRIORITIES: Final = {
    "very-low": 25,
    "low": 40,
    "medium-low": 65,
    "medium": 80,
    "medium-high": 90,
    "high": 125,
    "very-high": 150,
}
"""The seven names and numbers that Run:ai's users know.

Below `PREEMPTIBLE_BELOW` a workload is preemptible by default.
"""

PREEMPTIBLE_BELOW: Final = 100
DEFAULT_PRIORITY: Final = {WorkloadKind.INFERENCE: "very-high", WorkloadKind.TRAINING: "low"}


class EngineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Which program serves the model, and what it will hold."""

    kind: EngineKind = EngineKind.SIMULATED
    model: Annotated[str, Meta(max_length=256)] = ""
    """The engine's own name for the model; the deployment's name when empty."""
    weights_bytes: Bytes
    """Bytes that are restored on a wake and that host memory keeps while parked."""
    cold_start_s: Seconds | None = None
    """Simulated engines only: how long a cold start takes before weights are loaded. None: the node's setting."""
    arguments: dict[str, str] = {}
    """More command-line options for the engine, without the leading dashes."""
    image: Annotated[str, Meta(max_length=256)] = ""
    """Of its container, for the runtime `docker`; empty: the engine's usual one."""
    command: tuple[str, ...] = ()
    """Instead of the engine's usual program. ``{port}``, ``{model}`` and ``{memory_bytes}`` are filled in."""
    environment: dict[str, str] = {}
    """More variables for the engine. No secrets: they would be in every log of the fleet; name those in `secrets`."""
    secrets: tuple[str, ...] = ()
    """Names of secrets of the node, each handed to the engine as the variable of that name (``HF_TOKEN``)."""
    runtime: Runtime | None = None
    """None: what this kind of engine usually runs in on its node."""
    swap_driver: SwapDriver | None = None
    """None: the quickest that this engine and its node can do."""
    is_elastic: bool | None = None
    """Whether its cache can grow and shrink while it serves. None: as this kind of engine usually is."""


class ShareSpec(Struct, frozen=True, kw_only=True):
    """A part of a GPU. Exactly one of portion and bytes for the request; the limit defaults to the request."""

    request_portion: Portion | None = None
    request_bytes: Bytes | None = None
    limit_portion: Portion | None = None
    limit_bytes: Bytes | None = None
    minimum_grade: IsolationGrade | None = None
    """A node that cannot enforce the share at least this strongly is never chosen."""
    gpu_count: Annotated[int, Meta(ge=1, le=64)] = 1
    """GPUs that one replica spans, all on one node; request and limit are of each of them."""
    burst_weight: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Among those that want more than their request: free bytes go by weight, equal weights get equal parts."""
    compute_portion: Annotated[float, Meta(gt=0, le=1)] | None = None
    """The most of a GPU's processors that it may use at a time; needs a GPU that is shared by MPS. None: no ceiling."""


class HostSpec(Struct, frozen=True, kw_only=True):
    """What one replica asks of its host beside GPUs. Weights of parked replicas have a budget of their own."""

    cpu_millicores: Count = 0
    memory_bytes: Bytes = 0


class Strategy(StrEnum):
    """Whether replicas fill what is partly used, or keep apart."""

    BINPACK = "binpack"
    SPREAD = "spread"


class AntiAffinity(StrEnum):
    """Which place two replicas of one deployment never share."""

    NONE = "none"
    GPU = "gpu"
    NODE = "node"


class PlacementSpec(Struct, frozen=True, kw_only=True):
    """Where replicas may go, how they group, and what they put up with."""

    gpu_models: tuple[str, ...] = ()
    """Names of GPUs as NVML tells them, any of which will do; a part of the name is enough. Empty: any."""
    node_labels: dict[str, str] = {}
    """A node that lacks one of these labels is never chosen."""
    node_strategy: Strategy = Strategy.BINPACK
    gpu_strategy: Strategy = Strategy.BINPACK
    anti_affinity: AntiAffinity = AntiAffinity.NONE
    is_gang: bool = False
    """All replicas start together or none does."""
    is_movable: bool = True
    """False: never moved to defragment."""
    minimum_runtime_s: Seconds = 0.0
    """Once running, it is not preempted sooner."""
    preemption_delay_s: Seconds = 0.0
    """So long it waits for free room before it displaces others."""


class SwapSpec(Struct, frozen=True, kw_only=True):
    """How a deployment leaves the GPU and comes back."""

    is_parkable: bool = True
    """A parkable replica is guaranteed its return by a deadline, not residency."""
    warm_window_s: Seconds = 300.0
    """How long an idle model stays resident when nobody needs its room."""
    minimum_residency_s: Seconds = 0.5
    """How long a model stays resident before it may be parked for another."""
    cold_after_s: Seconds | None = None
    """Idle this long, its process is stopped too. None: never."""
    return_deadline_s: Seconds = 30.0
    """A request to a parked model is answered or refused within this time."""


class DeploymentSpec(Struct, frozen=True, kw_only=True):
    """The wish, as admitted. `name` is what clients put into ``model``."""

    name: ModelName
    kind: WorkloadKind = WorkloadKind.INFERENCE
    engine: EngineSpec
    share: ShareSpec
    priority: str | None = None
    """One of `PRIORITIES`; None: very-high for inference, low for training."""
    is_preemptible: bool | None = None
    """None: by priority."""
    swap: SwapSpec = SwapSpec()
    replica_count: Count = 1
    host: HostSpec = HostSpec()
    placement: PlacementSpec = PlacementSpec()

    @property
    def priority_number(self) -> int:
        return PRIORITIES[self.priority or DEFAULT_PRIORITY[self.kind]]

    @property
    def may_be_preempted(self) -> bool:
        """Its place may be taken by a workload of higher priority; said outright, or else by its own priority."""
        return self.priority_number < PREEMPTIBLE_BELOW if self.is_preemptible is None else self.is_preemptible


def problems_of(spec: DeploymentSpec) -> list[str]:
    """Every reason why this wish can never be granted, one clear sentence each; empty when it is sound.

    Checked at admission, and by the client before it publishes. Whether it fits is placement's question.
    """
    share = spec.share
    problems = []
    if (share.request_portion is None) == (share.request_bytes is None):
        problems.append("share: give exactly one of request_portion and request_bytes.")
    if share.limit_portion is not None and share.limit_bytes is not None:
        problems.append("share: give at most one of limit_portion and limit_bytes.")
    for unit in ("portion", "bytes"):
        request = getattr(share, f"request_{unit}")
        limit = getattr(share, f"limit_{unit}")
        if request is not None and limit is not None and limit < request:
            problems.append(
                f"share: the limit ({limit:g}) is below the request ({request:g}); "
                "raise the limit or lower the request."
            )
    if share.request_portion is not None and share.request_portion > 1:
        problems.append(
            f"share: {share.request_portion:g} is more than one GPU; say the part of each GPU, at most 1, "
            "and how many GPUs as gpu_count."
        )
    if share.request_bytes == 0:
        problems.append("share: request_bytes is 0; a replica needs some memory on its GPU.")
    if spec.priority is not None and spec.priority not in PRIORITIES:
        problems.append(f"priority: '{spec.priority}' is unknown; use one of {', '.join(PRIORITIES)}.")
    if spec.kind is WorkloadKind.TRAINING and spec.engine.kind is not EngineKind.TRAINING:
        problems.append("engine: a training deployment needs engine kind 'training'.")
    from schemas.engine_wishes import engine_problems  # Late: it stands on this module.

    return problems + engine_problems(spec)

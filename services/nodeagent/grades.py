"""What each kind of engine makes of a GPU's isolation grade; data, and the pure rules over it.

A GPU's grade says what its guard can do. Whether that holds for one replica depends on its engine too: a budget counts
only for an engine that keeps one, and memory from the broker only for an engine that asks for it.
"""

from typing import Final

from schemas.deployments import (
    GRADE_ORDER,
    ComputeSharing,
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    IsolationGrade,
    SwapDriver,
)
from schemas.nodes import GpuOffer, RefusalReason

KEEPS_BUDGET: Final = frozenset({EngineKind.SIMULATED, EngineKind.TRAINING, EngineKind.VLLM, EngineKind.SGLANG})
"""Started with its share as an argument, and no more is taken afterwards. NIM picks its own size; llama-server takes
what its model and context need; of any other command nothing is known."""

ASKS_BROKER: Final = frozenset({EngineKind.SIMULATED, EngineKind.TRAINING})
"""All of its memory but the context comes from the memory broker. vLLM with our plugin takes its weights there, but
its cache by itself: where the broker holds the whole GPU, it would find none."""


def weakest(*grades: IsolationGrade) -> IsolationGrade:
    return max(grades, key=GRADE_ORDER.index)


def grade_for(gpu_grade: IsolationGrade, engine: EngineSpec) -> IsolationGrade | None:
    """How a share of this engine on such a GPU is enforced; None: the engine cannot run there at all."""
    if gpu_grade is IsolationGrade.BROKER:
        return IsolationGrade.BROKER if asks_for_all(engine) else None
    if gpu_grade is IsolationGrade.COOPERATIVE and engine.kind not in KEEPS_BUDGET:
        return IsolationGrade.WATCHED
    return gpu_grade


def is_weaker(grade: IsolationGrade, minimum: IsolationGrade | None) -> bool:
    """Whether the grade is not enough for a share that asks for this minimum."""
    return minimum is not None and GRADE_ORDER.index(grade) > GRADE_ORDER.index(minimum)


def why_not_enforced(gpu: GpuOffer, deployment: DeploymentSpec) -> tuple[RefusalReason, str] | None:
    """Why this GPU cannot hold such a share as it is asked for, or None."""
    share, kind = deployment.share, deployment.engine.kind
    grade = grade_for(gpu.grade, deployment.engine)
    if grade is None:
        message = f"the memory broker holds all of this GPU, and engine '{kind}' does not ask it for memory"
        return RefusalReason.GRADE_NOT_AVAILABLE, message
    if grade is IsolationGrade.DRIVER and kind not in ASKS_BROKER and deployment.engine.swap_driver is SwapDriver.STORE:
        message = (
            f"under the driver's limit engine '{kind}' cannot load weights that the memory broker lends only later"
        )
        return RefusalReason.SWAP_NOT_AVAILABLE, message
    minimum = share.minimum_grade
    if is_weaker(grade, minimum):
        whose = "this GPU gives" if grade is gpu.grade else f"this GPU gives engine '{kind}'"
        return RefusalReason.GRADE_NOT_AVAILABLE, f"{whose} '{grade}', not '{minimum}': {gpu.grade_reason}"
    if share.compute_portion is not None and gpu.compute_sharing is not ComputeSharing.MPS:
        message = f"compute_portion needs MPS, and this GPU's processors are {gpu.compute_sharing}"
        if gpu.compute_sharing_reason:
            message += f": {gpu.compute_sharing_reason}"
        return RefusalReason.COMPUTE_NOT_AVAILABLE, message
    return None


def asks_for_all(engine: EngineSpec) -> bool:
    """Whether all of its memory but the context is the broker's, where there is one.

    A process that maps another's memory cannot be checkpointed, so whoever shall be has memory of its own.
    """
    return engine.kind in ASKS_BROKER and engine.swap_driver is not SwapDriver.CHECKPOINT


def is_brokered(engine: EngineSpec) -> bool:
    """Whether it asks the memory broker for anything, where there is one."""
    return asks_for_all(engine) or engine.swap_driver is SwapDriver.STORE


def brokered_bytes(engine: EngineSpec, *, granted_bytes: int, context_bytes: int, shard_count: int) -> int:
    """Of a shard's grant, what the memory broker may lend it; the rest it allocates by itself."""
    if asks_for_all(engine):
        return max(0, granted_bytes - context_bytes)
    if engine.swap_driver is SwapDriver.STORE:
        return min(granted_bytes, -(-engine.weights_bytes // shard_count))
    return 0

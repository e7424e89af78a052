"""The values that the engine takes and gives: settings, states, errors, and what each change of life cost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from devices.api import OutOfMemory
from engines.errors import EngineError, invalid
from engines.model.batching import BatchLimits
from engines.model.sharing import Sharing


class EngineState(Enum):
    LOADING = "loading"
    RESIDENT = "resident"
    ASLEEP = "asleep"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the command line said."""

    model: str
    gpu_uuids: tuple[str, ...]
    weights_bytes: int  # of the whole model
    memory_bytes: int  # on each GPU
    cold_start_s: float
    seed: int
    limits: BatchLimits
    sharing: Sharing


def too_long(token_count: int, *, tokens_max: int) -> EngineError:
    """More tokens than the model, or its KV memory at present, can hold."""
    message = (
        f"This model's maximum context length is {tokens_max} tokens now. However, your request needs {token_count} "
        "tokens in prompt and completion. Reduce their length."
    )
    return invalid(message, code="context_length_exceeded", param="messages")


def out_of_memory(error: OutOfMemory) -> EngineError:
    """The GPU had no room while a request ran, in a real engine's words."""
    free = "an unknown number of bytes is" if error.free_bytes is None else f"{error.free_bytes} bytes are"
    message = f"CUDA out of memory. Tried to allocate {error.requested_bytes} bytes; {free} free on the GPU."
    return EngineError(message, status=500, kind="internal_server_error", code="out_of_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepReport:
    """Weights are copied on the way out only after an update: else their sealed copy is what the device has."""

    copied_bytes: int = 0
    freed_bytes: int = 0
    sleep_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The device has these weights now; `digest` is of the places that a wake verifies."""

    weights_generation: int
    digest: str
    update_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeReport:
    """`copy_s` ends with the last byte and overlaps `map_s`; the parts do not add up.

    The memory broker counts it from the first byte on the link, the engine itself from the start of the restore.
    """

    copied_bytes: int = 0
    map_s: float = 0.0
    copy_s: float = 0.0
    verify_s: float = 0.0
    wake_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetReport:
    """What the engine holds on each GPU; `kv_bytes` is of all together.

    `memory_bytes` is above `target_bytes` while requests use what has to go, below when the GPU had no room.
    """

    memory_bytes: int
    target_bytes: int
    kv_bytes: int
    short_by_bytes: int

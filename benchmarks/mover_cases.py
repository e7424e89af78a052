"""What the mover's benchmark runs, one case after the other, and what each case gives."""

import statistics
from collections.abc import Sequence
from typing import Final

import msgspec

from benchmarks.report import Value
from schemas.deployments import SwapDriver

SIZES_GB: Final = (14.5, 24.6, 32.3, 63.2)
"""Weights of 7B, 12B, 30B in 8 bits, and 30B in 16 bits."""
PLAIN: Final = "checkpoint-plain"
"""The driver's own storage, as before CUDA 13.4.1."""
WAYS: Final = (SwapDriver.STORE.value, SwapDriver.CHECKPOINT.value, SwapDriver.HTTP_SLEEP.value, PLAIN)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, parked and woken some times."""

    way: str
    """A swap driver, or `PLAIN`."""
    weights_bytes: int
    gpu_count: int
    repeat_count: int

    @property
    def name(self) -> str:
        """For example ``store_2x14.5``: two GPUs, 14.5 GB of weights over both."""
        return f"{self.way.replace('-', '_')}_{self.gpu_count}x{self.weights_bytes / 1e9:.3g}"

    @property
    def driver(self) -> SwapDriver:
        return SwapDriver.CHECKPOINT if self.way == PLAIN else SwapDriver(self.way)


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """One park and one wake, as the agent's own hands measured them."""

    park_s: float
    parked_bytes: int
    """Copied on the way out."""
    restore_s: float
    map_s: float
    copy_s: float
    verify_s: float
    woken_bytes: int
    residue_bytes: int

    @property
    def wake_s(self) -> float:
        return self.restore_s + self.verify_s


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    case: Case
    cycles: tuple[Cycle, ...] = ()
    problem: str = ""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What the run found: the first line that it writes."""

    label: str
    gpu_name: str
    link_bytes_per_s: float
    """Of one GPU, measured with one large copy out of pinned memory."""


def cases(
    ways: Sequence[str], sizes_gb: Sequence[float], gpu_counts: Sequence[int], *, repeat_count: int
) -> list[Case]:
    """All of them. The plain way is so slow that one cycle on one GPU tells enough."""
    found = []
    for way in ways:
        for gpu_count in gpu_counts if way != PLAIN else gpu_counts[:1]:
            for size_gb in sizes_gb:
                count = 1 if way == PLAIN else repeat_count
                found.append(Case(way=way, weights_bytes=round(size_gb * 1e9), gpu_count=gpu_count, repeat_count=count))
    return found


def figures(outcome: Outcome, setting: Setting) -> dict[str, Value]:
    """Medians, by the case's name."""
    if not outcome.cycles:
        return {f"{outcome.case.name}_wake_s": None}
    middle = {
        name: statistics.median(getattr(cycle, name) for cycle in outcome.cycles)
        for name in ("park_s", "parked_bytes", "restore_s", "map_s", "copy_s", "verify_s", "wake_s", "woken_bytes")
    }
    floor_s = middle["woken_bytes"] / (setting.link_bytes_per_s * outcome.case.gpu_count)
    told: dict[str, Value] = {"wake_s": middle["wake_s"], "floor_s": floor_s}
    if middle["copy_s"]:
        told["reserve_s"] = max(0.0, middle["restore_s"] - middle["copy_s"])
        told["map_s"] = middle["map_s"]
        told["copy_s"] = middle["copy_s"]
        told["link_fraction"] = floor_s / middle["copy_s"]
        told["outside_copy_s"] = middle["wake_s"] - middle["copy_s"]
    told["verify_s"] = middle["verify_s"]
    told["park_s"] = middle["park_s"]
    told["park_copied_bytes"] = round(middle["parked_bytes"])
    told["residue_bytes"] = max(cycle.residue_bytes for cycle in outcome.cycles)
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in told.items()}
    return {f"{outcome.case.name}_{name}": value for name, value in rounded.items()}

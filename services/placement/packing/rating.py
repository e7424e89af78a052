"""What a policy is: it gives each node that has room for an ask a score; the highest wins, ties by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from services.placement.packing.fleet import PARTS, Ask, Fleet, NodeRoom

CPU_MAX_MILLI: Final = 128_000
GPUS_MAX: Final = 8
"""The largest node of the FGD artefact: what CPU and GPUs left are compared with."""
LINKED_SETS_MAX: Final = 100
"""So many sets of GPUs are compared by their links; 8 GPUs have at most 70 sets. Beyond, the first ones are taken."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A GPU with room for one part of the ask."""

    gpu_index: int
    units: int
    parts: int
    """The same in parts of this GPU."""
    free_parts: int


@dataclass(frozen=True, slots=True)
class Rating:
    """A node for an ask: the higher, the better. `gpu_indices` is which of its GPUs to take, ascending."""

    score: int
    gpu_indices: tuple[int, ...]


class Policy(ABC):
    """One way of rating. Without state of its own: what it knows of the cluster it gets by `informed`."""

    name: str

    def informed(self, fleet: Fleet, classes: Mapping[Ask, int]) -> "Policy":
        """This policy, told what the cluster is made of and how often each class is asked for."""
        return self

    @abstractmethod
    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        """How good this node is; it has room: `fits` are at least `ask.gpu_count` GPUs."""


def fits_on(room: NodeRoom, ask: Ask) -> list[Fit]:
    """The GPUs of this node with room for one part of the ask, by index; none for an ask without GPUs."""
    fits: list[Fit] = []
    for index, gpu in enumerate(room.shape.gpus):
        units = ask.units_on(gpu)
        if units is not None and units <= room.free_units[index]:
            parts = units * PARTS // gpu.capacity_units
            fits.append(Fit(index, units, parts, room.free_parts(index)))
    return fits


def tightest(ask: Ask, fits: Sequence[Fit], *, is_spread: bool) -> tuple[int, ...]:
    """The GPUs left with the least (spread: with the most); of equal ones the first."""
    sign = -1 if is_spread else 1
    ranked = sorted(fits, key=lambda fit: (sign * (fit.free_parts - fit.parts), fit.gpu_index))
    return tuple(sorted(fit.gpu_index for fit in ranked[: ask.gpu_count]))


def linked(room: NodeRoom, fits: Sequence[Fit], gpus: tuple[int, ...]) -> tuple[int, ...]:
    """These GPUs, or others that are left with as much and have better links; of equally good sets the first."""
    links = room.shape.links
    if len(gpus) <= 1 or not links or len(fits) == len(gpus):
        return gpus
    left = {fit.gpu_index: fit.free_parts - fit.parts for fit in fits}
    others = {left[gpu] for gpu in left if gpu not in gpus}
    sure = [gpu for gpu in gpus if left[gpu] not in others]
    equal = [gpu for gpu in left if left[gpu] in {left[gpu] for gpu in gpus} & others]
    missing = len(gpus) - len(sure)
    if not missing or math.comb(len(equal), missing) > LINKED_SETS_MAX:
        return gpus
    return min(
        (tuple(sorted([*sure, *some])) for some in combinations(equal, missing)),
        key=lambda some: (-sum(links[a][b] for a, b in combinations(some, 2)), some),
    )


def closeness(room: NodeRoom, ask: Ask, fits: Sequence[Fit], gpus: Sequence[int]) -> int:
    """``int(100 * (1 - cpu_left / (2 * 128k) - gpu_left / (2 * 8000)))`` after the ask has these GPUs."""
    parts = {fit.gpu_index: fit.parts for fit in fits}
    gpu_left = sum(room.free_parts(g) for g in range(len(room.free_units))) - sum(parts[g] for g in gpus)
    cpu_left = room.cpu_milli - ask.cpu_milli
    # Over the common denominator, so that nothing is rounded before the end.
    whole = 2 * CPU_MAX_MILLI * 2 * GPUS_MAX * PARTS
    return 100 * (whole - cpu_left * 2 * GPUS_MAX * PARTS - gpu_left * 2 * CPU_MAX_MILLI) // whole

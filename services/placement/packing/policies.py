"""How good a node is for an ask. A policy gives each node that has room a score; the highest wins, ties by name."""

import difflib
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from services.placement.packing.fleet import PARTS, Ask, Fleet, NodeRoom

DEFAULT_POLICY: Final = "best-fit"

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


class FirstFit(Policy):
    """The first node by name."""

    name = "first-fit"

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        return Rating(0, best_gpus(room, ask, fits, gpu_spread=gpu_spread))


class BestFit(Policy):
    """The node left with the least: half by its CPU against 128 cores, half by its GPUs against eight.

    The formula of the FGD artefact (ATC'23): ``int(100 * (1 - 0.5 * cpu_left / 128k - 0.5 * gpu_left / 8000))``.
    """

    name = "best-fit"

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        gpus = best_gpus(room, ask, fits, gpu_spread=gpu_spread)
        return Rating(_closeness(room, ask, fits, gpus), gpus)


class Spread(Policy):
    """The node left with the most, the GPU with the most: the opposite of `BestFit`."""

    name = "spread"

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        gpus = best_gpus(room, ask, fits, gpu_spread=True)
        return Rating(-_closeness(room, ask, fits, gpus), gpus)


POLICIES: Final[tuple[type[Policy], ...]] = (FirstFit, BestFit, Spread)


def policy_named(name: str) -> Policy:
    """Raises `ValueError` with the names that there are."""
    for policy in POLICIES:
        if policy.name == name:
            return policy()
    names = [policy.name for policy in POLICIES]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(names)}"
    raise ValueError(f"there is no placement policy '{name}'; {hint}")


def fits_on(room: NodeRoom, ask: Ask) -> list[Fit]:
    """The GPUs of this node with room for one part of the ask, by index; none for an ask without GPUs."""
    fits: list[Fit] = []
    if not ask.gpu_count:
        return fits
    for index, gpu in enumerate(room.shape.gpus):
        units = ask.units_on(gpu)
        if units is not None and units <= room.free_units[index]:
            parts = units * PARTS // gpu.capacity_units
            fits.append(Fit(index, units, parts, room.free_parts(index)))
    return fits


def best_gpus(room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool) -> tuple[int, ...]:
    """The tightest GPUs (with `gpu_spread`: the freest); among equally tight ones, those with the best links.

    Then the smallest indices.
    """
    count = ask.gpu_count
    sign = -1 if gpu_spread else 1
    ranked = sorted(fits, key=lambda fit: (sign * (fit.free_parts - fit.parts), fit.gpu_index))
    links = room.shape.links
    if count <= 1 or not links or len(ranked) == count:
        return tuple(sorted(fit.gpu_index for fit in ranked[:count]))
    left = ranked[count - 1].free_parts - ranked[count - 1].parts
    sure = [fit.gpu_index for fit in ranked[:count] if fit.free_parts - fit.parts != left]
    equal = [fit.gpu_index for fit in ranked if fit.free_parts - fit.parts == left]
    missing = count - len(sure)
    if math.comb(len(equal), missing) > LINKED_SETS_MAX:
        return tuple(sorted([*sure, *equal[:missing]]))
    return min(
        (tuple(sorted([*sure, *some])) for some in combinations(equal, missing)),
        key=lambda gpus: (-sum(links[a][b] for a, b in combinations(gpus, 2)), gpus),
    )


def sigmoid_levels(count: int) -> tuple[float, ...]:
    """Where ``int(count * sigmoid(x))`` steps up. Comparing with these needs no exponential: equal on every machine."""
    return tuple(math.log(level / (count - level)) for level in range(1, count))


def level_of(x: float, levels: Sequence[float]) -> int:
    """``int(count * sigmoid(x))`` of `sigmoid_levels(count)`."""
    return bisect_right(levels, x)


def _closeness(room: NodeRoom, ask: Ask, fits: Sequence[Fit], gpus: Sequence[int]) -> int:
    """In thousandths of the artefact's 100 points, before rounding to points: whole numbers all the way."""
    taken = {fit.gpu_index: fit.parts for fit in fits}
    gpu_left = sum(room.free_parts(g) for g in range(len(room.free_units))) - sum(taken[g] for g in gpus)
    cpu_left = room.cpu_milli - ask.cpu_milli
    # 100 * (1 - cpu/(2 * 128,000) - gpu/(2 * 8 * PARTS)), over their common denominator.
    whole = 256_000 * 16 * PARTS
    return 100 * (whole - cpu_left * 16 * PARTS - gpu_left * 256_000) // whole

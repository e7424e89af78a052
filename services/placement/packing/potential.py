"""Policies that give each node a value and choose the place that loses the least of it. FGD is one of them."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from services.placement.packing.fleet import PARTS, Ask, Fleet, GpuShape, NodeRoom
from services.placement.packing.hole_values import STEPS as HOLE_STEPS
from services.placement.packing.rating import Fit, Policy, Rating, tightest

Order = Literal["by-name", "fewest-gpus-first", "most-gpus-first"]
ORDER_SPAN: Final = 64
NO_HOLES: Final = (0,) * (HOLE_STEPS + 1)
WEIGHTS_MAX: Final = 1 << 30
RATE_MAX: Final = 64 * PARTS
"""A core that feeds so many GPUs is never short."""
TYPICAL_PERCENT: Final = 95
"""FGD looks at the most popular classes until they are so much of all asks."""


@dataclass(frozen=True, kw_only=True)
class Potential(Policy):
    """Score of a place: the node's value with the ask there, less its value now. All whole numbers, in any one unit.

    The value of a node is

    - less, for each of `typical`, its weight times the parts of GPUs that are free and of no use to it: all of them
      where it has no room on the node (CPU, GPUs), else those GPUs that it does not fit on (FGD's fragmentation);
    - less, for each of `shortages`, its weight times the free parts of GPUs beyond those that the node's free CPU can
      feed at so many parts for each core;
    - plus, for each GPU, `holes` of its kind at the thousandths of it that are free.
    """

    name: str
    typical: tuple[tuple[Ask, int], ...] = ()
    """(class, weight). Labels, memory and grade play no part."""
    shortages: tuple[tuple[int, int], ...] = ()
    """(parts of a GPU for each core, weight)"""
    holes: Mapping[GpuShape, tuple[int, ...]] = field(default_factory=dict)
    """{kind of GPU: [thousandths free]}; 0 for kinds that are not named."""
    steps: tuple[int, ...] = ()
    """Ascending: a score is how many of them it reaches, so that near-equal places are equal. Empty: it is itself."""
    is_gpu_by_step: bool = False
    """Whether GPUs of one node compare by steps too, the first of equals taken; else exactly, then the tighter one."""
    gpu_order: Order = "by-name"
    """Which of equally good nodes comes first, for asks with GPUs. Equal ones of them by name."""
    host_order: Order = "by-name"
    """The same for asks without GPUs."""

    def __post_init__(self) -> None:
        """Refuse numbers whose sums could pass 64 bits."""
        weights = [weight for _, weight in (*self.typical, *self.shortages)]
        if sum(map(abs, weights)) > WEIGHTS_MAX or any(not 0 <= rate <= RATE_MAX for rate, _ in self.shortages):
            raise ValueError(f"weights add up to at most {WEIGHTS_MAX}, a core feeds at most {RATE_MAX} parts of GPUs")
        tables = self.holes.values()
        if any(len(table) != HOLE_STEPS + 1 or max(map(abs, table)) > PARTS * WEIGHTS_MAX for table in tables):
            raise ValueError(f"a hole of each of {HOLE_STEPS + 1} sizes is worth at most {WEIGHTS_MAX} GPUs")

    def value(self, room: NodeRoom, cpu_milli: int, free_units: Sequence[int]) -> int:
        """Of the node with so much free. O(classes x GPUs)."""
        gpus = room.shape.gpus
        parts = [
            free * PARTS // gpu.capacity_units if free > 0 else 0 for gpu, free in zip(gpus, free_units, strict=True)
        ]
        total = sum(parts)
        holes = [self.holes.get(gpu, NO_HOLES) for gpu in gpus]
        value = sum(of_kind[free * HOLE_STEPS // PARTS] for of_kind, free in zip(holes, parts, strict=True))
        for ask, weight in self.typical:
            needs = [ask.units_on(gpu) for gpu in gpus]
            fits = [need is not None and need <= free for need, free in zip(needs, free_units, strict=True)]
            has_room = ask.gpu_count and ask.cpu_milli <= cpu_milli and sum(fits) >= ask.gpu_count
            useless = sum(free for free, is_fit in zip(parts, fits, strict=True) if not is_fit) if has_room else total
            value -= weight * useless
        for rate, weight in self.shortages:
            value -= weight * max(0, total - max(cpu_milli, 0) * rate // 1000)
        return value

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        before = self.value(room, room.cpu_milli, room.free_units)
        units = {fit.gpu_index: fit.units for fit in fits}

        def gain(gpus: Sequence[int]) -> int:
            free = [free - units[gpu] if gpu in gpus else free for gpu, free in enumerate(room.free_units)]
            return self.value(room, room.cpu_milli - ask.cpu_milli, free) - before

        if ask.gpu_count == 1 and not gpu_spread:
            gains = {fit.gpu_index: gain((fit.gpu_index,)) for fit in fits}
            if self.is_gpu_by_step:
                best = min(fits, key=lambda fit: (-self._stepped(gains[fit.gpu_index]), fit.gpu_index))
            else:
                best = min(fits, key=lambda fit: (-gains[fit.gpu_index], fit.free_parts - fit.parts, fit.gpu_index))
            gpus: tuple[int, ...] = (best.gpu_index,)
        else:
            gpus = tightest(ask, fits, is_spread=gpu_spread)
        return Rating(self._ordered(self._stepped(gain(gpus)), room, ask), gpus)

    def _stepped(self, gain: int) -> int:
        return bisect_right(self.steps, gain) if self.steps else gain

    def _ordered(self, score: int, room: NodeRoom, ask: Ask) -> int:
        order = self.gpu_order if ask.gpu_count else self.host_order
        count = len(room.shape.gpus)
        if order == "by-name":
            return score
        return score * ORDER_SPAN + (count if order == "most-gpus-first" else ORDER_SPAN - 1 - count)


def sigmoid_steps(count: int, unit: int) -> tuple[int, ...]:
    """Where ``int(count * sigmoid(x / unit))`` steps up, for whole x."""
    return tuple(math.ceil(unit * math.log(level / (count - level))) for level in range(1, count))


def typical_classes(classes: Mapping[Ask, int], *, percent: int = TYPICAL_PERCENT) -> tuple[tuple[Ask, int], ...]:
    """The most popular classes, by CPU, GPUs and models alone, until they cover so much of all asks; in that order."""
    counts: dict[Ask, int] = {}
    for ask, count in classes.items():
        bare = replace(ask, memory_bytes=0, labels=frozenset(), grade_rank=None)
        counts[bare] = counts.get(bare, 0) + count
    total = sum(counts.values())
    chosen: list[tuple[Ask, int]] = []
    covered = 0
    for ask, count in sorted(counts.items(), key=lambda item: (-item[1], _key(item[0]))):
        if 100 * covered >= percent * total:
            break
        chosen.append((ask, count))
        covered += count
    return tuple(chosen)


def _key(ask: Ask) -> tuple[object, ...]:
    """A total order of bare classes."""
    return ask.cpu_milli, ask.gpu_count, ask.size_units or 0, ask.portion or 0, tuple(sorted(ask.gpu_models))


class Fgd(Policy):
    """Fragmentation gradient descent (Weng et al., ATC'23): the place that makes the least free GPU useless.

    ``int(100 * sigmoid(fragmentation before - after, in GPUs))`` over the typical classes, those without GPUs included.
    """

    name = "fgd"

    def informed(self, fleet: Fleet, classes: Mapping[Ask, int]) -> Policy:
        typical = typical_classes(classes)
        unit = PARTS * (sum(weight for _, weight in typical) or 1)
        return Potential(name=self.name, typical=typical, steps=sigmoid_steps(100, unit), is_gpu_by_step=True)

    def rate(self, room: NodeRoom, ask: Ask, fits: Sequence[Fit], *, gpu_spread: bool = False) -> Rating:
        raise AssertionError("FGD rates once it is informed of the classes")

"""A policy as tables for the kernels."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from services.placement.packing import columns
from services.placement.packing.columns import Ints
from services.placement.packing.fleet import PARTS, Ask, GpuShape
from services.placement.packing.potential import NO_HOLES, Order, Potential
from services.placement.packing.rating import Policy

FORMULAS: Final = {
    "first-fit": columns.FIRST_FIT,
    "best-fit": columns.BEST_FIT,
    "spread": columns.SPREAD,
    "dot-product": columns.DOT_PRODUCT,
    "random": columns.FIRST_FIT,
}
ORDERS: Final[dict[Order, int]] = {
    "by-name": columns.BY_NAME,
    "fewest-gpus-first": columns.FEWEST_GPUS_FIRST,
    "most-gpus-first": columns.MOST_GPUS_FIRST,
}
NEVER: Final = int(np.iinfo(np.int64).max)
"""Units that no GPU has free."""


class _Table:
    """One flat array: a head, and tables behind it."""

    def __init__(self) -> None:
        self.head = [0] * columns.HEAD_LENGTH
        self._tables: list[Ints] = []
        self._length = columns.HEAD_LENGTH

    def put(self, at: int, table: Ints) -> None:
        self.head[at] = self._length
        self._tables.append(table.ravel())
        self._length += table.size

    def whole(self) -> Ints:
        return np.concatenate([ints(self.head), *self._tables])


def rules_of(policy: Policy, kinds: Sequence[GpuShape]) -> Ints:
    """For GPUs of these kinds. `policy` is informed already."""
    potential = policy if isinstance(policy, Potential) else Potential(name=policy.name)
    singles = [(ask, weight) for ask, weight in potential.typical if ask.gpu_count == 1]
    several = [(ask, weight) for ask, weight in potential.typical if ask.gpu_count > 1]
    cpu_steps = sorted({ask.cpu_milli for ask, _ in (*singles, *several)})
    table = _Table()
    head = table.head
    head[columns.FORMULA] = columns.POTENTIAL if policy is potential else FORMULAS[policy.name]
    head[columns.GPU_ORDER] = ORDERS[potential.gpu_order]
    head[columns.HOST_ORDER] = ORDERS[potential.host_order]
    head[columns.GPU_BY_STEP] = int(potential.is_gpu_by_step)
    head[columns.SINGLE_WEIGHT] = sum(weight for ask, weight in potential.typical if ask.gpu_count <= 1)
    head[columns.STEP_COUNT] = len(potential.steps)
    head[columns.CPU_STEP_COUNT] = len(cpu_steps)
    head[columns.SHORTAGE_COUNT] = len(potential.shortages)
    head[columns.KIND_COUNT] = len(kinds)
    table.put(columns.CAPACITY_AT, ints([kind.capacity_units for kind in kinds]))
    table.put(columns.STEPS_AT, ints(potential.steps))
    table.put(columns.CPU_STEPS_AT, ints(cpu_steps))
    holes = [potential.holes.get(kind, NO_HOLES) for kind in kinds]
    table.put(columns.HOLES_AT, ints([worth for of_kind in holes for worth in of_kind]))
    table.put(columns.SHORTAGES_AT, ints([number for shortage in potential.shortages for number in shortage]))
    _put_singles(table, singles, cpu_steps, kinds)
    _put_sets(table, several, cpu_steps, kinds)
    return table.whole()


def ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def ask_of(ask: Ask, kinds: Sequence[GpuShape], labels: Sequence[frozenset[str]], *, gpu_spread: bool) -> Ints:
    """An ask for the kernels: `columns` says how it lies."""
    values = [ask.gpu_count, ask.cpu_milli, ask.memory_bytes, int(gpu_spread), columns.ASK_NEEDS + 2 * len(kinds)]
    for need, kind in zip(needs_of(ask, kinds), kinds, strict=True):
        values += [
            min(need, kind.capacity_units + 1),
            max(0, min(need, kind.capacity_units)) * PARTS // kind.capacity_units,
        ]
    return ints([*values, *(ask.labels <= of_node for of_node in labels)])


def needs_of(ask: Ask, kinds: Sequence[GpuShape]) -> list[int]:
    """[kind] the units that it takes of such a GPU; -1 where it cannot be on one."""
    units = [ask.units_on(kind) for kind in kinds]
    return [-1 if need is None else need for need in units]


def _put_singles(
    table: _Table, singles: Sequence[tuple[Ask, int]], cpu_steps: Sequence[int], kinds: Sequence[GpuShape]
) -> None:
    of_ask = [needs_of(ask, kinds) for ask, _ in singles]
    levels = [sorted({needs[k] for needs in of_ask if needs[k] >= 0}) for k in range(len(kinds))]
    width = max((len(level) for level in levels), default=0)
    needs = np.full((len(kinds), width), NEVER, dtype=np.int64)
    weights = np.zeros((len(kinds), len(cpu_steps) + 1, width + 1), dtype=np.int64)
    for k, level in enumerate(levels):
        needs[k, : len(level)] = level
        for (ask, weight), need in zip(singles, of_ask, strict=True):
            if need[k] >= 0:
                weights[k, cpu_steps.index(ask.cpu_milli) + 1, level.index(need[k]) + 1] += weight
    table.head[columns.NEED_COUNT] = width
    table.put(columns.NEEDS_AT, needs)
    table.put(columns.FIT_WEIGHTS_AT, weights.cumsum(axis=1).cumsum(axis=2))


def _put_sets(
    table: _Table, several: Sequence[tuple[Ask, int]], cpu_steps: Sequence[int], kinds: Sequence[GpuShape]
) -> None:
    """Classes that need the same of each GPU are one group, whatever number of GPUs and CPU they ask for."""
    groups: dict[tuple[int, ...], list[tuple[Ask, int]]] = {}
    for ask, weight in several:
        groups.setdefault(tuple(needs_of(ask, kinds)), []).append((ask, weight))
    weights = np.zeros((len(groups), len(cpu_steps) + 1, columns.SET_WIDTH), dtype=np.int64)
    for s, members in enumerate(groups.values()):
        for ask, weight in members:
            if ask.gpu_count < columns.SET_WIDTH:
                weights[s, cpu_steps.index(ask.cpu_milli) + 1, ask.gpu_count] += weight
    table.head[columns.SET_COUNT] = len(groups)
    table.put(columns.SET_NEEDS_AT, ints([need for needs in groups for need in needs]))
    table.put(columns.SET_FIT_WEIGHTS_AT, weights.cumsum(axis=1).cumsum(axis=2))
    table.put(columns.SET_WEIGHTS_AT, ints([sum(weight for _, weight in members) for members in groups.values()]))

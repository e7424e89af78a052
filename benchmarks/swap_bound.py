"""What a swap policy is held against: one that knows the future, and what none can pass."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.swap_world import SIZES_BYTES, USABLE_BYTES, Request, Sized
from services.swapper.policies.port import Worth

DESCENT_STEP_COUNT: Final = 200
"""Each step's prices give a valid bound; more steps make it a little tighter."""
NEVER_S: Final = 1e12
NEXT_S_MIN: Final = 1e-3


class Belady:
    """Knows when each model comes next: load seconds over the time until then. Greedy, and it never prefetches."""

    adds = True

    def __init__(self, requests: Sequence[Request]) -> None:
        self._arrivals_s: dict[str, list[float]] = {}
        for request in requests:
            self._arrivals_s.setdefault(request.model, []).append(request.t_s)

    def used(self, key: str, *, now_s: float, was_idle: bool) -> None:
        pass

    def rested(self, key: str, *, now_s: float) -> None:
        pass

    def restored(self, key: str, *, now_s: float, restore_s: float, size_bytes: int) -> None:
        pass

    def parked(self, key: str, *, now_s: float) -> None:
        pass

    def forgotten(self, key: str) -> None:
        pass

    def worth(self, key: str, *, now_s: float, since_s: float, restore_s: float, size_bytes: int) -> Worth:
        arrivals_s = self._arrivals_s[key]
        index = bisect.bisect_right(arrivals_s, now_s)
        next_s = arrivals_s[index] - now_s if index < len(arrivals_s) else NEVER_S
        return (restore_s / max(next_s, NEXT_S_MIN),)


def bound_added_s_mean(requests: Sequence[Request], sizes: Mapping[str, Sized], *, gpu_count: int) -> float:
    """A floor of the mean added latency when nothing is prefetched: the load seconds that cannot be saved.

    Between two uses of a model it is kept, which saves its load, or not; what is kept at one time fits all GPUs'
    memory together, beside the model in use. Parts may be kept, nothing runs on, and a model beside which none fits
    counts as a whole GPU. The bound is the linear program's, from below by its dual: any prices per byte will do.
    """
    order = [request.model for request in requests]
    points = [model for index, model in enumerate(order) if index == 0 or order[index - 1] != model]
    charged = {key: _charged_bytes(size) for key, size in sizes.items()}
    room = np.array([gpu_count * USABLE_BYTES - charged[model] for model in points], dtype=float)
    last: dict[str, int] = {}
    rows = []
    loads_s = 0.0
    for index, model in enumerate(points):
        loads_s += sizes[model].load_s
        if model in last:
            rows.append((last[model] + 1, index, charged[model], sizes[model].load_s))
        last[model] = index
    if not rows:
        return loads_s / len(requests)
    saved_s = _saved_s_most(room, np.array(rows, dtype=float))
    return (loads_s - saved_s) / len(requests)


def _charged_bytes(size: Sized) -> int:
    smallest = Sized(weights_bytes=min(SIZES_BYTES)).held_bytes
    return USABLE_BYTES if size.held_bytes + smallest > USABLE_BYTES else size.held_bytes


def _saved_s_most(room: NDArray[np.float64], rows: NDArray[np.float64]) -> float:
    """Least dual value found.

    Prices go down the subgradient by the part of the way that an optimum some per cent below would allow (Polyak's
    step, with a goal that draws nearer).
    """
    begins, ends = rows[:, 0].astype(int), rows[:, 1].astype(int)
    scale = float(USABLE_BYTES)
    sizes, saves = rows[:, 2] / scale, rows[:, 3]
    room = room / scale
    prices = np.zeros(len(room))
    best = float(saves.sum())
    nearness = 0.1
    since_better = 0
    for _ in range(DESCENT_STEP_COUNT):
        sums = np.concatenate(([0.0], np.cumsum(prices)))
        gains = saves - sizes * (sums[ends] - sums[begins])
        kept = gains > 0
        value = float(prices @ room + gains[kept].sum())
        since_better += 1
        if value < best:
            best, since_better = value, 0
        elif since_better > 10:
            nearness, since_better = nearness / 2, 0
        change = np.zeros(len(room) + 1)
        np.add.at(change, begins[kept], sizes[kept])
        np.add.at(change, ends[kept], -sizes[kept])
        slope = room - np.cumsum(change)[:-1]
        length = float(slope @ slope)
        if length <= 0:
            break
        prices = np.maximum(0.0, prices - slope * ((value - best * (1 - nearness)) / length))
    return best

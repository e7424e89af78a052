"""What the free part of a GPU is worth to the asks that are likely to come: the dual prices of packing them into GPUs.

A GPU is a bin, an ask for a part of it an item. The linear program of Gilmore and Gomory (Operations Research 9, 1961)
packs a given mix into the fewest bins, each filled by a *pattern*, a set of items that fits:

    min sum(x_p)   so that for each size i: sum(count of i in p * x_p) >= share of i in the mix,   x >= 0

Its dual gives each size a price, so that no pattern costs more than one bin: the part of a GPU that an ask of this size
really takes. A size of 0.81 that leaves 0.19, for which nobody asks, costs a whole GPU; 0.47 costs half a one when two
of them go together; 0.16 costs nothing while there are more rests of 0.19 than asks for 0.16. What fits best into a
hole, by these prices, is what the hole is worth. Putting an ask where the worth falls by more than its price spoils
room: there was a better use for it.

The program depends on the mix alone: not on how full the cluster is, how much will be asked for, or in which order.
Solved by column generation in plain floating-point arithmetic, without libraries: the same on every machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Final

STEPS: Final = 1000
"""Sizes and holes are counted in thousandths of a GPU, rounded down: parts that fill a GPU exactly still do."""
SIZES_MAX: Final = 32
"""So many sizes are looked at, those that take most of all GPUs asked for. 32 odd ones take about 15 ms."""
PIVOTS_MAX: Final = 400
"""32 random sizes needed 62. Beyond, the prices so far are taken: they cost no pattern more than a GPU either."""
TOLERANCE: Final = 1e-9
SPREAD: Final = 1e-7
"""Shares in the mix are made unequal by so much, for equal ones have no unique prices."""


def hole_values(demand: Mapping[int, int]) -> tuple[float, ...]:
    """[thousandths free] the worth of such a hole in GPUs, from 0 to 1, never falling; an idle GPU is worth 1.

    `demand` is {size in thousandths: how many are asked for}; sizes outside 1 to `STEPS` count for nothing. Without
    demand only an idle GPU is worth anything: whatever comes goes to the fullest GPU.
    """
    asked = tuple(sorted((size, count) for size, count in demand.items() if 0 < size <= STEPS and count > 0))
    return _hole_values(asked) if asked else (*(0.0 for _ in range(STEPS)), 1.0)


@lru_cache(maxsize=64)  # Nodes come and go more often than the mix changes.
def _hole_values(demand: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    asked = dict(demand)
    largest = sorted(asked, key=lambda size: (-size * asked[size], size))[:SIZES_MAX]
    step = gcd(STEPS, *largest)
    sizes = sorted(size // step for size in largest)
    total = sum(asked[size] for size in largest)
    shares = [asked[size * step] / total * (1 + SPREAD * (i + 1)) for i, size in enumerate(sizes)]
    values = _Program(sizes, shares, STEPS // step).solve()
    return tuple(values[hole // step] for hole in range(STEPS + 1))


@dataclass(slots=True)
class _Filling:
    """The best way to fill a bin at given prices."""

    values: list[float]
    """[hole] never falling."""
    counts: list[int]
    """[size] of what fills a whole bin."""


class _Program:
    """The revised simplex method: a basis of patterns, its inverse, and how often each pattern is used."""

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], whole: int) -> None:
        count = len(sizes)
        self.sizes = sizes
        self.whole = whole
        self.ways = _ways(sizes, whole)
        # Start: each size alone in a bin, as often as it fits.
        fits = [whole // size for size in sizes]
        self.inverse = [[1 / fits[row] if row == i else 0.0 for i in range(count)] for row in range(count)]
        self.used = [share / fit for share, fit in zip(shares, fits, strict=True)]
        self.costs = [1.0] * count

    def solve(self) -> list[float]:
        """[hole] its worth, divided by that of a whole bin."""
        rows = range(len(self.sizes))
        for _ in range(PIVOTS_MAX):
            prices = self._prices()
            low = min(rows, key=lambda i: (prices[i], i))
            if prices[low] < -TOLERANCE:
                # More of this size than was asked for: cheaper than exactly as many.
                self._enter([-self.inverse[row][low] for row in rows], cost=0.0)
                continue
            filling = self._fill(prices)
            if filling.values[-1] <= 1 + TOLERANCE:
                break
            counts = filling.counts
            column = [sum(self.inverse[row][i] * counts[i] for i in rows if counts[i]) for row in rows]
            self._enter(column, cost=1.0)
        values = self._fill([max(0.0, price) for price in self._prices()]).values
        return [value / values[-1] for value in values]

    def _prices(self) -> list[float]:
        rows = range(len(self.sizes))
        return [sum(self.costs[row] * self.inverse[row][i] for row in rows) for i in rows]

    def _fill(self, prices: Sequence[float]) -> _Filling:
        """Knapsack over all holes, each size as often as wanted. O(ways)."""
        best = [0.0] * (self.whole + 1)
        last = [-1] * (self.whole + 1)
        values = [0.0] * (self.whole + 1)
        fullest = 0
        for hole in range(1, self.whole + 1):
            for size_index, rest in self.ways[hole]:
                value = best[rest] + prices[size_index]
                if last[hole] < 0 or value > best[hole]:
                    best[hole], last[hole] = value, size_index
            values[hole] = values[hole - 1]
            if last[hole] >= 0 and best[hole] > values[hole]:
                values[hole], fullest = best[hole], hole
        counts = [0] * len(self.sizes)
        while fullest:
            counts[last[fullest]] += 1
            fullest -= self.sizes[last[fullest]]
        return _Filling(values, counts)

    def _enter(self, column: Sequence[float], *, cost: float) -> None:
        """Take a column into the basis, for the one that it drives out first (of equals the first)."""
        rows = range(len(self.sizes))
        out = min((row for row in rows if column[row] > TOLERANCE), key=lambda row: (self.used[row] / column[row], row))
        amount = self.used[out] / column[out]
        self.used = [amount if row == out else self.used[row] - amount * column[row] for row in rows]
        pivot = [value / column[out] for value in self.inverse[out]]
        for row in rows:
            if row == out:
                self.inverse[row] = pivot
            elif column[row]:
                factor = column[row]
                self.inverse[row] = [old - factor * new for old, new in zip(self.inverse[row], pivot, strict=True)]
        self.costs[out] = cost


def _ways(sizes: Sequence[int], whole: int) -> list[list[tuple[int, int]]]:
    """[hole] (index of the last item, what it leaves to the others) for each way to fill it exactly."""
    ways: list[list[tuple[int, int]]] = [[] for _ in range(whole + 1)]
    for hole in range(1, whole + 1):
        for i, size in enumerate(sizes):
            if size == hole or (size < hole and ways[hole - size]):
                ways[hole].append((i, hole - size))
    return ways

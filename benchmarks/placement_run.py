"""One run of the openb protocol: a list of pods, a policy, a seed."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.openb import ARRIVALS_PERCENT, MILLI, Cluster, PodList, gpu_milli_of
from benchmarks.report import quantile
from services.placement.packing.fleet import Ask, Place
from services.placement.packing.hole_values import STEPS, hole_values
from services.placement.packing.index import Packer
from services.placement.packing.policies import Random, policy_named
from services.placement.packing.rating import Policy

NS_PER_US: Final = 1000


@dataclass(frozen=True, slots=True)
class Held:
    """One pod that found a place."""

    ask: Ask
    place: Place


Mover = Callable[[Packer, Ask, list[Held]], tuple[Place | None, int]]
"""Called after an arrival that fits nowhere: may move what is held (in the fleet and in the list) to make room for it.

Answers with the place of the arrival, not taken yet, or None; and how many were moved.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of it."""

    seed: int
    arrival_count: int
    dropped_count: int
    moved_count: int
    allocated_percent: float
    """Of the cluster's GPU milli, once arrivals ask for `ARRIVALS_PERCENT`."""
    repack_frees_percent: float
    """Of the GPUs: so many at most would be idle after any repacking of all pods that were placed (by their prices in
    `hole_values`; CPU and memory would only make it less)."""
    curve: tuple[float, ...]
    """[percent of the cluster's GPUs asked for so far] allocated percent."""
    decision_ns: tuple[int, ...]
    """Of each arrival: choosing and taking, the index's upkeep included; moves are not."""
    run_s: float

    def decision_us(self, percent: int) -> float:
        nanoseconds = quantile(self.decision_ns, percent / 100)
        assert nanoseconds is not None
        return nanoseconds / NS_PER_US

    @property
    def decision_us_mean(self) -> float:
        return statistics.fmean(self.decision_ns) / NS_PER_US


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """One list under one policy, all seeds."""

    pods: str
    policy: str
    runs: tuple[Run, ...]

    @property
    def allocated_percent(self) -> float:
        return statistics.fmean(run.allocated_percent for run in self.runs)

    @property
    def spread_percent(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(run.allocated_percent for run in self.runs) if len(self.runs) > 1 else 0.0

    def decision_us(self, percent: int) -> float:
        """The median over the seeds."""
        return statistics.median(run.decision_us(percent) for run in self.runs)

    @property
    def decision_us_mean(self) -> float:
        return statistics.median(run.decision_us_mean for run in self.runs)

    @property
    def run_s(self) -> float:
        return statistics.median(run.run_s for run in self.runs)

    @property
    def repack_frees_percent(self) -> float:
        return statistics.fmean(run.repack_frees_percent for run in self.runs)

    @property
    def moved_count(self) -> float:
        return statistics.fmean(run.moved_count for run in self.runs)

    @property
    def curve(self) -> tuple[float, ...]:
        return tuple(statistics.fmean(values) for values in zip(*(run.curve for run in self.runs), strict=True))


def policy_of(name: str, seed: int) -> Policy:
    return Random(seed) if name == Random.name else policy_named(name)


def carry_out(
    cluster: Cluster, pods: PodList, policy: str, seed: int, *, is_compiled: bool, mover: Mover | None = None
) -> Run:
    """All arrivals, one after the other. Every class is rated once before the clock starts, as a service does it."""
    fleet = cluster.fleet()
    arrivals = pods.arrivals(seed, cluster.gpu_milli)
    packer = Packer(fleet, policy_of(policy, seed), classes=pods.classes, is_compiled=is_compiled)
    packer.warm(pods.classes)
    held: list[Held] = []
    decision_ns: list[int] = []
    curve = _Curve(cluster.gpu_milli)
    moved_count = 0
    clock = time.perf_counter_ns
    gc.collect()
    gc.freeze()
    gc.disable()
    began_ns = clock()
    try:
        for ask in arrivals:
            start_ns = clock()
            place = packer.choose(ask)
            if place is not None:
                fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
            decision_ns.append(clock() - start_ns)
            if place is None and mover is not None:
                place, moves = mover(packer, ask, held)
                moved_count += moves
                if place is not None:
                    fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
            if place is not None:
                held.append(Held(ask, place))
            curve.arrived(gpu_milli_of(ask), is_placed=place is not None)
    finally:
        run_s = (clock() - began_ns) / 1e9
        gc.enable()
        gc.unfreeze()
    return Run(
        seed=seed,
        arrival_count=len(arrivals),
        dropped_count=len(arrivals) - len(held),
        moved_count=moved_count,
        allocated_percent=curve.allocated_percent,
        repack_frees_percent=_repack_frees_percent(cluster, held),
        curve=curve.points(),
        decision_ns=tuple(decision_ns),
        run_s=run_s,
    )


def _repack_frees_percent(cluster: Cluster, held: Sequence[Held]) -> float:
    demand: Counter[int] = Counter()
    for pod in held:
        if pod.ask.gpu_count:
            demand[(pod.ask.size_units or 0) * STEPS // MILLI] += pod.ask.gpu_count
    values = hole_values(demand)
    gpu_count = cluster.gpu_milli / MILLI
    used = sum(values[size] * count for size, count in demand.items())
    return 100 * (gpu_count - used) / gpu_count


class _Curve:
    """Allocated against asked for, at each percent."""

    def __init__(self, capacity_milli: int) -> None:
        self._capacity_milli = capacity_milli
        self._asked_milli = 0
        self._allocated_milli = 0
        self._points: list[float] = []

    @property
    def allocated_percent(self) -> float:
        return 100 * self._allocated_milli / self._capacity_milli

    def arrived(self, milli: int, *, is_placed: bool) -> None:
        self._asked_milli += milli
        while len(self._points) * self._capacity_milli <= 100 * (self._asked_milli - milli):
            self._points.append(self.allocated_percent)
        if is_placed:
            self._allocated_milli += milli

    def points(self) -> tuple[float, ...]:
        missing = ARRIVALS_PERCENT + 1 - len(self._points)
        return (*self._points[: ARRIVALS_PERCENT + 1], *([self.allocated_percent] * missing))


def seeds_of(text: str) -> tuple[int, ...]:
    """``100-109``, ``100``, ``100,105-107``. Raises `ValueError` with one sentence."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"'{part}' is neither a seed nor a range of seeds such as 100-109")
        seeds += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(seeds))


def differences(ours: Runs, others: Runs) -> Sequence[float]:
    """Points of allocation that we are ahead, seed by seed."""
    of_seed = {run.seed: run.allocated_percent for run in others.runs}
    return [run.allocated_percent - of_seed[run.seed] for run in ours.runs]

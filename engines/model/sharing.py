"""Several engines on one GPU: how fast each one's step goes on while others have steps of their own in progress.

Two ways to share, as CUDA offers them:

- `time-sliced` (what a GPU does without MPS): the kernels of one process at a time. Processes that want the GPU take
  turns of `slice_s`; each turn costs a switch, in which the GPU computes nothing.
- `mps`: kernels of all run at once. Each goes at its full speed while the sum of what they need of arithmetic and of
  bandwidth fits the GPU; beyond that they slow down evenly until it does. A cap on the SMs bounds one engine's
  arithmetic; a memory-bound kernel gets its bandwidth from few SMs and is bounded only by what others need.

Pure: `progress_rates` is a function, `SharedGpu` a machine that its caller advances by any dt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engines.model.timing import StepCost

SharingMode = Literal["time-sliced", "mps"]
SHARING_MODES: tuple[SharingMode, ...] = ("time-sliced", "mps")

# The shortest time slice that `nvidia-smi compute-policy --set-timeslice` names; taken as the default one's length.
SLICE_S = 0.002
# What concurrent kernels lose to each other in caches and DRAM rows. An assumption: nobody publishes it.
MPS_LOSS_FRACTION = 0.05
_SMALL = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one engine's kernels need of the GPU to go at full speed: parts of its arithmetic and of its bandwidth."""

    compute_fraction: float
    memory_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How one GPU is shared. `sm_fraction`: the cap on one engine's SMs under MPS, 0 to 1."""

    mode: SharingMode = "time-sliced"
    slice_s: float = SLICE_S
    switch_s: float = 0.0
    sm_fraction: float = 1.0
    mps_loss_fraction: float = MPS_LOSS_FRACTION


def progress_rates(sharing: Sharing, demands: Sequence[Demand]) -> tuple[float, ...]:
    """For each engine whose kernels want the GPU now: its speed, 0 to 1, where 1 is that of a GPU of its own.

    Time-sliced, the rates sum to at most 1. Under MPS, the needs times the rates sum to at most 1 for the arithmetic
    and for the bandwidth.
    """
    if not demands:
        return ()
    if sharing.mode == "time-sliced":
        if len(demands) == 1:
            return (1.0,)
        return (sharing.slice_s / (sharing.slice_s + sharing.switch_s) / len(demands),) * len(demands)
    return _concurrent_rates(sharing, demands)


def _concurrent_rates(sharing: Sharing, demands: Sequence[Demand]) -> tuple[float, ...]:
    """Raise all rates together; whoever reaches its cap, or needs what is used up, stops there."""
    room = 1.0 if len(demands) == 1 else 1.0 - sharing.mps_loss_fraction
    needs = [(demand.compute_fraction, demand.memory_fraction) for demand in demands]
    caps = [min(1.0, sharing.sm_fraction / max(compute, _SMALL)) for compute, _ in needs]
    rates = [0.0] * len(demands)
    left = [room, room]
    open_ = set(range(len(demands)))
    while open_:
        steps = [min(caps[i] - rates[i] for i in open_)]
        for kind in (0, 1):
            need = sum(needs[i][kind] for i in open_)
            if need > _SMALL:
                steps.append(left[kind] / need)
        step = max(min(steps), 0.0)
        for i in open_:
            rates[i] += step
        for kind in (0, 1):
            left[kind] -= step * sum(needs[i][kind] for i in open_)
        stopped = {i for i in open_ if rates[i] >= caps[i] - _SMALL}
        for kind in (0, 1):
            if left[kind] <= _SMALL:
                stopped |= {i for i in open_ if needs[i][kind] > _SMALL}
        open_ -= stopped
    return tuple(rates)


def demand_of(cost: StepCost) -> Demand:
    """What a step's kernels need. The gaps between them are spread over the step, so that they lower the need."""
    if cost.device_s <= _SMALL:
        return Demand(compute_fraction=0.0, memory_fraction=0.0)
    return Demand(
        compute_fraction=min(cost.compute_s / cost.device_s, 1.0),
        memory_fraction=min(cost.memory_s / cost.device_s, 1.0),
    )


@dataclass(slots=True)
class StepProgress:
    """What is left of one step: first of the host's part, then of the device's, in seconds at full speed."""

    demand: Demand
    host_s: float
    device_s: float

    @classmethod
    def of(cls, cost: StepCost) -> StepProgress:
        return cls(demand_of(cost), cost.host_s, cost.device_s)

    @property
    def is_done(self) -> bool:
        return self.host_s <= _SMALL and self.device_s <= _SMALL

    @property
    def wants_gpu(self) -> bool:
        return self.host_s <= _SMALL

    def phase_left_s(self, rate: float) -> float:
        """Time to the end of the part that runs now, at that speed."""
        if self.host_s > _SMALL:
            return self.host_s
        return self.device_s / rate if rate > _SMALL else float("inf")

    def advance(self, dt_s: float, rate: float) -> None:
        """Go on by `dt_s` of time at that speed, at most to the end of the part that runs now."""
        if self.host_s > _SMALL:
            self.host_s = max(self.host_s - dt_s, 0.0)
        else:
            self.device_s = max(self.device_s - dt_s * rate, 0.0)


class SharedGpu:
    """The steps in progress on one GPU. An engine has at most one; engines are known by number."""

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self._steps: dict[int, StepProgress] = {}

    def start(self, engine: int, cost: StepCost) -> None:
        """A step begins now."""
        assert engine not in self._steps, engine
        self._steps[engine] = StepProgress.of(cost)

    @property
    def is_idle(self) -> bool:
        return not self._steps

    def rates(self) -> dict[int, float]:
        """The speed of each step in progress, by engine; 1 for one whose host phase runs."""
        wanting = {engine: step.demand for engine, step in self._steps.items() if step.wants_gpu}
        shared = progress_rates(self.sharing, tuple(wanting.values()))
        return dict.fromkeys(self._steps, 1.0) | dict(zip(wanting, shared, strict=True))

    def next_change_s(self) -> float:
        """Time to the next end of a phase; infinite when nothing is in progress."""
        rates = self.rates()
        return min((step.phase_left_s(rates[engine]) for engine, step in self._steps.items()), default=float("inf"))

    def advance(self, dt_s: float) -> tuple[int, ...]:
        """Go on by any time; the engines whose steps ended, in order of their ends. Rates change within dt."""
        ended: list[int] = []
        while dt_s > 0 and self._steps:
            rates = self.rates()
            lap_s = min(dt_s, self.next_change_s())
            for engine, step in self._steps.items():
                step.advance(lap_s, rates[engine])
            done = [engine for engine, step in self._steps.items() if step.is_done]
            for engine in done:
                del self._steps[engine]
            ended += done
            dt_s -= lap_s
        return tuple(ended)

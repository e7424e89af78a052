"""A world of models that share GPUs by swapping, in virtual time: every request, every load, and who gives way.

The decisions are the swapper's own (`services/swapper/policies`). The rest is stated here: weights stay in host memory,
a load takes a fixed part and its bytes over its GPU's link, one at a time; parking is free, a model that runs or loads
stays, and any number of requests run beside one another without slowing each other down.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from services.swapper.policies.port import Policy
from services.swapper.policies.selection import Candidate, Choice, chosen

GB: Final = 10**9
SIZES_BYTES: Final = (14_500_000_000, 14_500_000_000, 16_100_000_000, 24_500_000_000, 28_000_000_000, 60_000_000_000)
"""Weights, dealt to models by seed."""
USABLE_BYTES: Final = 76 * GB
KV_FRACTION: Final = 0.15
LOAD_FIXED_S: Final = 0.25
LINK_BYTES_PER_S: Final = 50 * GB
FIRST_S: Final = 0.05
INPUT_TOKENS_PER_S: Final = 8000
OUTPUT_TOKEN_S: Final = 0.015
PRIORITY: Final = 125
PARKED, LOADING, RESIDENT = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    t_s: float
    model: str
    service_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """What one model takes."""

    weights_bytes: int

    @property
    def held_bytes(self) -> int:
        return round(self.weights_bytes * (1 + KV_FRACTION))

    @property
    def load_s(self) -> float:
        return LOAD_FIXED_S + self.weights_bytes / LINK_BYTES_PER_S


def service_s(input_tokens: int, output_tokens: int) -> float:
    return FIRST_S + input_tokens / INPUT_TOKENS_PER_S + OUTPUT_TOKEN_S * output_tokens


def dealt(models: Sequence[str], *, seed: int) -> dict[str, Sized]:
    """Sizes in turn, as many as there are models, in an order drawn with the seed; `models` in order of appearance."""
    sizes = np.random.default_rng(seed).permutation(np.resize(SIZES_BYTES, len(models)))
    return {name: Sized(weights_bytes=int(size)) for name, size in zip(models, sizes, strict=True)}


@dataclass(slots=True)
class Tally:
    """What came of all requests. Added latency: model ready minus arrival."""

    added_s: list[float] = field(default_factory=list)
    load_count: int = 0
    loading_s: float = 0.0
    held_byte_s: float = 0.0
    length_s: float = 0.0
    gpu_count: int = 1

    @property
    def added_s_mean(self) -> float:
        return sum(self.added_s) / max(1, len(self.added_s))

    @property
    def warm_hit_percent(self) -> float:
        return 100 * sum(1 for s in self.added_s if s <= 0) / max(1, len(self.added_s))

    @property
    def over_1s_percent(self) -> float:
        return 100 * sum(1 for s in self.added_s if s > 1) / max(1, len(self.added_s))

    @property
    def resident_gb_mean(self) -> float:
        return self.held_byte_s / GB / self.length_s if self.length_s else 0.0

    @property
    def link_busy_percent(self) -> float:
        return 100 * self.loading_s / (self.length_s * self.gpu_count) if self.length_s else 0.0


@dataclass(slots=True)
class _Model:
    key: str
    size: Sized
    tier: int = PARKED
    gpu: int = -1
    ready_s: float = 0.0
    busy_until_s: float = 0.0
    """Its last request ends then; beyond now: it runs or loads."""
    is_running: bool = False
    since_s: float = 0.0
    waiting: list[Request] = field(default_factory=list)
    """Requests that no GPU has room for yet."""


@dataclass(slots=True)
class _Gpu:
    name: str
    free_bytes: int
    link_free_s: float = 0.0
    models: list[_Model] = field(default_factory=list)


class World:
    """One run: `run` gives its tally."""

    def __init__(self, sizes: dict[str, Sized], *, gpu_count: int, policy: Policy) -> None:
        self._policy = policy
        self._models = {key: _Model(key=key, size=size) for key, size in sizes.items()}
        self._gpus = [_Gpu(name=f"gpu-{index}", free_bytes=USABLE_BYTES) for index in range(gpu_count)]
        self._ends: list[tuple[float, str]] = []
        """(when a running model may rest, its key): one entry for each that runs"""
        self._queue: list[_Model] = []
        """Who waits for room, longest first"""
        self.tally = Tally(gpu_count=gpu_count)

    def run(self, requests: Sequence[Request]) -> Tally:
        for request in requests:
            self._rest_until(request.t_s)
            self._arrive(request)
        self._rest_until(float("inf"))
        assert not self._queue, "a model that fits no GPU was asked for"
        for gpu in self._gpus:
            for model in list(gpu.models):
                self._leave(model, self.tally.length_s)
        return self.tally

    def _rest_until(self, now_s: float) -> None:
        ends = self._ends
        while ends and ends[0][0] <= now_s:
            at_s, key = heapq.heappop(ends)
            model = self._models[key]
            if model.busy_until_s > at_s:
                heapq.heappush(ends, (model.busy_until_s, key))
                continue
            model.is_running, model.tier = False, RESIDENT
            self._policy.rested(key, now_s=at_s)
            self._pass(at_s)
            self._admit(at_s)

    def _pass(self, now_s: float) -> None:
        self.tally.length_s = max(self.tally.length_s, now_s)

    def _arrive(self, request: Request) -> None:
        model = self._models[request.model]
        now_s = request.t_s
        self._pass(now_s)
        self._policy.used(model.key, now_s=now_s, was_idle=not (model.is_running or model.waiting))
        if model.tier is not PARKED:
            self._serve(model, request, now_s)
            return
        model.waiting.append(request)
        if len(model.waiting) == 1:
            self._queue.append(model)
            self._admit(now_s)

    def _serve(self, model: _Model, request: Request, now_s: float) -> None:
        starts_s = max(now_s, model.ready_s)
        self.tally.added_s.append(starts_s - request.t_s)
        model.busy_until_s = max(model.busy_until_s, starts_s + request.service_s)
        if not model.is_running:
            model.is_running = True
            heapq.heappush(self._ends, (model.busy_until_s, model.key))

    def _admit(self, now_s: float) -> None:
        """Whoever waits and finds room now, longest waiting first."""
        for model in list(self._queue):
            if self._load(model, now_s):
                self._queue.remove(model)
                waiting, model.waiting = model.waiting, []
                for request in waiting:
                    self._serve(model, request, now_s)

    def _load(self, model: _Model, now_s: float) -> bool:
        found = self._place(model, now_s)
        if found is None:
            return False
        gpu, choice = found
        for key in choice.keys:
            self._park(self._models[key], now_s)
        size = model.size
        begins_s = max(now_s, gpu.link_free_s)
        model.tier, model.gpu, model.since_s = LOADING, self._gpus.index(gpu), now_s
        model.ready_s = gpu.link_free_s = begins_s + size.load_s
        gpu.free_bytes -= size.held_bytes
        assert gpu.free_bytes >= 0
        gpu.models.append(model)
        self.tally.load_count += 1
        self.tally.loading_s += size.load_s
        self._policy.restored(model.key, now_s=now_s, restore_s=size.load_s, size_bytes=size.held_bytes)
        return True

    def _place(self, model: _Model, now_s: float) -> tuple[_Gpu, Choice] | None:
        """Where it costs least: a GPU with room before one without; then its victims' worth, its link, its fit."""
        best: tuple[tuple[tuple[float, ...], float, int, str], _Gpu, Choice] | None = None
        for gpu in self._gpus:
            missing_bytes = model.size.held_bytes - gpu.free_bytes
            choice: Choice | None = Choice(keys=(), cost=())
            if missing_bytes > 0:
                candidates = [self._candidate(gpu, other, now_s) for other in gpu.models if not other.is_running]
                choice = chosen(candidates, missing_bytes={gpu.name: missing_bytes}, adds=self._policy.adds)
            if choice is None:
                continue
            rank = (choice.cost, max(now_s, gpu.link_free_s), gpu.free_bytes, gpu.name)
            if best is None or rank < best[0]:
                best = rank, gpu, choice
        return None if best is None else (best[1], best[2])

    def _candidate(self, gpu: _Gpu, other: _Model, now_s: float) -> Candidate:
        size = other.size
        worth = self._policy.worth(
            other.key, now_s=now_s, since_s=other.since_s, restore_s=size.load_s, size_bytes=size.held_bytes
        )
        return Candidate(key=other.key, priority=PRIORITY, freed_bytes={gpu.name: size.held_bytes}, worth=worth)

    def _park(self, model: _Model, now_s: float) -> None:
        self._leave(model, now_s)
        self._policy.parked(model.key, now_s=now_s)

    def _leave(self, model: _Model, now_s: float) -> None:
        gpu = self._gpus[model.gpu]
        gpu.models.remove(model)
        gpu.free_bytes += model.size.held_bytes
        self.tally.held_byte_s += model.size.held_bytes * (now_s - model.since_s)
        model.tier, model.gpu = PARKED, -1

"""Engines on one GPU in virtual time: batchers that ask for steps, and the shared GPU on which the steps go on.

Clients are a closed loop (each sends its next request when the last is answered) or open (given arrival times).
Nothing is random here: equal inputs give equal results.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engines.model.batching import Batcher, BatchLimits, KvGeometry, SequenceRequest, Step
from engines.model.sharing import SharedGpu, Sharing
from engines.model.timing import ModelParameters, StepCost, TimingModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One request. `at_s`: when it is sent; None: as soon as one of the clients is free."""

    prompt_tokens: int
    output_tokens: int
    at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """One engine and its clients. `turnaround_s`: from an answer's end to the same client's next request in the engine.

    `request_s`: of each request outside the steps (HTTP, tokenizer), before its prompt can be admitted.
    """

    timing: TimingModel
    kv_bytes: int
    requests: tuple[Wanted, ...]
    limits: BatchLimits = field(default_factory=BatchLimits)
    clients: int = 1
    turnaround_s: float = 0.0
    request_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What became of one request; times since the start. `sent_s` is the client's."""

    prompt_tokens: int
    output_tokens: int
    sent_s: float
    first_token_s: float
    ended_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.sent_s

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def inter_token_s(self) -> float:
        """Mean time between two tokens after the first."""
        return (self.ended_s - self.first_token_s) / max(self.output_tokens - 1, 1)


@dataclass(slots=True)
class EngineRun:
    """An engine while it runs, and what it has done."""

    setup: EngineSetup
    batcher: Batcher
    served: list[Served | None]
    step: Step | None = None
    next_index: int = 0
    first_token_s: dict[int, float] = field(default_factory=dict)
    sent_s: dict[int, float] = field(default_factory=dict)
    kv_used_max: int = 0  # blocks
    running_max: int = 0


def kv_geometry(parameters: ModelParameters) -> KvGeometry:
    """Blocks of a model's KV and state."""
    return KvGeometry.of(
        kv_bytes_per_token=parameters.kv_bytes_per_token,
        state_bytes_per_sequence=parameters.state_bytes_per_sequence,
        window_tokens=parameters.window_tokens,
    )


def step_cost(timing: TimingModel, step: Step) -> StepCost:
    """What a batcher's step costs."""
    return timing.cost(
        prefill=tuple((chunk.start_tokens, chunk.tokens) for chunk in step.prefill),
        decode_count=len(step.decode),
        context_tokens=step.context_tokens,
    )


class GpuSimulation:
    """All engines of one GPU. Every request must fit its engine: one that is refused is an error of the caller."""

    def __init__(self, engines: Sequence[EngineSetup], sharing: Sharing) -> None:
        self.gpu = SharedGpu(sharing)
        self.runs = [self._new_run(setup) for setup in engines]
        self.now_s = 0.0
        self._arrivals: list[tuple[float, int, int]] = []  # (time, engine, request)

    @staticmethod
    def _new_run(setup: EngineSetup) -> EngineRun:
        geometry = kv_geometry(setup.timing.parameters)
        batcher = Batcher(geometry=geometry, limits=setup.limits, block_limit=setup.kv_bytes // geometry.block_bytes)
        return EngineRun(setup=setup, batcher=batcher, served=[None] * len(setup.requests))

    def run(self) -> list[list[Served]]:
        """Until all requests are answered; for each engine what became of its requests, in their order."""
        for engine, run in enumerate(self.runs):
            self._send_first(engine, run)
        while True:
            self._start_steps()
            next_arrival_s = self._arrivals[0][0] if self._arrivals else math.inf
            dt_s = min(self.gpu.next_change_s(), next_arrival_s - self.now_s)
            if math.isinf(dt_s):
                break
            ended = self.gpu.advance(dt_s)
            self.now_s += dt_s
            for engine in ended:
                self._finish(engine, self.runs[engine])
            while self._arrivals and self._arrivals[0][0] <= self.now_s:
                _, engine, index = heapq.heappop(self._arrivals)
                self._submit(self.runs[engine], index)
        return [[item for item in run.served if item is not None] for run in self.runs]

    def _send_first(self, engine: int, run: EngineRun) -> None:
        for index, wanted in enumerate(run.setup.requests):
            if wanted.at_s is not None:
                self._send(engine, run, index, at_s=wanted.at_s)
                run.next_index = index + 1
        while run.next_index < min(run.setup.clients, len(run.setup.requests)):
            self._send(engine, run, run.next_index, at_s=0.0)
            run.next_index += 1

    def _send(self, engine: int, run: EngineRun, index: int, *, at_s: float) -> None:
        run.sent_s[index] = at_s
        heapq.heappush(self._arrivals, (at_s + run.setup.request_s, engine, index))

    def _submit(self, run: EngineRun, index: int) -> None:
        wanted = run.setup.requests[index]
        refusal = run.batcher.submit(
            SequenceRequest(sequence_id=index, prompt_tokens=wanted.prompt_tokens, output_tokens=wanted.output_tokens)
        )
        assert refusal is None, refusal

    def _start_steps(self) -> None:
        for engine, run in enumerate(self.runs):
            if run.step is None:
                run.step = run.batcher.next_step()
                if run.step is not None:
                    run.kv_used_max = max(run.kv_used_max, run.batcher.used_blocks)
                    run.running_max = max(run.running_max, run.batcher.running_count)
                    self.gpu.start(engine, step_cost(run.setup.timing, run.step))

    def _finish(self, engine: int, run: EngineRun) -> None:
        assert run.step is not None, engine
        for item in run.batcher.finish(run.step):
            index = item.sequence_id
            run.first_token_s.setdefault(index, self.now_s)
            if item.is_ended:
                wanted = run.setup.requests[index]
                run.served[index] = Served(
                    prompt_tokens=wanted.prompt_tokens,
                    output_tokens=item.output_count,
                    sent_s=run.sent_s[index],
                    first_token_s=run.first_token_s[index],
                    ended_s=self.now_s,
                )
                if run.next_index < len(run.setup.requests):
                    self._send(engine, run, run.next_index, at_s=self.now_s + run.setup.turnaround_s)
                    run.next_index += 1
        run.step = None


def simulate(engines: Sequence[EngineSetup], sharing: Sharing | None = None) -> list[list[Served]]:
    """What became of all requests, by engine; without `sharing` as on a time-sliced GPU with free switches."""
    return GpuSimulation(engines, sharing or Sharing()).run()

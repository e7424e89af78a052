"""The requests in the engine and the loop that gives them tokens: the batcher in real time.

It knows nothing of weights or sleep; what it needs of the device it asks of its `Host`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable
from typing import Protocol

from engines.errors import EngineError, unavailable
from engines.model.batching import Batcher, BatchLimits, Progress, SequenceRequest, Step, TooLong
from engines.model.simulation import kv_geometry, step_cost
from engines.model.timing import TimingModel
from engines.pacing import GpuPace
from engines.simulated.metrics import Metrics
from engines.simulated.reports import too_long

# The workspace is kept this long after the last request, so that a trickle does not take and return it each time.
WORKSPACE_IDLE_S = 2.0
# Behind the model by more than this, the loop gives up catching up: the machine is too slow, and a metric says so.
LATE_S_MAX = 0.25


class Host(Protocol):
    """What the loop asks of the engine around it."""

    async def take_workspace(self) -> None:
        """Memory for running steps. Raises `EngineError` when there is none; all requests then fail with it."""

    async def give_back_workspace(self) -> None:
        """The loop has been idle for a while."""

    async def after_step(self) -> None:
        """A step is booked; KV memory may have come free."""


class Ticket:
    """One request in the engine: how many of its tokens are ready, and an event that says there is news."""

    def __init__(self, sequence_id: int, *, arrived_s: float) -> None:
        self.sequence_id = sequence_id
        self.arrived_s = arrived_s
        self.admitted_s: float | None = None
        self.token_at_s: float | None = None
        self.ready_count = 0
        self.is_ended = False
        self.failure: EngineError | None = None
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Wait for tokens, the end, or a failure; raises the failure. What came since the last call counts."""
        await self._news.wait()
        self._news.clear()
        if self.failure is not None:
            raise self.failure

    def tell(self) -> None:
        self._news.set()


class Serving:
    """All requests of one engine. A ticket is in `_tickets` from `submit` until its end, failure or cancellation."""

    def __init__(self, *, timing: TimingModel, limits: BatchLimits, pace: GpuPace, host: Host) -> None:
        self.metrics = Metrics()
        self.step_count = 0
        self.has_workspace = False
        self._timing = timing
        self._pace = pace
        self._host = host
        parameters = timing.parameters
        self.batcher = Batcher(geometry=kv_geometry(parameters), limits=limits, block_limit=0)
        self._tickets: dict[int, Ticket] = {}
        self._ids = itertools.count(1)
        self._work = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()

    @property
    def in_flight_count(self) -> int:
        return len(self._tickets)

    @property
    def tokens_max(self) -> int:
        """The longest request served now: the model's bound or what the KV memory holds."""
        held = self.batcher.geometry.tokens_max(self.batcher.block_limit)
        return min(self._timing.parameters.context_tokens_max, held)

    # -- requests

    def submit(self, *, prompt_tokens: int, output_tokens: int) -> Ticket:
        """Queue a request. Raises `EngineError` when it is too long or too many wait."""
        if prompt_tokens + output_tokens > self.tokens_max:
            raise too_long(prompt_tokens + output_tokens, tokens_max=self.tokens_max)
        sequence_id = next(self._ids)
        request = SequenceRequest(sequence_id=sequence_id, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        refusal = self.batcher.submit(request)
        if isinstance(refusal, TooLong):
            raise too_long(refusal.token_count, tokens_max=refusal.tokens_max)
        if refusal is not None:
            raise unavailable(f"{refusal.waiting_count} requests are waiting already.", "queue_full")
        ticket = Ticket(sequence_id, arrived_s=time.perf_counter())
        self._tickets[sequence_id] = ticket
        self._drained.clear()
        self._work.set()
        self.metrics.prompt_tokens += prompt_tokens
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The client is gone: forget the request, free its KV memory. Does nothing after the end. Idempotent."""
        if self._tickets.pop(ticket.sequence_id, None) is not None:
            self.batcher.cancel(ticket.sequence_id)
            self.metrics.ended["abort"] += 1
            self._after_end()

    def book_end(self, ticket: Ticket, finish_reason: str) -> None:
        """Count a request that was answered in full."""
        self.metrics.ended[finish_reason] += 1
        self.metrics.whole.observe(time.perf_counter() - ticket.arrived_s)

    def fail(self, sequence_ids: Iterable[int], error: EngineError) -> None:
        """Answer these requests with an error."""
        for sequence_id in tuple(sequence_ids):
            self.batcher.cancel(sequence_id)
            ticket = self._tickets.pop(sequence_id, None)
            if ticket is not None:
                self.metrics.ended["abort"] += 1
                ticket.failure = error
                ticket.tell()
        self._after_end()

    def fail_all(self, error: EngineError) -> None:
        self.fail(self._tickets, error)

    async def drain(self, timeout_s: float | None) -> bool:
        """Wait until nothing is in flight; False when that took too long."""
        try:
            await asyncio.wait_for(self._drained.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def set_block_limit(self, block_limit: int, *, dropped_error: EngineError) -> None:
        """How many KV blocks may be in use. What waits and can no longer fit fails with the error."""
        self.fail(self.batcher.set_block_limit(block_limit), dropped_error)
        self._work.set()

    # -- the loop

    async def run(self) -> None:
        """Steps for as long as the process lives. Sleeps whenever there is nothing to do."""
        due_s = time.perf_counter()
        while True:
            step = self.batcher.next_step()
            if step is None:
                await self._rest()
                due_s = time.perf_counter()
                continue
            if not self.has_workspace:
                try:
                    await self._host.take_workspace()
                except EngineError as error:
                    self.fail_all(error)
                    continue
                self.has_workspace = True
            self._note_admitted(step)
            due_s = await self._pace.spend(step_cost(self._timing, step), due_s)
            late_s = time.perf_counter() - due_s
            if late_s > LATE_S_MAX:
                self.metrics.late_s += late_s
                due_s += late_s
            self.step_count += 1
            self._deliver(self.batcher.finish(step))
            await self._host.after_step()

    async def _rest(self) -> None:
        self._work.clear()
        self._pace.rest()
        if not self.has_workspace:
            await self._work.wait()
            return
        try:
            await asyncio.wait_for(self._work.wait(), WORKSPACE_IDLE_S)
        except TimeoutError:
            self.has_workspace = False
            await self._host.give_back_workspace()

    def _note_admitted(self, step: Step) -> None:
        now_s = time.perf_counter()
        for chunk in step.prefill:
            ticket = self._tickets.get(chunk.sequence_id)
            if ticket is not None and ticket.admitted_s is None:
                ticket.admitted_s = now_s
                self.metrics.queue.observe(now_s - ticket.arrived_s)

    def _deliver(self, progress: tuple[Progress, ...]) -> None:
        now_s = time.perf_counter()
        for item in progress:
            ticket = self._tickets.get(item.sequence_id)
            if ticket is None:
                continue
            if item.output_count > ticket.ready_count:
                self._observe_token(ticket, now_s)
            ticket.ready_count = item.output_count
            if item.is_ended:
                ticket.is_ended = True
                del self._tickets[item.sequence_id]
            ticket.tell()
        self._after_end()

    def _observe_token(self, ticket: Ticket, now_s: float) -> None:
        self.metrics.generation_tokens += 1
        if ticket.token_at_s is None:
            self.metrics.ttft.observe(now_s - ticket.arrived_s)
        else:
            self.metrics.inter_token.observe(now_s - ticket.token_at_s)
        ticket.token_at_s = now_s

    def _after_end(self) -> None:
        if not self._tickets:
            self._drained.set()

"""The life of the simulated engine: load, serve, sleep, wake, another budget, and the end.

Changes happen one at a time under a lock; driver calls go to the GPU thread, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from devices.api import DeviceError, OutOfMemory
from engines.backing import Backing, backing_of
from engines.errors import DamagedError, LoadFailedError, WakeFailedError, invalid, unavailable
from engines.gpu import GpuThread, OpenedGpu, open_gpus
from engines.model.timing import TimingModel
from engines.pacing import GpuPace
from engines.process import Log
from engines.simulated.memory import MemoryPlan, plan_memory
from engines.simulated.metrics import Gauges
from engines.simulated.reports import (
    BudgetReport,
    EngineSettings,
    EngineState,
    SleepReport,
    UpdateReport,
    WakeReport,
    out_of_memory,
)
from engines.simulated.serving import Serving, Ticket
from engines.simulated.shards import ShardedMemory
from engines.store.connection import StoreError

WAKE_TAGS = frozenset({"weights", "kv_cache"})
FIRST_GENERATION = 1


class Engine:
    """One model, served from one GPU or spread evenly over several."""

    def __init__(self, settings: EngineSettings, *, timing: TimingModel, log: Log) -> None:
        self.settings = settings
        self.timing = timing
        self.pace = GpuPace(settings.sharing)
        self.serving = Serving(timing=timing, limits=settings.limits, pace=self.pace, host=self)
        self.state = EngineState.LOADING
        self.transition: str | None = None  # "sleeping" | "waking" while it lasts
        self.is_paused = False  # level 0 sleep: memory stays, requests are refused
        self.failure = ""  # why, when the state is FAILED
        self.target_bytes = settings.memory_bytes  # the budget, reached or not
        self.held_bytes = 0  # on the device, by our own books
        self.shares: list[dict[str, object]] = []  # the same, of each GPU
        self.is_brokered = False  # memory comes from the host's memory broker
        self.device_label = "unknown"  # until the GPU is open
        self._log = log
        self._gpu_thread = GpuThread()
        self._memory: ShardedMemory | None = None
        self._lock = asyncio.Lock()

    # -- what others may look at

    @property
    def kv_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.kv.size_bytes

    @property
    def weights_bytes(self) -> int:
        """As they lie on the device: rounded up to its granularity once that is known."""
        return self.settings.weights_bytes if self._memory is None else self._memory.weights.size_bytes

    @property
    def weights_generation(self) -> int:
        return FIRST_GENERATION if self._memory is None else self._memory.weights.generation

    @property
    def context_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.plan.context_bytes * self._memory.gpu_count

    @property
    def is_bulk_checked(self) -> bool:
        """Whether the whole range of the weights can be verified, not its first page alone."""
        return self._memory is not None and self._memory.weights.is_bulk_checked

    @property
    def is_asleep(self) -> bool:
        return self.state is EngineState.ASLEEP or self.is_paused

    def gauges(self) -> Gauges:
        batcher = self.serving.batcher
        limit = batcher.block_limit
        return Gauges(
            running_count=batcher.running_count,
            waiting_count=batcher.waiting_count,
            kv_used_fraction=min(batcher.used_blocks / limit, 1.0) if limit else 0.0,
            block_count=limit,
            block_tokens=batcher.geometry.block_tokens,
            is_asleep=self.is_asleep,
            preemption_count=batcher.preemption_count,
            prefix_asked_tokens=batcher.prefix_asked_tokens,
            prefix_found_tokens=batcher.prefix_found_tokens,
            slowed_s=self.pace.slowed_s,
        )

    def submit(self, *, prompt_tokens: int, output_tokens: int) -> Ticket:
        """Queue a request. Raises `EngineError` at once when it cannot be served."""
        self.check_serving()
        return self.serving.submit(prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    def check_serving(self) -> None:
        """Raises `EngineError` unless the engine takes requests now."""
        self._check_usable()
        if self.transition is not None or self.is_asleep:
            raise unavailable("The engine is asleep; wake it first.", "model_asleep")

    def _check_usable(self) -> None:
        if self.state is EngineState.LOADING:
            raise unavailable("The engine is still loading.", "model_loading")
        if self.state is EngineState.FAILED:
            raise unavailable(f"The engine has failed: {self.failure}", "engine_failed")

    # -- for the serving loop

    async def take_workspace(self) -> None:
        """Raises `EngineError` when the GPU has no room."""
        try:
            await self._gpu_thread.run(self._loaded_memory().workspace.take)
            self._refresh_books()
        except OutOfMemory as error:
            self._log.error("CUDA out of memory", requested_bytes=error.requested_bytes, free_bytes=error.free_bytes)
            raise out_of_memory(error) from error
        except StoreError as error:
            self._log.error("memory broker did not lend", reason=error.reason)
            raise unavailable(f"The memory broker did not lend: {error}", "broker_unavailable") from error
        except DeviceError as error:
            self._break(str(error))
            raise unavailable(f"The engine has failed: {error}", "engine_failed") from error

    async def give_back_workspace(self) -> None:
        """A brokered one is kept while resident: a broker that is away must not keep requests from being served."""
        if self.is_brokered:
            return
        await self._gpu_thread.run(self._loaded_memory().workspace.give_back)
        self._refresh_books()

    async def after_step(self) -> None:
        # Who holds the lock settles the budget itself, or puts the engine to sleep and waits for this loop to drain.
        if self._slab_surplus() > 0 and not self._lock.locked():
            async with self._lock:
                await self._settle_budget()

    def _break(self, reason: str) -> None:
        """The GPU is gone or the weights are wrong: nothing can be served any more."""
        self.state = EngineState.FAILED
        self.failure = reason
        self._log.error("engine failed", reason=reason)
        self.serving.fail_all(unavailable(f"The engine has failed: {reason}", "engine_failed"))

    # -- load

    async def load(self) -> None:
        """Cold start, weights, KV memory. Raises `LoadFailedError`."""
        started_s = time.perf_counter()
        if self.settings.cold_start_s:
            self._log.info("cold start (simulated)", cold_start_s=self.settings.cold_start_s)
            await asyncio.sleep(self.settings.cold_start_s)
        try:
            gpus = await self._gpu_thread.run(open_gpus, self.settings.gpu_uuids)
            self.device_label = gpus[0].label
            self._log.bind(device=self.device_label)
            backings = await self._gpu_thread.run(lambda: [backing_of(gpu) for gpu in gpus])
            self.is_brokered = any(backing.is_brokered for backing in backings)
            memory = await self._gpu_thread.run(self._load_memory, gpus, backings, self._plan(gpus))
        except OutOfMemory as error:
            raise LoadFailedError(
                "CUDA out of memory",
                requested_bytes=error.requested_bytes,
                free_bytes=error.free_bytes,
                call=error.call,
                memory_bytes=self.settings.memory_bytes,
            ) from error
        except (DeviceError, DamagedError) as error:
            raise LoadFailedError("GPU not usable", reason=str(error), gpu=",".join(self.settings.gpu_uuids)) from error
        except (StoreError, ValueError) as error:
            raise LoadFailedError("memory broker not usable", reason=str(error)) from error
        self._memory = memory
        self.pace.join(self.settings.gpu_uuids, self._log)
        self._apply_block_limit()
        self.state = EngineState.RESIDENT
        self._log.info(
            "ready",
            load_s=round(time.perf_counter() - started_s, 3),
            weights_bytes=self.weights_bytes,
            kv_bytes=self.kv_bytes,
            context_bytes=self.context_bytes,
            is_context_measured=all(gpu.is_context_measured for gpu in gpus),
            weights_address=hex(memory.weights.address),
            is_bulk_checked=memory.weights.is_bulk_checked,
            is_brokered=self.is_brokered,
        )

    def _plan(self, gpus: Sequence[OpenedGpu]) -> MemoryPlan:
        """Of each GPU: they all hold as much as the one that has least left."""
        plan = plan_memory(
            memory_bytes=self.settings.memory_bytes,
            weights_bytes=-(-self.settings.weights_bytes // len(gpus)),
            context_bytes=max(gpu.context_bytes for gpu in gpus),
            granularity_bytes=max(gpu.device.granularity_bytes for gpu in gpus),
            is_brokered=self.is_brokered,
        )
        if self.settings.memory_bytes < plan.minimum_bytes:
            raise LoadFailedError(
                "memory budget too small for context, weights and KV cache",
                memory_bytes=self.settings.memory_bytes,
                minimum_bytes=plan.minimum_bytes,
                weights_bytes=plan.weights_bytes,
                context_bytes=plan.context_bytes,
            )
        return plan

    def _load_memory(self, gpus: Sequence[OpenedGpu], backings: Sequence[Backing], plan: MemoryPlan) -> ShardedMemory:
        """On the GPU thread."""
        memory = ShardedMemory(
            gpus, plan=plan, label=self.settings.model, generation=FIRST_GENERATION, backings=backings
        )
        memory.weights.load()
        memory.weights.verify()
        memory.workspace.take()  # so that what the cache may have leaves room for it
        try:
            memory.kv.grow(plan.slab_count(self.settings.memory_bytes))
        except OutOfMemory:
            # The account was opened before anybody knew what our context takes: live in what it allows.
            if not self.is_brokered or not memory.kv.backed_count:
                raise
            self.target_bytes = plan.fixed_bytes + memory.kv.backed_count * plan.slab_bytes
            self._log.warning(
                "budget not reached", memory_bytes=self.settings.memory_bytes, target_bytes=self.target_bytes
            )
        if not self.is_brokered:
            memory.workspace.give_back()
        return memory

    # -- sleep and wake

    async def sleep(self, *, level: int, is_waiting: bool, timeout_s: float | None) -> SleepReport:
        """Refuse new requests, let running ones end (or abort them), then let the device memory go. Idempotent.

        Level 0 keeps the memory and only stops serving. After `timeout_s` what still runs is aborted.
        """
        async with self._lock:
            self._check_usable()
            started_s = time.perf_counter()
            self.transition = "sleeping"
            try:
                report = await self._fall_asleep(level=level, is_waiting=is_waiting, timeout_s=timeout_s)
            except (DeviceError, StoreError) as error:
                self._break(str(error))
                raise unavailable(f"The engine has failed: {error}", "engine_failed") from error
            finally:
                self.transition = None
            return replace(report, sleep_s=time.perf_counter() - started_s)

    async def _fall_asleep(self, *, level: int, is_waiting: bool, timeout_s: float | None) -> SleepReport:
        if is_waiting and not await self.serving.drain(timeout_s):
            self._log.warning("requests outlasted the time to drain", in_flight_count=self.serving.in_flight_count)
        self.serving.fail_all(unavailable("Aborted: the engine is going to sleep.", "aborted_by_sleep"))
        if level == 0:
            self.is_paused = True
            return SleepReport()
        memory = self._loaded_memory()
        try:
            # Nothing has been let go yet: an engine whose weights cannot be kept stays resident.
            copied_bytes = await self._gpu_thread.run(memory.weights.seal)
        except StoreError as error:
            self._log.error("weights not sealed", reason=error.reason)
            raise unavailable(f"The weights could not be sealed: {error}", "not_sealed") from error
        freed_bytes = await self._gpu_thread.run(memory.drop_all)
        self.serving.has_workspace = False
        self.serving.set_block_limit(0, dropped_error=unavailable("The engine is asleep.", "model_asleep"))
        self._refresh_books()
        self.state = EngineState.ASLEEP
        self.is_paused = False
        self._log.info("asleep", freed_bytes=freed_bytes, copied_bytes=copied_bytes, held_bytes=self.held_bytes)
        return SleepReport(freed_bytes=freed_bytes, copied_bytes=copied_bytes)

    async def wake(self, tags: frozenset[str]) -> WakeReport:
        """Weights and KV memory back, verified. Idempotent. With one tag only that part; resident needs both.

        Raises `WakeFailedError`: out of memory leaves the engine asleep with nothing on the device but its context.
        """
        async with self._lock:
            self._check_usable()
            self.is_paused = False
            if self.state is EngineState.RESIDENT:
                return WakeReport()
            started_s = time.perf_counter()
            self.transition = "waking"
            try:
                copied = await self._gpu_thread.run(self._wake_memory, tags)
            except WakeFailedError as error:
                self._log.error("wake failed", reason=error.message, free_bytes=error.free_bytes)
                if error.is_fatal:
                    self._break(error.message)
                raise
            finally:
                self.transition = None
                self._refresh_books()
            memory = self._loaded_memory()
            if memory.kv.backed_count and memory.weights.is_resident:
                self._apply_block_limit()
                self.state = EngineState.RESIDENT
            report = WakeReport(
                copied_bytes=copied.copied_bytes,
                map_s=copied.map_s,
                copy_s=copied.copy_s,
                verify_s=copied.verify_s,
                wake_s=time.perf_counter() - started_s,
            )
            self._log.info("awake", copied_bytes=report.copied_bytes, wake_s=round(report.wake_s, 4))
            return report

    def _wake_memory(self, tags: frozenset[str]) -> WakeReport:
        """On the GPU thread; everything but the whole time."""
        memory = self._loaded_memory()
        copied_bytes, map_s, copy_s, verify_s = 0, 0.0, 0.0, 0.0
        grown: list[Future[float]] = []
        try:
            # Memory for the cache is made while the weights are on the link, and not before theirs.
            with ThreadPoolExecutor(1) as beside:

                def grow() -> None:
                    if "kv_cache" in tags and not grown:
                        grown.append(beside.submit(self._wake_kv))

                if "weights" in tags and not memory.weights.is_resident:
                    restored = memory.weights.restore(on_lent=grow)
                    copied_bytes, map_s, copy_s = restored.copied_bytes, restored.map_s, restored.copy_s
                    verify_s = memory.weights.verify()
                grow()
                map_s += sum(seconds.result() for seconds in grown)
        except OutOfMemory as error:
            memory.drop_all()
            raise WakeFailedError(f"CUDA out of memory: {error}", free_bytes=memory.free_bytes()) from error
        except StoreError as error:
            memory.drop_all()
            raise WakeFailedError(f"The memory broker did not lend: {error}", free_bytes=None) from error
        except (DamagedError, DeviceError) as error:
            raise WakeFailedError(str(error), free_bytes=None, is_fatal=True) from error
        return WakeReport(copied_bytes=copied_bytes, map_s=map_s, copy_s=copy_s, verify_s=verify_s)

    def _wake_kv(self) -> float:
        """Beside the GPU thread, which waits for it; the seconds it took."""
        memory = self._loaded_memory()
        started_s = time.perf_counter()
        memory.grow_kv(memory.plan.slab_count(self.target_bytes))
        if self.is_brokered:
            memory.workspace.take()
        return time.perf_counter() - started_s

    # -- weights

    async def update_weights(self) -> UpdateReport:
        """Other weights of the next generation, as a reload or a merge would leave them; the next sleep seals them.

        Raises `EngineError` unless the engine is resident.
        """
        async with self._lock:
            self.check_serving()
            memory = self._loaded_memory()
            started_s = time.perf_counter()
            try:
                await self._gpu_thread.run(memory.weights.update)
                digest = await self._gpu_thread.run(memory.weights.digest)
            except DeviceError as error:
                self._break(str(error))
                raise unavailable(f"The engine has failed: {error}", "engine_failed") from error
            self._log.info("weights updated", weights_generation=self.weights_generation)
            return UpdateReport(
                weights_generation=self.weights_generation, digest=digest, update_s=time.perf_counter() - started_s
            )

    async def weights_digest(self) -> str:
        """Of what lies on the device now. Raises `EngineError` unless the engine is resident."""
        async with self._lock:
            self.check_serving()
            return await self._gpu_thread.run(self._loaded_memory().weights.digest)

    # -- budget

    async def set_budget(self, memory_bytes: int) -> BudgetReport:
        """Grow or shrink the KV memory to a new budget; asleep, it is for the next wake.

        Shrinking frees at once what no request uses, the rest as requests end. Growing takes what the GPU has.
        Raises `EngineError` when the budget is too small to run in.
        """
        async with self._lock:
            self._check_usable()
            memory = self._loaded_memory()
            minimum_bytes = memory.plan.minimum_bytes
            if memory_bytes < minimum_bytes:
                message = f"A budget of {memory_bytes} bytes is too small: the engine needs {minimum_bytes} bytes."
                raise invalid(message, code="budget_too_small", param="memory_bytes")
            self.target_bytes = memory_bytes
            wanted_count = memory.plan.slab_count(memory_bytes)
            if self.state is not EngineState.RESIDENT:
                return BudgetReport(
                    memory_bytes=memory_bytes, target_bytes=memory_bytes, kv_bytes=self.kv_bytes, short_by_bytes=0
                )
            try:
                await self._gpu_thread.run(memory.kv.grow, wanted_count)
            except OutOfMemory as error:
                self._log.warning("budget not reached", target_bytes=memory_bytes, free_bytes=error.free_bytes)
            except StoreError as error:
                self._log.warning("budget not reached", target_bytes=memory_bytes, reason=error.reason)
            self._apply_block_limit()
            await self._settle_budget()
            return BudgetReport(
                memory_bytes=memory.plan.fixed_bytes + self.kv_bytes // memory.gpu_count,
                target_bytes=memory_bytes,
                kv_bytes=self.kv_bytes,
                short_by_bytes=max(wanted_count - memory.kv.backed_count, 0) * memory.plan.slab_bytes,
            )

    def _slab_surplus(self) -> int:
        """Slabs above the target that no running request needs."""
        memory = self._memory
        if memory is None:
            return 0
        batcher = self.serving.batcher
        used_count = -(-batcher.used_blocks * batcher.geometry.block_bytes // memory.slab_bytes)
        return memory.kv.backed_count - max(memory.plan.slab_count(self.target_bytes), used_count)

    async def _settle_budget(self) -> None:
        """Free the slabs above the target that are not in use."""
        memory = self._loaded_memory()
        # Requests may end while slabs are freed: look again, or theirs would stay until the next step.
        while (surplus_count := self._slab_surplus()) > 0:
            freed_bytes = await self._gpu_thread.run(memory.kv.shrink, memory.kv.backed_count - surplus_count)
            self._refresh_books()
            self._log.info("KV memory given back", freed_bytes=freed_bytes, kv_bytes=self.kv_bytes)

    def _apply_block_limit(self) -> None:
        """Admit as much as the backed slabs and the target allow."""
        memory = self._loaded_memory()
        slab_count = min(memory.kv.backed_count, memory.plan.slab_count(self.target_bytes))
        block_limit = slab_count * memory.slab_bytes // self.serving.batcher.geometry.block_bytes
        error = unavailable("The KV cache was made smaller than this request.", "kv_cache_shrunk")
        self.serving.set_block_limit(block_limit, dropped_error=error)
        self._refresh_books()

    # -- end

    def _loaded_memory(self) -> ShardedMemory:
        assert self._memory is not None, "used before it is loaded"
        return self._memory

    def _refresh_books(self) -> None:
        self.held_bytes = self._loaded_memory().held_bytes
        self.shares = self._loaded_memory().shares()

    async def run(self) -> None:
        """Serve until cancelled."""
        await self.serving.run()

    async def close(self) -> None:
        """End what runs and free the device."""
        self.serving.fail_all(unavailable("The engine is shutting down.", "shutting_down"))
        self.pace.close()
        if self._memory is not None:
            await self._gpu_thread.run(self._memory.close)
        self._gpu_thread.close()

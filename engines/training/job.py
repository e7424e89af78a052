"""The life of the training job: load or resume, step, sleep between two steps, wake to the very next one, end.

A step is made under a lock; who wants the job to sleep takes the lock and so gets it between two steps. Driver calls
and checkpoints go to the GPU thread.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from devices.api import DeviceError, OutOfMemory
from engines.backing import Backing, backing_of
from engines.errors import DamagedError, LoadFailedError, NotSealedError, WakeFailedError, unavailable
from engines.gpu import GpuThread, OpenedGpu, open_gpus
from engines.model.sharing import Sharing
from engines.model.timing import StepCost
from engines.pacing import GpuPace
from engines.store.connection import StoreError
from engines.training.progress import Progress, beginning
from engines.training.shards import ShardedTrainingMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.process import Log
    from engines.training.checkpoints import Checkpoints

# At the end the running step may take this long to finish; a longer one is given up, and is not counted.
LAST_STEP_S = 1.0
# What a step's kernels need of the GPU: matrix products of large batches. Assumed; it matters under MPS only.
COMPUTE_FRACTION = 0.8
MEMORY_FRACTION = 0.4


class JobState(Enum):
    LOADING = "loading"
    RESIDENT = "resident"
    ASLEEP = "asleep"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the command line said."""

    model: str
    gpu_uuids: tuple[str, ...]
    memory_bytes: int  # on each GPU
    seed: int
    step_s: float
    checkpoint_every: int
    sharing: Sharing


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepReport:
    copied_bytes: int
    freed_bytes: int
    sleep_s: float  # waiting for the running step included
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeReport:
    """`copy_s` runs from the start of the restore to its last byte and overlaps `map_s`; the parts do not add up."""

    copied_bytes: int = 0
    map_s: float = 0.0
    copy_s: float = 0.0
    verify_s: float = 0.0
    wake_s: float = 0.0
    steps: int = 0


class Job:
    """One training job, on one GPU or spread evenly over several."""

    def __init__(self, settings: JobSettings, *, checkpoints: Checkpoints, log: Log) -> None:
        self.settings = settings
        self.state = JobState.LOADING
        self.transition: str | None = None  # "sleeping" | "waking" while it lasts
        self.failure = ""  # why, when the state is FAILED
        self.progress = beginning(settings.model, seed=settings.seed)
        self.resumed_step_count = 0  # steps that a checkpoint brought along
        self.checkpointed_step_count = 0  # steps that the newest checkpoint has
        self.checkpoint_count = 0  # written by this process
        self.held_bytes = 0  # on the device, by our own books
        self.shares: list[dict[str, object]] = []  # the same, of each GPU
        self.is_brokered = False  # memory comes from the host's memory broker
        self.context_bytes = 0
        self.memory_bytes = 0  # of the job's own, resident or not
        self.device_label = "unknown"  # until the GPU is open
        self._checkpoints = checkpoints
        self._log = log
        self._gpu_thread = GpuThread()
        self._memory: ShardedTrainingMemory | None = None
        self._life = asyncio.Lock()  # one change of life at a time
        self._step = asyncio.Lock()  # held during a step; waiters are served in order, so a sleeper comes next
        self._may_step = asyncio.Event()
        self.pace = GpuPace(settings.sharing)
        self._cost = StepCost(
            host_s=0.0,
            device_s=settings.step_s,
            compute_s=settings.step_s * COMPUTE_FRACTION,
            memory_s=settings.step_s * MEMORY_FRACTION,
        )

    @property
    def is_asleep(self) -> bool:
        return self.state is JobState.ASLEEP

    # -- load and run

    async def load(self) -> None:
        """Take the memory and the newest valid checkpoint. Raises `LoadFailedError`."""
        started_s = time.perf_counter()
        found = await self._gpu_thread.run(self._checkpoints.newest)
        for name in found.passed_over:
            self._log.warning("checkpoint not usable", file=name)
        if found.progress is not None:
            self.progress = found.progress
            self.resumed_step_count = self.checkpointed_step_count = found.progress.step_count
        try:
            gpus = await self._gpu_thread.run(open_gpus, self.settings.gpu_uuids)
            self.device_label = gpus[0].label
            self._log.bind(device=self.device_label)
            backings = await self._gpu_thread.run(lambda: [backing_of(gpu) for gpu in gpus])
            self.is_brokered = any(backing.is_brokered for backing in backings)
            self._memory = await self._gpu_thread.run(self._take_memory, gpus, backings)
        except OutOfMemory as error:
            raise LoadFailedError(
                "CUDA out of memory",
                requested_bytes=error.requested_bytes,
                free_bytes=error.free_bytes,
                call=error.call,
                memory_bytes=self.settings.memory_bytes,
            ) from error
        except DeviceError as error:
            raise LoadFailedError("GPU not usable", reason=str(error), gpu=",".join(self.settings.gpu_uuids)) from error
        except (StoreError, ValueError) as error:
            raise LoadFailedError("memory broker not usable", reason=str(error)) from error
        self.context_bytes = sum(gpu.context_bytes for gpu in gpus)
        self.memory_bytes = self._memory.size_bytes
        self._refresh_books()
        self.pace.join(self.settings.gpu_uuids, self._log)
        self.state = JobState.RESIDENT
        self._may_step.set()
        self._log.info(
            "ready",
            load_s=round(time.perf_counter() - started_s, 3),
            memory_bytes=self.memory_bytes,
            context_bytes=self.context_bytes,
            is_context_measured=all(gpu.is_context_measured for gpu in gpus),
            resumed_steps=self.resumed_step_count,
        )

    def _take_memory(self, gpus: Sequence[OpenedGpu], backings: Sequence[Backing]) -> ShardedTrainingMemory:
        """On the GPU thread; as much on each GPU as on every other."""
        granularity_bytes = max(gpu.device.granularity_bytes for gpu in gpus)
        context_bytes = max(gpu.context_bytes for gpu in gpus)
        own_bytes = (self.settings.memory_bytes - context_bytes) // granularity_bytes * granularity_bytes
        if own_bytes <= 0:
            raise LoadFailedError(
                "memory budget too small for the context and one page",
                memory_bytes=self.settings.memory_bytes,
                minimum_bytes=context_bytes + granularity_bytes,
            )
        label = self.settings.model
        try:
            memory = ShardedTrainingMemory(gpus, label=label, size_bytes=own_bytes, backings=backings)
        except OutOfMemory as error:
            # The account was opened before anybody knew what our context takes: live in what it allows.
            allowed_bytes = (error.free_bytes or 0) // granularity_bytes * granularity_bytes
            if not self.is_brokered or not allowed_bytes:
                raise
            self._log.warning("budget not reached", wanted_bytes=own_bytes, allowed_bytes=allowed_bytes)
            memory = ShardedTrainingMemory(gpus, label=label, size_bytes=allowed_bytes, backings=backings)
        memory.place(self.progress)
        return memory

    async def run(self) -> None:
        """Step until cancelled."""
        while True:
            await self._may_step.wait()
            async with self._step:
                if self._may_step.is_set():
                    await self._one_step()

    async def _one_step(self) -> None:
        await self.pace.spend(self._cost, time.perf_counter())  # the modelled computation
        try:
            self.progress = await self._gpu_thread.run(self._loaded_memory().step, self.progress)
        except (DeviceError, DamagedError) as error:
            self._break(str(error))
            return
        if self.progress.step_count % self.settings.checkpoint_every == 0:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        """A checkpoint that cannot be written is no reason to stop; the next one may work."""
        progress = self.progress
        try:
            await self._gpu_thread.run(self._checkpoints.write, progress)
        except OSError as error:
            self._log.error("checkpoint not written", steps=progress.step_count, reason=str(error))
            return
        self.checkpointed_step_count = progress.step_count
        self.checkpoint_count += 1
        self._log.info("checkpoint written", steps=progress.step_count)

    def _break(self, reason: str) -> None:
        """The GPU is gone or its content is wrong: only a restart from a checkpoint helps."""
        self.state = JobState.FAILED
        self.failure = reason
        self._may_step.clear()
        self._log.error("job failed", reason=reason, steps=self.progress.step_count)

    # -- sleep and wake

    async def sleep(self) -> SleepReport:
        """Finish the running step, copy the state to the host, free the GPU memory. Idempotent."""
        async with self._life:
            self._check_usable()
            started_s = time.perf_counter()
            self.transition = "sleeping"
            self._may_step.clear()
            try:
                async with self._step:
                    self._check_usable()
                    saved = await self._gpu_thread.run(self._loaded_memory().save)
            except NotSealedError as error:
                self._log.error("memory not sealed", reason=str(error))
                self._may_step.set()
                raise unavailable(f"The job's memory could not be sealed: {error}", "not_sealed") from error
            except (DeviceError, StoreError) as error:
                self._break(str(error))
                raise unavailable(f"The job has failed: {error}", "engine_failed") from error
            finally:
                self.transition = None
            self.state = JobState.ASLEEP
            self.pace.rest()
            self._refresh_books()
            report = SleepReport(
                copied_bytes=saved.copied_bytes,
                freed_bytes=saved.freed_bytes,
                sleep_s=time.perf_counter() - started_s,
                steps=self.progress.step_count,
            )
            self._log.info(
                "asleep", freed_bytes=report.freed_bytes, copied_bytes=report.copied_bytes, steps=report.steps
            )
            return report

    async def wake(self) -> WakeReport:
        """Bring the state back, verify it, go on with the next step. Idempotent.

        Raises `WakeFailedError`: out of memory leaves the job asleep, and no step is lost.
        """
        async with self._life:
            self._check_usable()
            if self.state is JobState.RESIDENT:
                return WakeReport(steps=self.progress.step_count)
            started_s = time.perf_counter()
            self.transition = "waking"
            try:
                copied = await self._gpu_thread.run(self._restore, self.progress)
            except WakeFailedError as error:
                self._log.error("wake failed", reason=error.message, free_bytes=error.free_bytes)
                if error.is_fatal:
                    self._break(error.message)
                raise
            finally:
                self.transition = None
            self.state = JobState.RESIDENT
            self._refresh_books()
            self._may_step.set()
            report = WakeReport(
                copied_bytes=copied.copied_bytes,
                map_s=copied.map_s,
                copy_s=copied.copy_s,
                verify_s=copied.verify_s,
                wake_s=time.perf_counter() - started_s,
                steps=self.progress.step_count,
            )
            self._log.info(
                "awake", copied_bytes=report.copied_bytes, wake_s=round(report.wake_s, 4), steps=report.steps
            )
            return report

    def _restore(self, expected: Progress) -> WakeReport:
        """On the GPU thread; everything but the whole time."""
        memory = self._loaded_memory()
        try:
            restored = memory.restore()
            verify_started_s = time.perf_counter()
            memory.verify(expected)
        except OutOfMemory as error:
            raise WakeFailedError(f"CUDA out of memory: {error}", free_bytes=memory.free_bytes()) from error
        except StoreError as error:
            raise WakeFailedError(f"The memory broker did not lend: {error}", free_bytes=None) from error
        except (DeviceError, DamagedError) as error:
            raise WakeFailedError(str(error), free_bytes=None, is_fatal=True) from error
        return WakeReport(
            copied_bytes=restored.copied_bytes,
            map_s=restored.map_s,
            copy_s=restored.copy_s,
            verify_s=time.perf_counter() - verify_started_s,
        )

    def _check_usable(self) -> None:
        if self.state is JobState.LOADING:
            raise unavailable("The job is still loading.", "model_loading")
        if self.state is JobState.FAILED:
            raise unavailable(f"The job has failed: {self.failure}", "engine_failed")

    def _refresh_books(self) -> None:
        own_bytes = 0 if self.state is JobState.ASLEEP else self.memory_bytes
        self.held_bytes = self.context_bytes + own_bytes
        self.shares = self._loaded_memory().shares()

    def _loaded_memory(self) -> ShardedTrainingMemory:
        assert self._memory is not None, "used before it is loaded"
        return self._memory

    # -- end

    async def close(self) -> None:
        """Finish the running step if it is a short one, write a checkpoint, free the device."""
        self._may_step.clear()
        try:
            await asyncio.wait_for(self._step.acquire(), LAST_STEP_S)
        except TimeoutError:
            self._log.warning("last step given up", steps=self.progress.step_count)
        has_news = self.progress.step_count > self.checkpointed_step_count
        if has_news and self.state in {JobState.RESIDENT, JobState.ASLEEP}:
            await self._checkpoint()
        self.pace.close()
        if self._memory is not None:
            await self._gpu_thread.run(self._memory.close)
        self._gpu_thread.close()

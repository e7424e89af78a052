"""One job's memory over all of its GPUs: an equal part on each, and on each the page with the progress.

It offers what `TrainingMemory` offers for one GPU, and is that with one. GPUs are served one after the other, on the
job's one GPU thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.api import OutOfMemory, RestoreResult
from engines.training.memory import Saved, TrainingMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.gpu import OpenedGpu
    from engines.training.progress import Progress


class ShardedTrainingMemory:
    """Everything the job holds on its devices. Sizes are of all together, `size_bytes` of the constructor of each."""

    def __init__(self, gpus: Sequence[OpenedGpu], *, label: str, size_bytes: int) -> None:
        self._shards = [
            TrainingMemory(gpu, label=f"{label}/{index}" if index else label, size_bytes=size_bytes)
            for index, gpu in enumerate(gpus)
        ]

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self._shards)

    @property
    def is_bulk_checked(self) -> bool:
        return all(shard.is_bulk_checked for shard in self._shards)

    def place(self, progress: Progress) -> None:
        """Put the progress on every device."""
        for shard in self._shards:
            shard.place(progress)

    def step(self, expected: Progress) -> Progress:
        """One step on every device. Raises `DamagedError` unless each finds exactly what the last one left."""
        first, *others = self._shards
        progress = first.step(expected)
        for shard in others:
            shard.step(expected)
        return progress

    def save(self) -> Saved:
        """Copy all to the host, then let the device memory go. Idempotent."""
        saved = [shard.save() for shard in self._shards]
        return Saved(
            copied_bytes=sum(part.copied_bytes for part in saved),
            freed_bytes=sum(part.freed_bytes for part in saved),
            copy_s=sum(part.copy_s for part in saved),
        )

    def restore(self) -> RestoreResult:
        """Bring all back to the same addresses. Raises `OutOfMemory` with nothing left behind on any device."""
        results: list[RestoreResult] = []
        try:
            results.extend(shard.restore() for shard in self._shards)
        except OutOfMemory:
            for shard in self._shards[: len(results)]:
                shard.drop()
            raise
        return RestoreResult(
            restored_bytes=sum(result.restored_bytes for result in results),
            back_s=sum(result.back_s for result in results),
            restore_s=sum(result.restore_s for result in results),
        )

    def verify(self, expected: Progress) -> None:
        """Compare pages and probes with what was there before. Raises `DamagedError`."""
        for shard in self._shards:
            shard.verify(expected)

    def free_bytes(self) -> int:
        """Free on the GPU that has least, as the driver reports it."""
        return min(shard.free_bytes() for shard in self._shards)

    def close(self) -> None:
        """Leave the devices; everything on them is freed."""
        for shard in self._shards:
            shard.close()

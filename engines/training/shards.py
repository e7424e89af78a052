"""One job's memory over all of its GPUs: an equal part on each, and on each the page with the progress.

It offers what `TrainingMemory` offers for one GPU, and is that with one. Saves, restores and checks run on all GPUs at
the same time, a thread for each, for each has a link of its own.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from devices.api import DeviceError
from engines.backing import Restored, at_once
from engines.errors import NotSealedError
from engines.store.connection import StoreError
from engines.training.memory import Saved, TrainingMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.backing import Backing
    from engines.gpu import OpenedGpu
    from engines.training.progress import Progress


class ShardedTrainingMemory:
    """Everything the job holds on its devices. Sizes are of all together, `size_bytes` of the constructor of each."""

    def __init__(
        self,
        gpus: Sequence[OpenedGpu],
        *,
        label: str,
        size_bytes: int,
        backings: Sequence[Backing] | None = None,
    ) -> None:
        """Raises `OutOfMemory`, `StoreError` with nothing left behind."""
        self._shards: list[TrainingMemory] = []
        try:
            for index, gpu in enumerate(gpus):
                self._shards.append(
                    TrainingMemory(
                        gpu,
                        label=f"{label}/{index}" if index else label,
                        size_bytes=size_bytes,
                        backing=backings[index] if backings else None,
                        name=f"job-{index}",
                    )
                )
        except (DeviceError, StoreError):
            for shard in self._shards:
                shard.drop()
            raise

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
        """Copy all to the host, then let the device memory go. Idempotent.

        Raises `NotSealedError` when one part could not be copied: all are still on their devices then.
        """
        started_s = time.perf_counter()
        try:
            copied_bytes = sum(at_once([shard.seal for shard in self._shards]))
        except StoreError as error:
            raise NotSealedError(error.reason) from error
        copy_s = time.perf_counter() - started_s
        freed_bytes = sum(at_once([shard.drop for shard in self._shards]))
        return Saved(copied_bytes=copied_bytes, freed_bytes=freed_bytes, copy_s=copy_s)

    def restore(self) -> Restored:
        """Bring all back to the same addresses. On any error nothing is left behind on any device."""
        try:
            results = at_once([shard.restore for shard in self._shards])
        except (DeviceError, StoreError):
            for shard in self._shards:
                shard.drop()
            raise
        return Restored(
            copied_bytes=sum(result.copied_bytes for result in results),
            map_s=max(result.map_s for result in results),
            copy_s=max(result.copy_s for result in results),
            restore_s=max(result.restore_s for result in results),
        )

    def verify(self, expected: Progress) -> None:
        """Compare pages and probes with what was there before. Raises `DamagedError`."""
        at_once([partial(shard.verify, expected) for shard in self._shards])

    def shares(self) -> list[dict[str, object]]:
        """What is held of each GPU: the context, which is the job's own, apart from what the broker lends."""
        return [shard.share() for shard in self._shards]

    def free_bytes(self) -> int:
        """Free on the GPU that has least, as the driver reports it."""
        return min(shard.free_bytes() for shard in self._shards)

    def close(self) -> None:
        """Leave the devices; everything on them is freed."""
        for shard in self._shards:
            shard.close()

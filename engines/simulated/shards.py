"""One engine's memory over all of its GPUs: the same plan on each, weights and KV memory spread evenly.

It offers what `EngineMemory` offers for one GPU, and is that with one. What takes long (load, seal, restore, verify,
drop) runs on all GPUs at the same time, a thread for each, for each has a link of its own.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from devices.api import DeviceError, OutOfMemory
from engines.backing import Restored, at_once
from engines.simulated.memory import EngineMemory, KvSlabs, MemoryPlan, Weights, Workspace
from engines.store.connection import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engines.backing import Backing
    from engines.gpu import OpenedGpu


class ShardedWeights:
    """The weights, an equal part on each GPU."""

    def __init__(self, shards: Sequence[Weights]) -> None:
        self._shards = shards

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self._shards)

    @property
    def address(self) -> int:
        """Of the first shard."""
        return self._shards[0].address

    @property
    def is_resident(self) -> bool:
        return all(shard.is_resident for shard in self._shards)

    @property
    def is_bulk_checked(self) -> bool:
        return all(shard.is_bulk_checked for shard in self._shards)

    @property
    def generation(self) -> int:
        return self._shards[0].generation

    def load(self) -> None:
        """All shards on their devices, and sealed. Raises `OutOfMemory`, `StoreError`."""
        at_once([shard.load for shard in self._shards])

    def update(self) -> None:
        """Other content of the next generation on every device."""
        for shard in self._shards:
            shard.update()

    def seal(self) -> int:
        """Bring the host copies up to date; the bytes copied, none where they are."""
        return sum(at_once([shard.seal for shard in self._shards]))

    def restore(self, on_lent: Callable[[], None] | None = None) -> Restored:
        """Bring all shards to their devices. On any error nothing is left behind on any.

        Seconds are those of the shard that took longest: they run side by side. `on_lent` is called once all are on
        their way.
        """
        waiting = set(range(len(self._shards)))
        lock = threading.Lock()

        def lent(index: int) -> None:
            with lock:
                is_last = waiting == {index}
                waiting.discard(index)
            if is_last and on_lent is not None:
                on_lent()

        try:
            results = at_once(
                [partial(shard.restore, partial(lent, index)) for index, shard in enumerate(self._shards)]
            )
        except (DeviceError, StoreError):
            self.drop()
            raise
        return Restored(
            copied_bytes=sum(result.copied_bytes for result in results),
            map_s=max(result.map_s for result in results),
            copy_s=max(result.copy_s for result in results),
            restore_s=max(result.restore_s for result in results),
        )

    def verify(self) -> float:
        """The seconds it took. Raises `DamagedError` for the first shard that is not what was sealed."""
        return max(at_once([shard.verify for shard in self._shards]))

    def digest(self) -> str:
        """Of what lies on the devices now, shard by shard."""
        return "-".join(shard.digest() for shard in self._shards)

    def drop(self) -> int:
        """Let the device memory go without copying; the bytes freed."""
        return sum(at_once([shard.drop for shard in self._shards]))


class ShardedKv:
    """KV memory: as many slabs on each GPU as on every other; counts are of each."""

    def __init__(self, shards: Sequence[KvSlabs]) -> None:
        self._shards = shards

    @property
    def backed_count(self) -> int:
        return min(shard.backed_count for shard in self._shards)

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self._shards)

    def grow(self, slab_count: int) -> None:
        """Back slabs up to that many on each. Raises `OutOfMemory` and keeps as many as every GPU has room for."""
        try:
            at_once([partial(shard.grow, slab_count) for shard in self._shards])
        except (OutOfMemory, StoreError):
            self.shrink(self.backed_count)
            raise

    def shrink(self, slab_count: int) -> int:
        """Let slabs go down to that many on each; the bytes freed."""
        return sum(at_once([partial(shard.shrink, slab_count) for shard in self._shards]))


class ShardedWorkspace:
    """A little memory on each GPU while the engine is busy."""

    def __init__(self, shards: Sequence[Workspace]) -> None:
        self._shards = shards

    @property
    def is_held(self) -> bool:
        return all(shard.is_held for shard in self._shards)

    def take(self) -> None:
        """Raises `OutOfMemory`, with nothing taken on any. Idempotent."""
        try:
            at_once([shard.take for shard in self._shards])
        except (OutOfMemory, StoreError):
            self.give_back()
            raise

    def give_back(self) -> int:
        """The bytes freed. Idempotent."""
        return sum(shard.give_back() for shard in self._shards)


class ShardedMemory:
    """All device memory of one engine. `plan` is that of each GPU, sizes are of all together."""

    def __init__(
        self,
        gpus: Sequence[OpenedGpu],
        *,
        plan: MemoryPlan,
        label: str,
        generation: int,
        backings: Sequence[Backing] | None = None,
    ) -> None:
        self.plan = plan
        self._shards = [
            EngineMemory(
                gpu,
                plan=plan,
                label=f"{label}/{index}" if index else label,
                generation=generation,
                backing=backings[index] if backings else None,
                name=f"weights-{index}",
            )
            for index, gpu in enumerate(gpus)
        ]
        self.weights = ShardedWeights([shard.weights for shard in self._shards])
        self.kv = ShardedKv([shard.kv for shard in self._shards])
        self.workspace = ShardedWorkspace([shard.workspace for shard in self._shards])

    @property
    def gpu_count(self) -> int:
        return len(self._shards)

    @property
    def slab_bytes(self) -> int:
        """What one slab on every GPU holds together."""
        return self.plan.slab_bytes * self.gpu_count

    @property
    def held_bytes(self) -> int:
        """What is on the devices now, by our own books."""
        return sum(shard.held_bytes for shard in self._shards)

    def shares(self) -> list[dict[str, object]]:
        """What is held of each GPU: the context, which is the engine's own, apart from what the broker lends."""
        return [
            {
                "gpu_uuid": shard.gpu.device.gpu_uuid,
                "context_bytes": shard.plan.context_bytes,
                "brokered_bytes": shard.backing.brokered_bytes,
                "held_bytes": shard.held_bytes,
            }
            for shard in self._shards
        ]

    def free_bytes(self) -> int:
        """Free on the GPU that has least, as the driver reports it."""
        return min(shard.free_bytes() for shard in self._shards)

    def grow_kv(self, slab_count: int) -> None:
        """All slabs or none: on `OutOfMemory` the KV memory is as large as before."""
        before_count = self.kv.backed_count
        try:
            self.kv.grow(slab_count)
        except (OutOfMemory, StoreError):
            self.kv.shrink(before_count)
            raise

    def drop_all(self) -> int:
        """Workspace, KV memory and weights off the devices, nothing copied; the bytes freed. Idempotent."""
        return sum(at_once([shard.drop_all for shard in self._shards]))

    def close(self) -> None:
        """Leave the devices; everything on them is freed."""
        for shard in self._shards:
            shard.close()

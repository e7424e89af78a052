"""The device memory of the simulated engine: weights at a stable address, and KV memory in slabs that come and go.

The weights have a *sealed* copy in pinned host memory, written once. They never change on the device, so putting the
engine to sleep copies nothing: the device memory is let go, and waking restores it from the seal.

All calls block; the engine makes them on its GPU thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from devices.api import Device, HostBuffer, MiB, OutOfMemory, Region, RestoreResult, round_up
from engines.errors import DamagedError
from engines.gpu import OpenedGpu
from engines.probes import PROBE_BYTES, Probe, damaged, digest_of, probe_content, probe_offsets

# KV memory is given back in slabs of about a sixty-fourth of it: fine enough to return a small part, coarse enough
# that 40 GiB are 640 driver calls (about 0.1 s). 64 MiB is also what `devices` creates at a time.
SLAB_BYTES_MAX = 64 * MiB
SLABS_WANTED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a budget is divided: context, weights, workspace, and KV slabs from what is left."""

    context_bytes: int
    weights_bytes: int
    workspace_bytes: int
    slab_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """All that is not KV memory."""
        return self.context_bytes + self.weights_bytes + self.workspace_bytes

    @property
    def minimum_bytes(self) -> int:
        """The smallest budget the engine can run in: with one slab."""
        return self.fixed_bytes + self.slab_bytes

    def slab_count(self, memory_bytes: int) -> int:
        """Slabs that fit in the budget beside the fixed part."""
        return max(memory_bytes - self.fixed_bytes, 0) // self.slab_bytes


def plan_memory(*, memory_bytes: int, weights_bytes: int, context_bytes: int, granularity_bytes: int) -> MemoryPlan:
    """The division of a budget. It may be too small: compare it with `minimum_bytes`."""
    weights_bytes = round_up(weights_bytes, granularity_bytes=granularity_bytes)
    kv_bytes = max(memory_bytes - context_bytes - weights_bytes - granularity_bytes, 0)
    slab_bytes = round_up(kv_bytes // SLABS_WANTED, granularity_bytes=granularity_bytes)
    return MemoryPlan(
        context_bytes=context_bytes,
        weights_bytes=weights_bytes,
        workspace_bytes=granularity_bytes,
        slab_bytes=min(max(slab_bytes, granularity_bytes), SLAB_BYTES_MAX),
    )


class Weights:
    """The weights of one model: an address range, the sealed host copy, and probes to know them by."""

    def __init__(self, gpu: OpenedGpu, *, label: str, size_bytes: int, generation: int) -> None:
        self.generation = generation
        self._device: Device = gpu.device
        self._region: Region = self._device.reserve(size_bytes)
        self._host: HostBuffer = self._device.host_arena(self._region.size_bytes)
        self._probes = self._seal(label)
        # Whether whole copies move real bytes; on the software GPU found out at the first restore.
        self._is_bulk_checked = not gpu.is_software
        self._has_restored = False

    @property
    def size_bytes(self) -> int:
        return self._region.size_bytes

    @property
    def address(self) -> int:
        return self._region.address

    @property
    def is_resident(self) -> bool:
        return self._device.is_backed(self._region)

    @property
    def is_bulk_checked(self) -> bool:
        """False in the software GPU's phantom mode, where only the first page is moved and verified."""
        return self._is_bulk_checked

    def restore(self) -> RestoreResult:
        """Bring the weights to the device at link speed. Raises `OutOfMemory` with nothing left behind."""
        result = self._device.restore(self._region, self._host)
        # In phantom mode a large copy moves nothing; the first page is small enough to be moved for real.
        self._device.copy_to_device(self._region, self._host, size_bytes=PROBE_BYTES)
        return result

    def verify(self) -> float:
        """Compare the probes with what was sealed; the seconds it took. Raises `DamagedError`."""
        started_s = time.perf_counter()
        wrong = damaged(self._probes[:1], self._read)
        bulk = self._probes[1:]
        if not self._has_restored and not self._is_bulk_checked:
            self._is_bulk_checked = bool(bulk) and not damaged(bulk, self._read)
        if self._is_bulk_checked:
            wrong += damaged(bulk, self._read)
        if wrong:
            raise DamagedError(wrong)
        self._has_restored = True
        return time.perf_counter() - started_s

    def drop(self) -> int:
        """Let the device memory go without copying; the bytes freed."""
        return self._device.unback(self._region).released_bytes

    def _seal(self, label: str) -> tuple[Probe, ...]:
        probes = []
        for offset in probe_offsets(self._region.size_bytes):
            content = probe_content(label, generation=self.generation, offset_bytes=offset)
            self._host.write(content, offset_bytes=offset)
            probes.append(Probe(offset_bytes=offset, digest=digest_of(content)))
        return tuple(probes)

    def _read(self, offset_bytes: int) -> bytes:
        return self._device.read(self._region, offset_bytes=offset_bytes, size_bytes=PROBE_BYTES)


class KvSlabs:
    """KV memory as slabs of one size. The first `backed_count` have memory behind them."""

    def __init__(self, device: Device, *, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self.backed_count = 0
        self._device = device
        self._regions: list[Region] = []

    @property
    def size_bytes(self) -> int:
        return self.backed_count * self.slab_bytes

    def grow(self, slab_count: int) -> None:
        """Back slabs up to that many. Raises `OutOfMemory` and keeps those that it got."""
        while self.backed_count < slab_count:
            if self.backed_count == len(self._regions):
                self._regions.append(self._device.reserve(self.slab_bytes))
            self._device.back(self._regions[self.backed_count])
            self.backed_count += 1

    def shrink(self, slab_count: int) -> int:
        """Let slabs go down to that many; the bytes freed."""
        freed_bytes = 0
        while self.backed_count > slab_count:
            self.backed_count -= 1
            freed_bytes += self._device.unback(self._regions[self.backed_count]).released_bytes
        return freed_bytes


class Workspace:
    """A little memory taken when the engine gets busy, as a real one takes activations: here it may run out."""

    def __init__(self, device: Device, *, size_bytes: int) -> None:
        self._device = device
        self._region = device.reserve(size_bytes)

    @property
    def is_held(self) -> bool:
        return self._device.is_backed(self._region)

    def take(self) -> None:
        """Raises `OutOfMemory`. Idempotent."""
        if not self.is_held:
            self._device.back(self._region)

    def give_back(self) -> int:
        """The bytes freed. Idempotent."""
        return self._device.unback(self._region).released_bytes


class EngineMemory:
    """All device memory of one engine."""

    def __init__(self, gpu: OpenedGpu, *, plan: MemoryPlan, label: str, generation: int) -> None:
        self.plan = plan
        self.gpu = gpu
        self.weights = Weights(gpu, label=label, size_bytes=plan.weights_bytes, generation=generation)
        self.kv = KvSlabs(gpu.device, slab_bytes=plan.slab_bytes)
        self.workspace = Workspace(gpu.device, size_bytes=plan.workspace_bytes)

    @property
    def held_bytes(self) -> int:
        """What is on the device now, by our own books."""
        weights_bytes = self.weights.size_bytes if self.weights.is_resident else 0
        workspace_bytes = self.plan.workspace_bytes if self.workspace.is_held else 0
        return self.plan.context_bytes + weights_bytes + self.kv.size_bytes + workspace_bytes

    def free_bytes(self) -> int:
        """Free on the whole GPU, as the driver reports it."""
        return self.gpu.device.memory().free_bytes

    def grow_kv(self, slab_count: int) -> None:
        """All slabs or none: on `OutOfMemory` the KV memory is as large as before."""
        before_count = self.kv.backed_count
        try:
            self.kv.grow(slab_count)
        except OutOfMemory:
            self.kv.shrink(before_count)
            raise

    def drop_all(self) -> int:
        """Workspace, KV memory and weights off the device, nothing copied; the bytes freed. Idempotent."""
        return self.workspace.give_back() + self.kv.shrink(0) + self.weights.drop()

    def close(self) -> None:
        """Leave the device; everything on it is freed."""
        self.gpu.device.close()

"""The device memory of the simulated engine: weights at a stable address, and KV memory in slabs that come and go.

The weights have a *sealed* copy in host memory, the engine's own or the memory broker's (`engines.backing`), written
once. While they do not change on the device, putting the engine to sleep copies nothing: the device memory is let go,
and waking restores it from the seal. After an update the next sleep seals them anew.

All calls block; the engine makes them on its GPU thread.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from devices.api import Device, GiB, MiB, OutOfMemory, Region, round_up
from engines.backing import Backing, OwnBacking, Restored, at_once, moves_bulk_bytes
from engines.errors import DamagedError
from engines.gpu import OpenedGpu
from engines.probes import PROBE_BYTES, Probe, damaged, digest_of, probe_content, probe_offsets
from engines.store.connection import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

# KV memory is given back in slabs of about a sixty-fourth of it: fine enough to return a small part, coarse enough
# that 40 GiB are 640 driver calls (about 0.1 s). 64 MiB is also what `devices` creates at a time.
SLAB_BYTES_MAX = 64 * MiB
SLABS_WANTED = 64
# A slab of the broker's is a handle that goes from process to process: about 0.3 ms beside what goes by size, which is
# as much for 64 MiB. So they are 64 MiB, or a multiple where there would be more than 64 of them, and smaller only in a
# cache of less than eight.
BROKERED_SLAB_BYTES_MAX = 4 * GiB
BROKERED_PIECE_BYTES = 64 * MiB
BROKERED_SLABS_MIN = 8


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


def plan_memory(
    *,
    memory_bytes: int,
    weights_bytes: int,
    context_bytes: int,
    granularity_bytes: int,
    is_brokered: bool = False,
) -> MemoryPlan:
    """The division of a budget. It may be too small: compare it with `minimum_bytes`."""
    weights_bytes = round_up(weights_bytes, granularity_bytes=granularity_bytes)
    kv_bytes = max(memory_bytes - context_bytes - weights_bytes - granularity_bytes, 0)
    slab_bytes = round_up(kv_bytes // SLABS_WANTED, granularity_bytes=granularity_bytes)
    if is_brokered and kv_bytes >= BROKERED_SLABS_MIN * BROKERED_PIECE_BYTES:
        slab_bytes = round_up(slab_bytes, granularity_bytes=BROKERED_PIECE_BYTES)
    elif is_brokered:
        slab_bytes = kv_bytes // BROKERED_SLABS_MIN // granularity_bytes * granularity_bytes
    return MemoryPlan(
        context_bytes=context_bytes,
        weights_bytes=weights_bytes,
        workspace_bytes=granularity_bytes,
        slab_bytes=min(max(slab_bytes, granularity_bytes), BROKERED_SLAB_BYTES_MAX if is_brokered else SLAB_BYTES_MAX),
    )


class Weights:
    """The weights of one model on one GPU: an address range, its sealed copy, and probes to know them by.

    `load` makes them; from then on they are resident, or dropped and sealed.
    """

    def __init__(
        self,
        gpu: OpenedGpu,
        *,
        label: str,
        size_bytes: int,
        generation: int,
        backing: Backing | None = None,
        name: str = "weights",
    ) -> None:
        self.generation = generation
        self.sealed_generation = 0  # of the copy in host memory; 0: there is none
        # Whether whole copies move real bytes: then the probes of the whole range are verified, else the first alone.
        self.is_bulk_checked = not gpu.is_software
        self._is_software = gpu.is_software
        self._backing: Backing = backing or OwnBacking(gpu.device)
        self._device: Device = gpu.device
        self._region: Region = self._device.reserve(size_bytes)
        self._label = label
        self._name = name
        self._probes: tuple[Probe, ...] = ()

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
    def is_dirty(self) -> bool:
        """The device has content that host memory has not."""
        return self.sealed_generation != self.generation

    def load(self) -> None:
        """Memory, content, and its sealed copy. Raises `OutOfMemory`, `StoreError`; there is no second try."""
        self._backing.prepare(self._region, self._name)
        self._backing.back(self._region, self._name)
        if self._is_software:
            self.is_bulk_checked = moves_bulk_bytes(self._device, self._region)
        self._device.fill(self._region, 0)  # what a former owner left is not part of the weights
        self._probes = self._written()
        # Replicas of one model have the same bytes, so the broker keeps them once.
        self._seal(content_id=f"simulated:{self._label}:{self.size_bytes}:{self.generation}")

    def update(self) -> None:
        """Other content of the next generation, as a reload or a merge would leave it. They have to be resident."""
        self.generation += 1
        self._probes = self._written()

    def seal(self) -> int:
        """Bring the host copy up to date; the bytes copied, none where it is. Raises `StoreError`, still resident."""
        return self._seal(content_id="") if self.is_dirty else 0

    def restore(self, on_lent: Callable[[], None] | None = None) -> Restored:
        """Bring the sealed weights to the device at link speed. Raises `OutOfMemory` with nothing left behind.

        `on_lent` is called while they are on their way, when other memory may be asked for.
        """
        return self._backing.restore(self._region, self._name, generation=self.sealed_generation, on_lent=on_lent)

    def verify(self) -> float:
        """Compare the probes with what was put there; the seconds it took. Raises `DamagedError`."""
        started_s = time.perf_counter()
        wrong = damaged(self._checked_probes, self._read)
        if wrong:
            raise DamagedError(wrong)
        return time.perf_counter() - started_s

    def digest(self) -> str:
        """Of what lies on the device now at the places that are verified."""
        content = hashlib.blake2b(digest_size=16)
        for probe in self._checked_probes:
            content.update(self._read(probe.offset_bytes))
        return content.hexdigest()

    def drop(self) -> int:
        """Let the device memory go without copying; the bytes freed. What was not sealed is lost."""
        return self._backing.unback({self._name: self._region})

    @property
    def _checked_probes(self) -> tuple[Probe, ...]:
        return self._probes if self.is_bulk_checked else self._probes[:1]

    def _written(self) -> tuple[Probe, ...]:
        probes = []
        for offset in probe_offsets(self._region.size_bytes):
            content = probe_content(self._label, generation=self.generation, offset_bytes=offset)
            self._device.write(self._region, content, offset_bytes=offset)
            probes.append(Probe(offset_bytes=offset, digest=digest_of(content)))
        return tuple(probes)

    def _seal(self, *, content_id: str) -> int:
        copied_bytes = self._backing.seal(self._region, self._name, generation=self.generation, content_id=content_id)
        self.sealed_generation = self.generation
        return copied_bytes

    def _read(self, offset_bytes: int) -> bytes:
        return self._device.read(self._region, offset_bytes=offset_bytes, size_bytes=PROBE_BYTES)


class KvSlabs:
    """KV memory as slabs of one size. The first `backed_count` have memory behind them."""

    def __init__(self, backing: Backing, *, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self.backed_count = 0
        self._backing = backing
        self._regions: list[Region] = []

    @property
    def size_bytes(self) -> int:
        return self.backed_count * self.slab_bytes

    def grow(self, slab_count: int) -> None:
        """Back slabs up to that many. Raises `OutOfMemory` and keeps as many as there is room for."""
        refused: OutOfMemory | None = None
        while self.backed_count < slab_count:
            end = min(slab_count, self.backed_count + self._backing.ranges_per_ask)
            while len(self._regions) < end:
                self._regions.append(self._backing.device.reserve(self.slab_bytes))
            try:
                self._backing.back_all(
                    {self._name(slab): self._regions[slab] for slab in range(self.backed_count, end)}
                )
                self.backed_count = end
            except OutOfMemory as error:
                refused = error
                fitting_count = (error.free_bytes or 0) // self.slab_bytes
                slab_count = min(end - 1, self.backed_count + fitting_count)
        if refused is not None:
            raise refused

    def shrink(self, slab_count: int) -> int:
        """Let slabs go down to that many; the bytes freed."""
        gone = {self._name(slab): self._regions[slab] for slab in range(slab_count, self.backed_count)}
        self.backed_count = min(self.backed_count, slab_count)
        return self._backing.unback(gone) if gone else 0

    @staticmethod
    def _name(slab: int) -> str:
        return f"kv-{slab}"


class Workspace:
    """A little memory taken when the engine gets busy, as a real one takes activations: here it may run out."""

    def __init__(self, backing: Backing, *, size_bytes: int) -> None:
        self._backing = backing
        self._region = backing.device.reserve(size_bytes)

    @property
    def is_held(self) -> bool:
        return self._backing.device.is_backed(self._region)

    def take(self) -> None:
        """Raises `OutOfMemory`. Idempotent."""
        if not self.is_held:
            self._backing.back(self._region, "workspace")

    def give_back(self) -> int:
        """The bytes freed. Idempotent."""
        return self._backing.unback({"workspace": self._region})


class EngineMemory:
    """All device memory of one engine."""

    def __init__(
        self,
        gpu: OpenedGpu,
        *,
        plan: MemoryPlan,
        label: str,
        generation: int,
        backing: Backing | None = None,
        name: str = "weights",
    ) -> None:
        self.plan = plan
        self.gpu = gpu
        self.backing: Backing = backing or OwnBacking(gpu.device)
        self.weights = Weights(
            gpu,
            label=label,
            size_bytes=plan.weights_bytes,
            generation=generation,
            backing=self.backing,
            name=name,
        )
        self.kv = KvSlabs(self.backing, slab_bytes=plan.slab_bytes)
        self.workspace = Workspace(self.backing, size_bytes=plan.workspace_bytes)

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
        except (OutOfMemory, StoreError):
            self.kv.shrink(before_count)
            raise

    def drop_all(self) -> int:
        """Workspace, KV memory and weights off the device, nothing copied; the bytes freed. Idempotent."""
        if not self.backing.is_brokered:
            return self._drop_content() + self.weights.drop()
        # The broker gives the driver back what it got of one, while the other is being unmapped.
        return sum(at_once([self._drop_content, self.weights.drop]))

    def _drop_content(self) -> int:
        return self.workspace.give_back() + self.kv.shrink(0)

    def close(self) -> None:
        """Leave the device; everything on it is freed."""
        self.gpu.device.close()
        self.backing.close()

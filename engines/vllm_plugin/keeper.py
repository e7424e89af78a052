"""Keeps the weights of an engine that allocates for itself: sealed in the memory broker while they are off the GPU.

The engine's allocator reserves addresses and maps memory of its own there. At the first sleep each allocation is
copied into a range of the broker's, sealed, and let go; from the first wake on the memory at its address is the
broker's. Later sleeps of unchanged weights only unmap. Its allocator sees of this but the fields that it reads itself.

Knows nothing of vLLM: `backend` translates. All calls block and come from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from devices.api import DeviceError, Region
from engines.errors import DamagedError
from engines.store.connection import StoreError

if TYPE_CHECKING:
    from devices.borrowed import BorrowingDevice
    from engines.backing import Backing


class Allocation(Protocol):
    """One piece of memory as the engine's allocator has it: `handle` is (device, bytes, address, its own)."""

    handle: Any
    is_asleep: bool


@dataclass(slots=True, kw_only=True)
class _Kept:
    """What we know of one allocation, by its address."""

    name: str
    region: Region
    generation: int = 0
    sealed: int | None = None
    """Checksum of what is sealed; None: nothing is."""
    is_lent: bool = False
    """The memory at its address is the broker's."""
    is_parked: bool = False
    """Off the GPU, and `resume` brings it back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspended:
    freed_bytes: int
    sealed_bytes: int


class WeightKeeper:
    """The weights on one GPU. `checksum` takes address and bytes, and differs when any byte there does.

    `unmap_own` takes an allocation's handle and lets its own memory go, `map_own` gives it some again.
    """

    def __init__(
        self,
        device: BorrowingDevice,
        backing: Backing,
        *,
        checksum: Callable[[int, int], int],
        map_own: Callable[[Any], None],
        unmap_own: Callable[[Any], None],
    ) -> None:
        self._device = device
        self._backing = backing
        self._checksum = checksum
        self._map_own = map_own
        self._unmap_own = unmap_own
        self._kept: dict[int, _Kept] = {}
        self._named_count = 0

    def suspend(self, weights: Mapping[int, Allocation]) -> Suspended:
        """Off the GPU, all of them, after what changed was sealed.

        Raises `StoreError`, `DeviceError`; while sealing, with everything where it was.
        """
        awake = {address: weights[address] for address in sorted(weights) if not weights[address].is_asleep}
        sealed_bytes = sum(self._seal(address, allocation) for address, allocation in awake.items())
        for address in awake:
            self._kept[address].is_parked = True
        return Suspended(freed_bytes=self._let_go(awake), sealed_bytes=sealed_bytes)

    def resume(self, weights: Mapping[int, Allocation]) -> int:
        """Back at their addresses, as they were sealed; the bytes copied. Only what `suspend` took away.

        All of them, or none: raises `StoreError`, `OutOfMemory`, and `DamagedError` for what is not as it was sealed.
        """
        parked = {address: kept for address, kept in self._kept.items() if address in weights and kept.is_parked}
        back: dict[int, Allocation] = {}
        copied_bytes = 0
        try:
            for address, kept in sorted(parked.items()):
                restored = self._backing.restore(kept.region, kept.name, generation=kept.generation)
                kept.is_lent = True
                weights[address].is_asleep = False
                back[address] = weights[address]
                copied_bytes += restored.copied_bytes
                if self._checksum(address, kept.region.size_bytes) != kept.sealed:
                    raise DamagedError((address,))
        except (DeviceError, StoreError, DamagedError):
            self._let_go(back)
            raise
        for kept in parked.values():
            kept.is_parked = False
        return copied_bytes

    def discard(self, weights: Mapping[int, Allocation]) -> int:
        """Off the GPU without their content, which comes from elsewhere later; the bytes freed."""
        awake = {address: allocation for address, allocation in weights.items() if not allocation.is_asleep}
        for address in awake:
            if address in self._kept:
                self._kept[address].sealed = None
        return self._let_go(awake)

    def surrender(self, address: int, allocation: Allocation) -> None:
        """Its allocator is about to free it: give it memory of its own again, for that is what it lets go."""
        kept = self._kept.pop(address, None)
        if kept is not None and kept.is_lent:
            self._backing.unback({kept.name: kept.region})
            self._map_own(allocation.handle)
        if kept is not None:
            self._device.release_addresses(kept.region)

    def _seal(self, address: int, allocation: Allocation) -> int:
        """Bring the sealed copy up to date; the bytes that were sealed."""
        size_bytes = int(allocation.handle[1])
        kept = self._kept.get(address)
        if kept is None:
            name = f"vllm-{self._device.gpu_uuid[-12:]}-{self._named_count}"
            self._named_count += 1
            kept = self._kept[address] = _Kept(name=name, region=self._device.borrow(address, size_bytes))
        now = self._checksum(address, size_bytes)
        if kept.sealed == now:
            return 0
        generation = kept.generation + 1
        if kept.is_lent:
            self._backing.seal(kept.region, kept.name, generation=generation, content_id="")
        else:
            self._seal_own(address, kept, generation=generation)
        kept.generation, kept.sealed = generation, now
        return size_bytes

    def _seal_own(self, address: int, kept: _Kept, *, generation: int) -> None:
        """By way of a range of the broker's, for it reads no memory but its own; one allocation more for a moment."""
        staging = self._device.reserve(kept.region.size_bytes)
        try:
            self._backing.back(staging, kept.name)
            try:
                self._device.copy_from_address(staging, address)
                self._backing.seal(staging, kept.name, generation=generation, content_id="")
            finally:
                self._backing.unback({kept.name: staging})
        finally:
            self._device.release_addresses(staging)

    def _let_go(self, awake: Mapping[int, Allocation]) -> int:
        """Unmap them all, lent ones in one go; the bytes."""
        lent = {address: kept for address, kept in self._kept.items() if address in awake and kept.is_lent}
        if lent:
            self._backing.unback({kept.name: kept.region for kept in lent.values()})
        for address, allocation in awake.items():
            if address in lent:
                lent[address].is_lent = False
            else:
                self._unmap_own(allocation.handle)
            allocation.is_asleep = True
        return sum(int(allocation.handle[1]) for allocation in awake.values())

"""Where the memory behind an engine's addresses comes from, on one GPU: its own, or the host's memory broker.

An engine reserves addresses, has memory put behind them, has their content *sealed* (kept in host memory), lets the
memory go, and has it restored. `OwnBacking` allocates and pins for itself; `BrokerBacking` asks, and allocates nothing.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from devices.api import Device, DeviceError, HostBuffer, InvalidUse, KiB, OutOfMemory, Region
from engines.store.connection import StoreError, StoreSettings, settings_from
from engines.store.memory import GpuStore
from engines.store.messages import RANGES_PER_ASK_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engines.gpu import OpenedGpu

# A software GPU in phantom mode moves nothing in copies above 64 KiB. So the first page of a region, by which an engine
# knows its content even there, is copied by a copy of its own.
FIRST_PAGE_BYTES = 4096
BULK_BYTES = 128 * KiB
# The broker keeps an image until a newer one of its name is sealed, also beyond the engine's end. The next start of the
# replica begins anew with generation 1, and must not be taken for an older one: its lease epoch goes in front.
GENERATION_BITS = 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A region has its memory and content again. `map_s` and `copy_s` overlap; `restore_s` is the whole."""

    copied_bytes: int
    map_s: float
    copy_s: float
    restore_s: float


class Backing(Protocol):
    """Memory for regions of one device. Each region has a name that stays, unique in the engine.

    Raises `DeviceError`, `OutOfMemory` in particular, with nothing changed; a broker also `StoreError`.
    """

    @property
    def device(self) -> Device: ...

    @property
    def is_brokered(self) -> bool: ...

    @property
    def brokered_bytes(self) -> int:
        """What the broker lends to this engine on this GPU now."""

    @property
    def ranges_per_ask(self) -> int:
        """As many regions as it is worth giving to `back_all` at once."""

    def back(self, region: Region, name: str) -> None:
        """Put memory behind it; content undefined."""

    def back_all(self, regions: Mapping[str, Region]) -> None:
        """The same for `{name: region}`, all of one size; all of them or none."""

    def unback(self, regions: Mapping[str, Region]) -> int:
        """Let the memory of `{name: region}` go, nothing copied; the bytes freed. Idempotent."""

    def prepare(self, region: Region, name: str) -> None:
        """Host memory for the sealed copy, before it is needed, so that sealing never waits or fails for want of it."""

    def seal(self, region: Region, name: str, *, generation: int, content_id: str) -> int:
        """Keep the content of now in host memory, in place of an older one; the bytes copied.

        `content_id` names these bytes wherever they are the same; empty: nobody else has them.
        """

    def restore(
        self, region: Region, name: str, *, generation: int, on_lent: Callable[[], None] | None = None
    ) -> Restored:
        """Memory, and the sealed content in it.

        `on_lent` is called when other memory may be asked for without holding this up; perhaps in the middle of a try
        that is repeated.
        """

    def close(self) -> None:
        """After the device is closed. Idempotent."""


class OwnBacking:
    """The engine's own memory, and a pinned copy of its own for what is sealed."""

    is_brokered = False
    brokered_bytes = 0
    ranges_per_ask = 1

    def __init__(self, device: Device) -> None:
        self.device = device
        self._copies: dict[str, HostBuffer] = {}

    def back(self, region: Region, name: str) -> None:
        self.device.back(region)

    def back_all(self, regions: Mapping[str, Region]) -> None:
        backed: list[Region] = []
        try:
            for region in regions.values():
                self.device.back(region)
                backed.append(region)
        except DeviceError:
            for region in backed:
                self.device.unback(region)
            raise

    def unback(self, regions: Mapping[str, Region]) -> int:
        return sum(self.device.unback(region).released_bytes for region in regions.values())

    def prepare(self, region: Region, name: str) -> None:
        if name not in self._copies:
            self._copies[name] = self.device.host_arena(region.size_bytes)

    def seal(self, region: Region, name: str, *, generation: int, content_id: str) -> int:
        self.prepare(region, name)
        copied = self.device.copy_to_host(region, self._copies[name])
        self.device.copy_to_host(region, self._copies[name], size_bytes=FIRST_PAGE_BYTES)
        return copied.copied_bytes

    def restore(
        self, region: Region, name: str, *, generation: int, on_lent: Callable[[], None] | None = None
    ) -> Restored:
        copy = self._copies.get(name)
        if copy is None:
            raise InvalidUse(call="restore", code="NOT_SEALED", detail=name)
        if on_lent is not None:
            on_lent()  # memory is made piece by piece to the end, so nothing is gained by waiting
        result = self.device.restore(region, copy)
        self.device.copy_to_device(region, copy, size_bytes=FIRST_PAGE_BYTES)
        return Restored(
            copied_bytes=result.restored_bytes,
            map_s=result.back_s,
            copy_s=result.restore_s,
            restore_s=result.restore_s,
        )

    def close(self) -> None:
        """Nothing is left: the device freed it all."""


class BrokerBacking:
    """The broker's memory, and its host memory for what is sealed. Images are named after replica and region."""

    is_brokered = True
    ranges_per_ask = RANGES_PER_ASK_MAX

    def __init__(self, device: Device, settings: StoreSettings) -> None:
        self.device = device
        self._replica_id = settings.replica_id
        self._first_generation = settings.lease_epoch << GENERATION_BITS
        self._store = GpuStore(device, settings)
        # One question at a time goes over a connection: memory without content has its own, so that it is had while
        # an image is on its way.
        self._loose = GpuStore(device, settings, beside=self._store)
        self._sealed_names: set[str] = set()

    @property
    def brokered_bytes(self) -> int:
        return self._store.held_bytes + self._loose.held_bytes

    def back(self, region: Region, name: str) -> None:
        self.back_all({name: region})

    def back_all(self, regions: Mapping[str, Region]) -> None:
        store = self._loose if self._sealed_names.isdisjoint(regions) else self._store
        try:
            store.take_all({self._range(name): region for name, region in regions.items()})
        except StoreError as error:
            raise _as_out_of_memory(error, sum(region.size_bytes for region in regions.values())) from error

    def unback(self, regions: Mapping[str, Region]) -> int:
        ranges = {self._range(name): region for name, region in regions.items()}
        return self._store.give_back_all(ranges) + self._loose.give_back_all(ranges)

    def prepare(self, region: Region, name: str) -> None:
        """The node agent has reserved it."""
        self._sealed_names.add(name)

    def seal(self, region: Region, name: str, *, generation: int, content_id: str) -> int:
        store = self._loose if self._loose.has(self._range(name)) else self._store
        sealed = store.seal(
            self._range(name),
            image_id=self._image(name),
            generation=self._first_generation + generation,
            content_id=content_id,
        )
        return sealed.copied_bytes

    def restore(
        self, region: Region, name: str, *, generation: int, on_lent: Callable[[], None] | None = None
    ) -> Restored:
        try:
            restored = self._store.restore(
                region,
                self._range(name),
                image_id=self._image(name),
                generation=self._first_generation + generation,
                on_lent=on_lent,
            )
        except StoreError as error:
            raise _as_out_of_memory(error, region.size_bytes) from error
        return Restored(
            copied_bytes=restored.copied_bytes,
            map_s=restored.reserve_s + restored.map_s,
            copy_s=restored.copy_s,
            restore_s=restored.restore_s,
        )

    def close(self) -> None:
        self._store.close()
        self._loose.close()

    def _range(self, name: str) -> str:
        return f"{self.device.gpu_uuid}/{name}"

    def _image(self, name: str) -> str:
        """Names need not tell the GPU: each shard of an engine has a name of its own."""
        return f"{self._replica_id}/{name}"


def _as_out_of_memory(error: StoreError, requested_bytes: int) -> Exception:
    """A refusal for want of bytes is what an allocation would have said; anything else stays what it is."""
    if not error.short_by_bytes:
        return error
    free_bytes = max(requested_bytes - error.short_by_bytes, 0)
    return OutOfMemory(call="memory broker", code=error.reason, requested_bytes=requested_bytes, free_bytes=free_bytes)


def backing_of(gpu: OpenedGpu) -> Backing:
    """The broker's where the environment names one, else the engine's own. Raises `StoreError`, `ValueError`."""
    settings = settings_from(os.environ)
    return OwnBacking(gpu.device) if settings is None else BrokerBacking(gpu.device, settings)


def moves_bulk_bytes(device: Device, region: Region) -> bool:
    """Whether large copies move bytes: not on a software GPU in phantom mode. Overwrites the start of the region."""
    size_bytes = min(BULK_BYTES, region.size_bytes)
    marks = device.host_arena(size_bytes)
    try:
        device.fill(region, 0, size_bytes=size_bytes)
        marks.fill(0xA5)
        device.copy_to_device(region, marks, size_bytes=size_bytes)
    finally:
        marks.close()
    return device.read(region, offset_bytes=size_bytes // 2, size_bytes=1) == b"\xa5"


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of calls that run side by side, a thread for each; all end before the first error is raised.

    `OutOfMemory` goes before other errors: it is what the caller can do something about.
    """
    if len(calls) == 1:
        return [calls[0]()]
    with ThreadPoolExecutor(len(calls), thread_name_prefix="gpu-shard") as pool:
        futures = [pool.submit(call) for call in calls]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if isinstance(error, OutOfMemory)), errors[0])
    return [future.result() for future in futures]

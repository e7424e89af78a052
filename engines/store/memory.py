"""Ranges of one GPU whose memory the broker lends: taken, given back, sealed and restored at addresses that stay.

All calls block. A broker that is restarted in the middle is asked again, once; a range that it was asked for then is
unmapped first, so that nothing is counted twice.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from devices.api import Device, DeviceError, ExportedChunk, ExportedMemory, Region
from engines.store.connection import Connection, ConnectionLostError, StoreError, StoreSettings
from engines.store.messages import (
    BrokerDone,
    ImageRestore,
    ImageRestored,
    ImageSeal,
    ImageSealed,
    MemoryAsk,
    MemoryGrant,
    MemoryReturn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What was asked of a broker that died is asked of the next one; a broker that dies of the question is not asked again.
ATTEMPTS = 2
# For so long a refusal that will pass is waited for, in all; whoever wakes the engine has a deadline of its own.
AGAIN_WITHIN_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A range has memory. `reserve_s` is the broker's, `map_s` ours."""

    size_bytes: int
    reserve_s: float
    map_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A range has memory with an image in it. `copy_s` and `wait_s` are the broker's; mapping ran meanwhile."""

    size_bytes: int
    copied_bytes: int
    reserve_s: float
    map_s: float
    copy_s: float
    wait_s: float
    restore_s: float  # the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lent:
    """What a range has from the broker."""

    size_bytes: int
    incarnation: int


class GpuStore:
    """The broker's memory on one GPU, over a connection of its own.

    A range is known by a name, unique in the engine; its region is reserved by the caller and stays the caller's.
    Raises `StoreError` for what the broker does not do, `DeviceError` for what the driver does not.
    """

    def __init__(self, device: Device, settings: StoreSettings, *, beside: GpuStore | None = None) -> None:
        """`beside`: another of this engine on the same GPU. Each hello says what both have."""
        self._device = device
        self._lent: dict[str, _Lent] = {}
        self._beside = beside
        if beside is not None:
            beside._beside = self
        self._connection = Connection(settings, held=lambda: {device.gpu_uuid: self._all_held_bytes})
        self._connection.open()

    @property
    def _all_held_bytes(self) -> int:
        return self.held_bytes + (self._beside.held_bytes if self._beside is not None else 0)

    def has(self, range_id: str) -> bool:
        """Whether the range has its memory over this connection."""
        return range_id in self._lent

    @property
    def held_bytes(self) -> int:
        """What is mapped here of the broker's memory."""
        return sum(lent.size_bytes for lent in list(self._lent.values()))

    def take(self, region: Region, range_id: str) -> Taken:
        """Put memory behind the region; its content is undefined."""
        return self.take_all({range_id: region})

    def take_all(self, regions: Mapping[str, Region]) -> Taken:
        """The same of several ranges of one size, `{range_id: region}`, in one question: all of them or none."""
        first_id, *more_ids = regions
        size_bytes = regions[first_id].size_bytes
        assert all(region.size_bytes == size_bytes for region in regions.values()), "of one size"
        ask = MemoryAsk(
            gpu_uuid=self._device.gpu_uuid, size_bytes=size_bytes, range_id=first_id, more_range_ids=tuple(more_ids)
        )

        def attempt() -> Taken:
            grant = self._connection.ask(ask, MemoryGrant)
            map_s = self._map_or_return(regions, grant)
            return Taken(size_bytes=size_bytes * len(regions), reserve_s=grant.reserve_s, map_s=map_s)

        return self._attempts(attempt)

    def give_back(self, region: Region, range_id: str) -> int:
        """Unmap the region, nothing copied; the bytes that are free for others then. Idempotent."""
        return self.give_back_all({range_id: region})

    def give_back_all(self, regions: Mapping[str, Region]) -> int:
        """The same of several ranges, `{range_id: region}`: all are unmapped, then returned in one line."""
        if self._lent.keys().isdisjoint(regions):  # nor wait for a restore of others
            return 0
        with self._connection.lock:
            mapped = [range_id for range_id in regions if range_id in self._lent]
            gone: dict[str, _Lent] = {}
            try:
                for range_id in mapped:
                    self._device.unback(regions[range_id])
                    gone[range_id] = self._lent.pop(range_id)
            finally:
                self._return(gone)
        return sum(lent.size_bytes for lent in gone.values())

    def seal(self, range_id: str, *, image_id: str, generation: int, content_id: str) -> ImageSealed:
        """Have the content kept in host memory. The range must not change meanwhile.

        Refused for a range that a former broker lent: only its maker can read that memory.
        """
        seal = ImageSeal(range_id=range_id, image_id=image_id, generation=generation, content_id=content_id)

        def attempt() -> ImageSealed:
            lent = self._lent.get(range_id)
            if lent is None or lent.incarnation != self._connection.incarnation:
                reason = f"the memory of {range_id} is of a broker that is gone, so its content cannot be kept any more"
                raise StoreError(reason, is_refused=True)
            return self._connection.ask(seal, ImageSealed)

        return self._attempts(attempt)

    def restore(
        self,
        region: Region,
        range_id: str,
        *,
        image_id: str,
        generation: int,
        on_lent: Callable[[], None] | None = None,
    ) -> Restored:
        """Memory and content at once: the broker copies while this maps. On any error the region has no memory.

        `on_lent` is called when the memory is there, before it is mapped: what else is asked for then delays nothing.
        """
        started_s = time.perf_counter()
        ask = ImageRestore(gpu_uuid=self._device.gpu_uuid, range_id=range_id, image_id=image_id, generation=generation)

        def attempt() -> Restored:
            self._connection.send(ask)
            grant = self._connection.hear(MemoryGrant)
            if on_lent is not None:
                on_lent()
            map_s = self._map_or_return({range_id: region}, grant, is_answer_due=True)
            try:
                filled = self._connection.hear(ImageRestored)
            except (StoreError, ConnectionLostError):
                self.give_back(region, range_id)
                raise
            return Restored(
                size_bytes=region.size_bytes,
                copied_bytes=filled.copied_bytes,
                reserve_s=grant.reserve_s,
                map_s=map_s,
                copy_s=filled.copy_s,
                wait_s=filled.wait_s,
                restore_s=time.perf_counter() - started_s,
            )

        return self._attempts(attempt)

    def close(self) -> None:
        """The broker takes everything back. Unmap first: close the device, or give every range back."""
        self._connection.close()

    # -- inside

    def _attempts(self, attempt: Callable[[], T]) -> T:
        """Again where the broker was restarted meanwhile, and while it says that another try may help."""
        give_up_s = time.monotonic() + AGAIN_WITHIN_S
        lost_count = 0
        while True:
            try:
                with self._connection.lock:
                    return attempt()
            except ConnectionLostError as error:
                lost_count += 1
                if lost_count == ATTEMPTS:
                    raise StoreError(str(error)) from error
            except StoreError as error:
                if not error.again_after_s or time.monotonic() + error.again_after_s > give_up_s:
                    raise
                time.sleep(error.again_after_s)

    def _map_or_return(
        self, regions: Mapping[str, Region], grant: MemoryGrant, *, is_answer_due: bool = False
    ) -> float:
        """Map what was granted, range after range; the seconds. If the driver refuses one, the broker has back all."""
        started_s = time.perf_counter()
        descriptors = self._connection.take_descriptors(len(grant.piece_bytes))
        chunks = [
            ExportedChunk(fd=fd, size_bytes=size) for fd, size in zip(descriptors, grant.piece_bytes, strict=True)
        ]
        every = ExportedMemory(gpu_uuid=self._device.gpu_uuid, chunks=tuple(chunks))
        incarnation = self._connection.incarnation
        lent = {
            range_id: _Lent(size_bytes=region.size_bytes, incarnation=incarnation)
            for range_id, region in regions.items()
        }
        mapped: list[Region] = []
        try:
            for region in regions.values():
                exported = ExportedMemory(
                    gpu_uuid=self._device.gpu_uuid, chunks=_first_chunks(chunks, size_bytes=region.size_bytes)
                )
                self._device.import_fds(exported, region=region, is_writable=True)
                mapped.append(region)
        except DeviceError:
            for region in mapped:
                with contextlib.suppress(DeviceError):  # unmapped then, too; the first error is the one to tell
                    self._device.unback(region)
            if is_answer_due:
                with contextlib.suppress(ConnectionLostError, StoreError):
                    self._connection.hear(ImageRestored)
            self._return(lent)
            raise
        finally:
            self._device.close_export(every)
        self._lent.update(lent)
        return time.perf_counter() - started_s

    def _return(self, gone: Mapping[str, _Lent]) -> None:
        """Tell the broker what is unmapped. One that is gone needs no word: the next hello says what is."""
        now = [range_id for range_id, lent in gone.items() if lent.incarnation == self._connection.incarnation]
        messages = [MemoryReturn(range_id=now[0], more_range_ids=tuple(now[1:]))] if now else []
        messages += [
            MemoryReturn(range_id=range_id, gpu_uuid=self._device.gpu_uuid, size_bytes=lent.size_bytes)
            for range_id, lent in gone.items()
            if lent.incarnation != self._connection.incarnation
        ]
        if self._connection.is_connected:
            with contextlib.suppress(ConnectionLostError):
                for message in messages:
                    self._connection.ask(message, BrokerDone)


def _first_chunks(chunks: list[ExportedChunk], *, size_bytes: int) -> tuple[ExportedChunk, ...]:
    """So many bytes from the front of the list, which has them no longer."""
    found: list[ExportedChunk] = []
    while chunks and size_bytes > 0:
        found.append(chunks.pop(0))
        size_bytes -= found[-1].size_bytes
    return tuple(found)

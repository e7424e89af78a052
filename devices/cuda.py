"""`Device` over the CUDA driver API; the only module that imports `cuda.bindings`.

It uses virtual memory management throughout (reserve, create, map, set access), so that a region keeps its addresses
while its memory comes and goes. The runtime API is never touched. Nothing here knows whether the driver below is
NVIDIA's or the software one: the dynamic loader decides, at the first call.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver

from devices.api import (
    BackResult,
    CopyResult,
    DeviceError,
    DeviceSettings,
    ExportedChunk,
    ExportedMemory,
    GpuMemory,
    HostBuffer,
    InvalidUse,
    NotFound,
    NotSupported,
    OutOfMemory,
    Region,
    RestoreResult,
    UnbackResult,
    round_up,
)
from devices.backed import Chunk, RegionState
from devices.cuda_errors import OUT_OF_MEMORY, error_class
from devices.pinned import PinnedBuffer, private_arena, shared_arena
from devices.regions import check_access, check_positive, check_range, check_small, chunk_spans, copy_length

if TYPE_CHECKING:
    from collections.abc import Iterator

_POSIX_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_STREAM_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit waiting for the engine's default stream
_EVENT_BLOCKING_NO_TIMING = 3  # CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING: sleep, do not spin


def call(name: str, *arguments: Any, requested_bytes: int = 0) -> Any:
    """The value of one driver call (None, one value, or a tuple); a refusal raises the matching `DeviceError`.

    `requested_bytes` is for the `OutOfMemory` it may raise.
    """
    try:
        result, *values = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # no driver library, or the driver is too old to have this function
        raise NotSupported(call=name, code="NO_SUCH_FUNCTION_OR_DRIVER", detail=str(error)[:200]) from error
    if result != driver.CUresult.CUDA_SUCCESS:
        if result.name == OUT_OF_MEMORY:
            is_host = name.startswith(("cuMemHost", "cuMemAddress"))
            free_bytes = None if is_host else _free_bytes()
            raise OutOfMemory(call=name, code=result.name, requested_bytes=requested_bytes, free_bytes=free_bytes)
        raise error_class(result.name)(call=name, code=result.name)
    if len(values) > 1:
        return tuple(values)
    return values[0] if values else None


def _free_bytes() -> int | None:
    """Free memory of the current context's device, or None if even that cannot be asked."""
    result, free_bytes, _ = driver.cuMemGetInfo()
    return int(free_bytes) if result == driver.CUresult.CUDA_SUCCESS else None


def device_ordinal(gpu_uuid: str) -> int:
    """CUDA's number of a GPU in this process. Raises `NotFound` when it is not among the visible ones."""
    call("cuInit", 0)
    wanted = gpu_uuid.split("-", 1)[-1].replace("-", "").lower()
    for ordinal in range(int(call("cuDeviceGetCount"))):
        uuid = call("cuDeviceGetUuid", call("cuDeviceGet", ordinal))
        if bytes(uuid.bytes).hex() == wanted:
            return ordinal
    raise NotFound(call="cuDeviceGetUuid", code="NO_SUCH_GPU", detail=gpu_uuid)


class CudaDevice:
    """One GPU in this process. Opening retains the primary context, which the engine's own CUDA code shares."""

    def __init__(self, gpu_uuid: str, *, settings: DeviceSettings | None = None) -> None:
        self._gpu_uuid = gpu_uuid
        self._ordinal = device_ordinal(gpu_uuid)
        self._device = call("cuDeviceGet", self._ordinal)
        self._context = call("cuDevicePrimaryCtxRetain", self._device)
        self._is_closed = False
        self._regions: dict[int, RegionState] = {}
        self._buffers: list[PinnedBuffer] = []
        self._ids = itertools.count(1)
        self._table_lock = threading.Lock()  # guards the two collections, never held during a driver call
        self._streams: list[Any] = []
        try:
            call("cuCtxSetCurrent", self._context)
            self._allocation = self._allocation_properties()
            minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self._granularity_bytes = int(call("cuMemGetAllocationGranularity", self._allocation, minimum))
            self._streams.extend(call("cuStreamCreate", _STREAM_NON_BLOCKING) for _ in range(3))
        except DeviceError:
            call("cuDevicePrimaryCtxRelease", self._device)
            raise
        self._up, self._down, self._aside = self._streams  # a fill would wait behind copies that are under way
        chunk_bytes = (settings or DeviceSettings()).chunk_bytes
        self._chunk_bytes = round_up(chunk_bytes, granularity_bytes=self._granularity_bytes)

    def _allocation_properties(self) -> Any:
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._ordinal
        properties.requestedHandleTypes = _POSIX_FD
        return properties

    @property
    def gpu_uuid(self) -> str:
        return self._gpu_uuid

    @property
    def granularity_bytes(self) -> int:
        return self._granularity_bytes

    @property
    def chunk_bytes(self) -> int:
        return self._chunk_bytes

    def memory(self) -> GpuMemory:
        self._enter()
        free_bytes, capacity_bytes = (int(value) for value in call("cuMemGetInfo"))
        return GpuMemory(capacity_bytes=capacity_bytes, used_bytes=capacity_bytes - free_bytes, free_bytes=free_bytes)

    # ---- regions

    def reserve(self, size_bytes: int) -> Region:
        self._enter()
        check_positive("reserve", size_bytes)
        rounded_bytes = round_up(size_bytes, granularity_bytes=self._granularity_bytes)
        address = int(call("cuMemAddressReserve", rounded_bytes, 0, 0, 0, requested_bytes=rounded_bytes))
        region = Region(region_id=next(self._ids), gpu_uuid=self._gpu_uuid, address=address, size_bytes=rounded_bytes)
        with self._table_lock:
            self._regions[region.region_id] = RegionState(region=region)
        return region

    def back(self, region: Region) -> BackResult:
        started_s = time.perf_counter()
        with self._locked(region) as state, self._backing(state):
            for offset_bytes, size_bytes in chunk_spans(region.size_bytes, chunk_bytes=self._chunk_bytes):
                self._add_chunk(state, offset_bytes=offset_bytes, size_bytes=size_bytes)
            self._give_access(state, offset_bytes=0, size_bytes=region.size_bytes)
        return BackResult(backed_bytes=region.size_bytes, back_s=time.perf_counter() - started_s)

    def unback(self, region: Region) -> UnbackResult:
        started_s = time.perf_counter()
        with self._locked(region) as state:
            released_bytes = self._drop_chunks(state)
        return UnbackResult(released_bytes=released_bytes, unback_s=time.perf_counter() - started_s)

    def is_backed(self, region: Region) -> bool:
        with self._locked(region) as state:
            return bool(state.chunks)

    def release_addresses(self, region: Region) -> None:
        with self._locked(region) as state:
            if state.chunks:
                raise InvalidUse(call="release_addresses", code="BACKED")
            call("cuMemAddressFree", region.address, region.size_bytes)
            with self._table_lock:
                del self._regions[region.region_id]

    def allocate(self, size_bytes: int) -> Region:
        region = self.reserve(size_bytes)
        try:
            self.back(region)
        except DeviceError:
            self.release_addresses(region)
            raise
        return region

    def free(self, region: Region) -> UnbackResult:
        with self._locked(region):
            result = self.unback(region)
            self.release_addresses(region)
        return result

    # ---- copies

    def host_arena(self, size_bytes: int, *, shared_fd: int | None = None) -> HostBuffer:
        self._enter()
        check_positive("host_arena", size_bytes)
        if shared_fd is None:
            buffer = private_arena(self._call, size_bytes=size_bytes)
        else:
            buffer = shared_arena(self._call, size_bytes=size_bytes, shared_fd=shared_fd)
        with self._table_lock:
            self._buffers = [*(kept for kept in self._buffers if not kept.is_closed), buffer]
        return buffer

    def copy_to_device(
        self,
        region: Region,
        host: HostBuffer,
        *,
        region_offset_bytes: int = 0,
        host_offset_bytes: int = 0,
        size_bytes: int | None = None,
    ) -> CopyResult:
        started_s = time.perf_counter()
        with self._used(region) as state:
            check_access(is_backed=bool(state.chunks), is_writable=state.is_writable)
            target, source, length_bytes = _copy_ends(state, host, region_offset_bytes, host_offset_bytes, size_bytes)
            with self._completed(self._up):
                for offset, size in chunk_spans(length_bytes, chunk_bytes=self._chunk_bytes):
                    call("cuMemcpyHtoDAsync", target + offset, source + offset, size, self._up)
        return CopyResult(copied_bytes=length_bytes, copy_s=time.perf_counter() - started_s)

    def copy_to_host(
        self,
        region: Region,
        host: HostBuffer,
        *,
        region_offset_bytes: int = 0,
        host_offset_bytes: int = 0,
        size_bytes: int | None = None,
    ) -> CopyResult:
        started_s = time.perf_counter()
        with self._used(region) as state:
            source, target, length_bytes = _copy_ends(state, host, region_offset_bytes, host_offset_bytes, size_bytes)
            with self._completed(self._down):
                for offset, size in chunk_spans(length_bytes, chunk_bytes=self._chunk_bytes):
                    call("cuMemcpyDtoHAsync", target + offset, source + offset, size, self._down)
        return CopyResult(copied_bytes=length_bytes, copy_s=time.perf_counter() - started_s)

    def restore(
        self, region: Region, host: HostBuffer, *, host_offset_bytes: int = 0, size_bytes: int | None = None
    ) -> RestoreResult:
        started_s = time.perf_counter()
        back_s = 0.0
        with self._locked(region) as state:
            length_bytes = copy_length(region, host, 0, host_offset_bytes, size_bytes)
            check_range("region", offset_bytes=0, size_bytes=length_bytes, whole_bytes=region.size_bytes)
            source = _host_address(host, offset_bytes=host_offset_bytes, size_bytes=length_bytes)
            with self._backing(state), self._completed(self._up):
                for offset, chunk_size in chunk_spans(region.size_bytes, chunk_bytes=self._chunk_bytes):
                    chunk_started_s = time.perf_counter()
                    self._add_chunk(state, offset_bytes=offset, size_bytes=chunk_size)
                    self._give_access(state, offset_bytes=offset, size_bytes=chunk_size)
                    back_s += time.perf_counter() - chunk_started_s
                    size = min(chunk_size, length_bytes - offset)
                    if size > 0:  # runs while the next chunk is created
                        call("cuMemcpyHtoDAsync", region.address + offset, source + offset, size, self._up)
        restore_s = time.perf_counter() - started_s
        return RestoreResult(restored_bytes=length_bytes, back_s=back_s, restore_s=restore_s)

    def fill(self, region: Region, byte: int, *, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        length_bytes = region.size_bytes - offset_bytes if size_bytes is None else size_bytes
        with self._locked(region) as state:
            check_access(is_backed=bool(state.chunks), is_writable=state.is_writable)
            address = state.address(offset_bytes=offset_bytes, size_bytes=length_bytes)
            with self._completed(self._aside):
                for offset, size in chunk_spans(length_bytes, chunk_bytes=self._chunk_bytes):
                    call("cuMemsetD8Async", address + offset, byte, size, self._aside)

    def write(self, region: Region, content: bytes, *, offset_bytes: int = 0) -> None:
        with self._locked(region) as state:
            check_access(is_backed=bool(state.chunks), is_writable=state.is_writable)
            check_small(len(content))
            address = state.address(offset_bytes=offset_bytes, size_bytes=len(content))
            if content:
                call("cuMemcpyHtoD", address, content, len(content))

    def read(self, region: Region, *, offset_bytes: int = 0, size_bytes: int) -> bytes:
        with self._locked(region) as state:
            check_small(size_bytes)
            address = state.address(offset_bytes=offset_bytes, size_bytes=size_bytes)
            content = bytearray(size_bytes)
            if size_bytes:
                target = (ctypes.c_char * size_bytes).from_buffer(content)
                call("cuMemcpyDtoH", ctypes.addressof(target), address, size_bytes)
        return bytes(content)

    # ---- sharing

    def export_fds(self, region: Region) -> ExportedMemory:
        chunks: list[ExportedChunk] = []
        with self._locked(region) as state:
            check_access(is_backed=bool(state.chunks))
            if state.is_imported:
                raise NotSupported(call="export_fds", code="IMPORTED", detail="ask the process that made the memory")
            try:
                for chunk in state.chunks:
                    descriptor = _export(region.address + chunk.offset_bytes)
                    chunks.append(ExportedChunk(fd=descriptor, size_bytes=chunk.size_bytes))
            except DeviceError:
                self.close_export(ExportedMemory(gpu_uuid=self._gpu_uuid, chunks=tuple(chunks)))
                raise
        return ExportedMemory(gpu_uuid=self._gpu_uuid, chunks=tuple(chunks))

    def import_fds(
        self, exported: ExportedMemory, *, region: Region | None = None, is_writable: bool = False
    ) -> Region:
        target = self.reserve(exported.size_bytes) if region is None else region
        try:
            self._map_export(exported, target, is_writable=is_writable)
        except DeviceError:
            if region is None:
                self.release_addresses(target)
            raise
        return target

    def _map_export(self, exported: ExportedMemory, region: Region, *, is_writable: bool) -> None:
        with self._locked(region) as state:
            if region.size_bytes != exported.size_bytes or exported.gpu_uuid != self._gpu_uuid:
                raise InvalidUse(call="import_fds", code="DOES_NOT_MATCH", detail=f"{exported.size_bytes} bytes")
            offset_bytes = 0
            with self._backing(state):
                state.is_imported, state.is_writable = True, is_writable
                for chunk in exported.chunks:
                    handle = call("cuMemImportFromShareableHandle", chunk.fd, _POSIX_FD)
                    self._map(state, handle, offset_bytes=offset_bytes, size_bytes=chunk.size_bytes)
                    offset_bytes += chunk.size_bytes
                self._give_access(state, offset_bytes=0, size_bytes=region.size_bytes)

    def close_export(self, exported: ExportedMemory) -> None:
        for chunk in exported.chunks:
            os.close(chunk.fd)

    # ---- end

    def synchronize(self) -> None:
        self._enter()
        call("cuCtxSynchronize")

    def close(self) -> None:
        if self._is_closed:
            return
        with self._table_lock:
            states, buffers = list(self._regions.values()), list(self._buffers)
        # A lost device refuses every one of these calls; its memory is gone anyway, so go on to the end.
        for state in states:
            with contextlib.suppress(DeviceError):
                self.free(state.region)
        for buffer in buffers:
            with contextlib.suppress(DeviceError):
                buffer.close()
        for stream in self._streams:
            with contextlib.suppress(DeviceError):
                call("cuStreamDestroy", stream)
        self._is_closed = True
        with contextlib.suppress(DeviceError):
            call("cuDevicePrimaryCtxRelease", self._device)

    # ---- inside

    def _call(self, name: str, *arguments: Any, requested_bytes: int = 0) -> Any:
        """`call` with the context made current first."""
        self._enter()
        return call(name, *arguments, requested_bytes=requested_bytes)

    def _enter(self) -> None:
        """Make the context current: callers come from any thread."""
        if self._is_closed:
            raise InvalidUse(call="device", code="CLOSED")
        call("cuCtxSetCurrent", self._context)

    @contextlib.contextmanager
    def _locked(self, region: Region) -> Iterator[RegionState]:
        """The state of a region of this device, for one caller at a time."""
        self._enter()
        with self._table_lock:
            state = self._regions.get(region.region_id)
        if state is None or state.region != region:
            raise InvalidUse(call="device", code="UNKNOWN_REGION", detail=str(region))
        with state.lock:
            if self._regions.get(region.region_id) is not state:  # freed while we waited
                raise InvalidUse(call="device", code="UNKNOWN_REGION", detail=str(region))
            yield state

    @contextlib.contextmanager
    def _used(self, region: Region) -> Iterator[RegionState]:
        """The same for copies, several at a time: the memory stays until the block ends."""
        with self._locked(region) as state:
            state.user_count += 1
        try:
            yield state
        finally:
            with state.lock:
                state.user_count -= 1
                state.lock.notify_all()

    @contextlib.contextmanager
    def _backing(self, state: RegionState) -> Iterator[None]:
        """Around whatever puts memory behind a region: on any exception the region is unbacked again."""
        if state.chunks:
            raise InvalidUse(call="back", code="BACKED")
        try:
            yield
        except OutOfMemory as error:
            self._roll_back(state)
            raise OutOfMemory(
                call=error.call,
                code=error.code,
                requested_bytes=state.region.size_bytes,
                free_bytes=_free_bytes(),
            ) from error
        except BaseException:
            self._roll_back(state)
            raise

    def _roll_back(self, state: RegionState) -> None:
        with contextlib.suppress(DeviceError):  # the error that led here is the one to tell
            self._drop_chunks(state)

    @contextlib.contextmanager
    def _completed(self, stream: Any) -> Iterator[None]:
        """Waits, also on the way out of an exception, until the stream has done what the block submitted."""
        try:
            yield
        finally:
            event = call("cuEventCreate", _EVENT_BLOCKING_NO_TIMING)
            try:
                call("cuEventRecord", event, stream)
                call("cuEventSynchronize", event)
            finally:
                call("cuEventDestroy", event)

    def _add_chunk(self, state: RegionState, *, offset_bytes: int, size_bytes: int) -> None:
        handle = call("cuMemCreate", size_bytes, self._allocation, 0, requested_bytes=size_bytes)
        self._map(state, handle, offset_bytes=offset_bytes, size_bytes=size_bytes)

    def _map(self, state: RegionState, handle: Any, *, offset_bytes: int, size_bytes: int) -> None:
        """Put a handle at its place and let go of it: the mapping keeps the memory, so that one unmap frees it all."""
        try:
            address = state.region.address + offset_bytes
            call("cuMemMap", address, size_bytes, 0, handle, 0, requested_bytes=size_bytes)
            state.chunks.append(Chunk(offset_bytes=offset_bytes, size_bytes=size_bytes))
        finally:
            call("cuMemRelease", handle)

    def _give_access(self, state: RegionState, *, offset_bytes: int, size_bytes: int) -> None:
        flags = driver.CUmemAccess_flags
        access = driver.CUmemAccessDesc()
        access.location = self._allocation.location
        access.flags = (
            flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if state.is_writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        )
        call("cuMemSetAccess", state.region.address + offset_bytes, size_bytes, [access], 1)

    def _drop_chunks(self, state: RegionState) -> int:
        """Unmap all that is mapped, in one call; the bytes. The region is unbacked then, even if the driver refuses."""
        while state.user_count:
            state.lock.wait()
        mapped_bytes = sum(chunk.size_bytes for chunk in state.chunks)
        state.chunks.clear()
        state.is_imported, state.is_writable = False, True
        if mapped_bytes:
            call("cuMemUnmap", state.region.address, mapped_bytes)
        return mapped_bytes


def _export(address: int) -> int:
    """A descriptor for the physical memory that is mapped at an address."""
    handle = call("cuMemRetainAllocationHandle", address)
    try:
        return int(call("cuMemExportToShareableHandle", handle, _POSIX_FD, 0))
    finally:
        call("cuMemRelease", handle)


def _host_address(host: HostBuffer, *, offset_bytes: int, size_bytes: int) -> int:
    if not isinstance(host, PinnedBuffer):
        raise InvalidUse(call="host buffer", code="FOREIGN", detail=type(host).__name__)
    return host.address_of(offset_bytes=offset_bytes, size_bytes=size_bytes)


def _copy_ends(
    state: RegionState, host: HostBuffer, region_offset_bytes: int, host_offset_bytes: int, size_bytes: int | None
) -> tuple[int, int, int]:
    """Device address, host address and length of a copy, checked."""
    length_bytes = copy_length(state.region, host, region_offset_bytes, host_offset_bytes, size_bytes)
    device_address = state.address(offset_bytes=region_offset_bytes, size_bytes=length_bytes)
    return device_address, _host_address(host, offset_bytes=host_offset_bytes, size_bytes=length_bytes), length_bytes

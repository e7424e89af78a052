"""The port in virtual time, for the simulator: same semantics and errors, costs returned instead of slept.

Give every simulated process a `VirtualDevice` per GPU on one `VirtualHost`. A call takes effect at once; the time it
would have taken is in its result, and the sum of all costs of a device, also of calls whose result has no room for it,
is had with `take_spent_s`. Copies queue for the GPU's link from the host's present time on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from devices.api import (
    BackResult,
    CopyResult,
    DeviceSettings,
    ExportedChunk,
    ExportedMemory,
    GpuCondition,
    GpuDescription,
    GpuFault,
    GpuMemory,
    HostBuffer,
    InvalidUse,
    LimitsSupport,
    MemoryLimit,
    MiB,
    NotFound,
    NotSupported,
    OutOfMemory,
    Region,
    RestoreResult,
    UnbackResult,
    round_up,
)
from devices.regions import check_access, check_positive, check_range, check_small, copy_length
from devices.sparse import SparseBytes
from devices.virtual_host import Memory, Process, VirtualGpu, VirtualHost

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["VirtualBuffer", "VirtualDevice", "VirtualGpu", "VirtualHost", "VirtualInventory"]

_GRANULARITY_BYTES = 2 * MiB
_FIRST_ADDRESS = 0x7F00_0000_0000


class VirtualInventory:
    """A virtual host's GPUs, seen from outside."""

    def __init__(self, host: VirtualHost) -> None:
        self._host = host
        self._is_closed = False

    def gpus(self) -> tuple[GpuDescription, ...]:
        self._check_open()
        return tuple(gpu.description for gpu in self._host.gpus.values() if not gpu.is_lost)

    def memory(self, gpu_uuid: str) -> GpuMemory:
        self._check_open()
        gpu = self._host.gpu(gpu_uuid)
        capacity_bytes, free_bytes = gpu.description.capacity_bytes, gpu.free_bytes
        return GpuMemory(capacity_bytes=capacity_bytes, used_bytes=capacity_bytes - free_bytes, free_bytes=free_bytes)

    def process_bytes(self, gpu_uuid: str) -> Mapping[int, int | None]:
        self._check_open()
        self._host.gpu(gpu_uuid)
        return {
            pid: process.used_bytes(gpu_uuid)
            for pid, process in sorted(self._host.processes.items())
            if process.used_bytes(gpu_uuid)
        }

    def utilization_fraction(self, gpu_uuid: str) -> float | None:
        self._check_open()
        return self._host.gpu(gpu_uuid).utilization_fraction

    def condition(self, gpu_uuid: str) -> GpuCondition:
        self._check_open()
        return self._host.gpu(gpu_uuid).condition

    def peer_bytes_per_s(self, gpu_uuid: str) -> Mapping[str, float]:
        """None: virtual GPUs have no direct links."""
        self._check_open()
        self._host.gpu(gpu_uuid)
        return {}

    def limits_support(self, gpu_uuid: str) -> LimitsSupport:
        self._check_open()
        self._host.gpu(gpu_uuid)
        reason = "" if self._host.has_limits else "this virtual driver has no memory limits"
        return LimitsSupport(is_supported=self._host.has_limits, reason=reason)

    def set_limit(self, gpu_uuid: str, namespace: str, *, soft_bytes: int, hard_bytes: int | None) -> None:
        if soft_bytes < 0 or (hard_bytes is not None and hard_bytes < soft_bytes):
            raise InvalidUse(call="set_limit", code="SOFT_ABOVE_HARD", detail=f"{soft_bytes} > {hard_bytes}")
        self._check_namespace(namespace)
        limits = self._host.gpu(gpu_uuid).limits
        limits[namespace] = (soft_bytes, hard_bytes)
        if limits[namespace] == (0, None):
            del limits[namespace]

    def limit(self, gpu_uuid: str, namespace: str) -> MemoryLimit:
        self._check_namespace(namespace)
        return self._host.limit(gpu_uuid, namespace)

    def clear_limit(self, gpu_uuid: str, namespace: str) -> None:
        self.set_limit(gpu_uuid, namespace, soft_bytes=0, hard_bytes=None)

    def faults(self, *, wait_s: float) -> tuple[GpuFault, ...]:
        """What was reported so far; nothing more can come while the caller waits."""
        del wait_s
        self._check_open()
        found, self._host.faults = tuple(self._host.faults), []
        return found

    def close(self) -> None:
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise InvalidUse(call="inventory", code="CLOSED")

    def _check_namespace(self, namespace: str) -> None:
        self._check_open()
        if not self._host.has_limits:
            raise NotSupported(call="limit", code="NOT_SUPPORTED", detail=namespace)
        if namespace not in self._host.namespaces:
            raise NotFound(call="limit", code="NO_SUCH_NAMESPACE", detail=namespace)


class VirtualBuffer:
    """Host memory that costs what was written to it."""

    def __init__(self, size_bytes: int, content: SparseBytes) -> None:
        self._size_bytes = size_bytes
        self.content = content
        self._is_closed = False

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def check(self, *, offset_bytes: int, size_bytes: int) -> None:
        """Raises `InvalidUse` for a part that is not wholly inside, or after `close`."""
        if self._is_closed:
            raise InvalidUse(call="host buffer", code="CLOSED")
        check_range("host buffer", offset_bytes=offset_bytes, size_bytes=size_bytes, whole_bytes=self._size_bytes)

    def write(self, content: bytes | bytearray | memoryview, *, offset_bytes: int = 0) -> None:
        written = bytes(content)
        self.check(offset_bytes=offset_bytes, size_bytes=len(written))
        self.content.write(offset_bytes, written)

    def read(self, *, offset_bytes: int = 0, size_bytes: int) -> bytes:
        self.check(offset_bytes=offset_bytes, size_bytes=size_bytes)
        return self.content.read(offset_bytes, size_bytes)

    def fill(self, byte: int, *, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        length_bytes = self._size_bytes - offset_bytes if size_bytes is None else size_bytes
        self.check(offset_bytes=offset_bytes, size_bytes=length_bytes)
        self.content.fill(offset_bytes, length_bytes, byte)

    def close(self) -> None:
        self._is_closed = True


@dataclass(slots=True, kw_only=True)
class _RegionState:
    region: Region
    memory: Memory | None = None
    is_imported: bool = False
    is_writable: bool = True


class VirtualDevice:
    """One GPU in one virtual process. A region's memory is one piece; `chunk_bytes` only shapes a restore's overlap."""

    def __init__(self, host: VirtualHost, gpu_uuid: str, *, pid: int, settings: DeviceSettings | None = None) -> None:
        self._host = host
        self._gpu_uuid = gpu_uuid
        self._pid = pid
        host.open_context(gpu_uuid, pid)
        self._profile = host.gpu(gpu_uuid).profile
        self._spent_s = self._profile.context_s
        chunk_bytes = (settings or DeviceSettings()).chunk_bytes
        self._chunk_bytes = round_up(chunk_bytes, granularity_bytes=_GRANULARITY_BYTES)
        self._is_closed = False
        self._ids = itertools.count(1)
        self._next_address = _FIRST_ADDRESS
        self._regions: dict[int, _RegionState] = {}
        self._buffers: list[VirtualBuffer] = []

    @property
    def gpu_uuid(self) -> str:
        return self._gpu_uuid

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def granularity_bytes(self) -> int:
        return _GRANULARITY_BYTES

    @property
    def chunk_bytes(self) -> int:
        return self._chunk_bytes

    def take_spent_s(self) -> float:
        """Seconds that all calls since the last `take_spent_s` would have taken, one after the other."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def memory(self) -> GpuMemory:
        return self._host.memory_seen_by(self._gpu_uuid, self._enter())

    # ---- regions

    def reserve(self, size_bytes: int) -> Region:
        self._enter()
        check_positive("reserve", size_bytes)
        rounded_bytes = round_up(size_bytes, granularity_bytes=_GRANULARITY_BYTES)
        region = Region(
            region_id=next(self._ids), gpu_uuid=self._gpu_uuid, address=self._next_address, size_bytes=rounded_bytes
        )
        self._next_address += rounded_bytes
        self._regions[region.region_id] = _RegionState(region=region)
        return region

    def back(self, region: Region) -> BackResult:
        state = self._state(region)
        self._put_memory(state)
        back_s = self._profile.call_s + region.size_bytes / self._profile.back_bytes_per_s
        return BackResult(backed_bytes=region.size_bytes, back_s=self._spend(back_s))

    def unback(self, region: Region) -> UnbackResult:
        state = self._state(region)
        if state.memory is None:
            return UnbackResult(released_bytes=0, unback_s=0.0)
        self._host.let_go(state.memory, self._enter())
        state.memory, state.is_imported, state.is_writable = None, False, True
        unback_s = self._profile.call_s + region.size_bytes / self._profile.unback_bytes_per_s
        return UnbackResult(released_bytes=region.size_bytes, unback_s=self._spend(unback_s))

    def is_backed(self, region: Region) -> bool:
        return self._state(region).memory is not None

    def release_addresses(self, region: Region) -> None:
        if self._state(region).memory is not None:
            raise InvalidUse(call="release_addresses", code="BACKED")
        del self._regions[region.region_id]

    def allocate(self, size_bytes: int) -> Region:
        region = self.reserve(size_bytes)
        try:
            self.back(region)
        except OutOfMemory:
            self.release_addresses(region)
            raise
        return region

    def free(self, region: Region) -> UnbackResult:
        result = self.unback(region)
        self.release_addresses(region)
        return result

    # ---- copies

    def host_arena(self, size_bytes: int, *, shared_fd: int | None = None) -> HostBuffer:
        self._enter()
        check_positive("host_arena", size_bytes)
        content = SparseBytes()
        if shared_fd is not None:
            file_bytes, content = self._host.shared_files[shared_fd]
            if file_bytes < size_bytes:
                raise InvalidUse(call="host_arena", code="FILE_TOO_SMALL", detail=f"need {size_bytes} bytes")
        self._spend(size_bytes / self._profile.pin_bytes_per_s)
        self._buffers.append(VirtualBuffer(size_bytes, content))
        return self._buffers[-1]

    def copy_to_device(
        self,
        region: Region,
        host: HostBuffer,
        *,
        region_offset_bytes: int = 0,
        host_offset_bytes: int = 0,
        size_bytes: int | None = None,
    ) -> CopyResult:
        memory = self._writable(region)
        length_bytes = copy_length(region, host, region_offset_bytes, host_offset_bytes, size_bytes)
        _check_inside(region, region_offset_bytes, length_bytes)
        source = _buffer_content(host, offset_bytes=host_offset_bytes, size_bytes=length_bytes)
        memory.content.copy_from(source, source_offset=host_offset_bytes, offset=region_offset_bytes, size=length_bytes)
        done_s = self._host.book_to_device(self._gpu_uuid, length_bytes, ready_s=self._host.now_s)
        return CopyResult(copied_bytes=length_bytes, copy_s=self._spend(done_s - self._host.now_s))

    def copy_to_host(
        self,
        region: Region,
        host: HostBuffer,
        *,
        region_offset_bytes: int = 0,
        host_offset_bytes: int = 0,
        size_bytes: int | None = None,
    ) -> CopyResult:
        memory = self._readable(region)
        length_bytes = copy_length(region, host, region_offset_bytes, host_offset_bytes, size_bytes)
        _check_inside(region, region_offset_bytes, length_bytes)
        target = _buffer_content(host, offset_bytes=host_offset_bytes, size_bytes=length_bytes)
        target.copy_from(memory.content, source_offset=region_offset_bytes, offset=host_offset_bytes, size=length_bytes)
        done_s = self._host.book_to_host(self._gpu_uuid, length_bytes, ready_s=self._host.now_s)
        return CopyResult(copied_bytes=length_bytes, copy_s=self._spend(done_s - self._host.now_s))

    def restore(
        self, region: Region, host: HostBuffer, *, host_offset_bytes: int = 0, size_bytes: int | None = None
    ) -> RestoreResult:
        state = self._state(region)
        length_bytes = copy_length(region, host, 0, host_offset_bytes, size_bytes)
        _check_inside(region, 0, length_bytes)
        source = _buffer_content(host, offset_bytes=host_offset_bytes, size_bytes=length_bytes)
        memory = self._put_memory(state)
        memory.content.copy_from(source, source_offset=host_offset_bytes, offset=0, size=length_bytes)
        back_s = self._profile.call_s + region.size_bytes / self._profile.back_bytes_per_s
        restore_s = self._overlapped_s(region.size_bytes, length_bytes, back_s=back_s)
        return RestoreResult(restored_bytes=length_bytes, back_s=back_s, restore_s=self._spend(restore_s))

    def _overlapped_s(self, region_bytes: int, length_bytes: int, *, back_s: float) -> float:
        """How long backing and copying take when each chunk is copied while the next is created.

        With even chunks the last byte arrives when the slower of two chains ends: the first chunk's creation and then
        all copies, or all creations and then the last chunk's copy.
        """
        now_s = self._host.now_s
        chunk_count = -(-region_bytes // self._chunk_bytes)
        copies_end_s = self._host.book_to_device(self._gpu_uuid, length_bytes, ready_s=now_s + back_s / chunk_count)
        last_bytes = min(self._chunk_bytes, length_bytes)
        return max(copies_end_s - now_s, back_s + last_bytes / self._profile.to_device_bytes_per_s)

    def fill(self, region: Region, byte: int, *, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        length_bytes = region.size_bytes - offset_bytes if size_bytes is None else size_bytes
        memory = self._writable(region)
        _check_inside(region, offset_bytes, length_bytes)
        memory.content.fill(offset_bytes, length_bytes, byte)
        self._spend(self._profile.call_s + length_bytes / self._profile.memory_bytes_per_s)

    def write(self, region: Region, content: bytes, *, offset_bytes: int = 0) -> None:
        memory = self._writable(region)
        check_small(len(content))
        _check_inside(region, offset_bytes, len(content))
        memory.content.write(offset_bytes, bytes(content))
        self._spend(self._profile.call_s)

    def read(self, region: Region, *, offset_bytes: int = 0, size_bytes: int) -> bytes:
        memory = self._readable(region)
        check_small(size_bytes)
        _check_inside(region, offset_bytes, size_bytes)
        self._spend(self._profile.call_s)
        return memory.content.read(offset_bytes, size_bytes)

    # ---- sharing

    def export_fds(self, region: Region) -> ExportedMemory:
        memory = self._readable(region)
        if self._state(region).is_imported:
            raise NotSupported(call="export_fds", code="IMPORTED", detail="ask the process that made the memory")
        descriptor = self._host.export(memory, self._enter())
        chunk = ExportedChunk(fd=descriptor, size_bytes=memory.size_bytes)
        return ExportedMemory(gpu_uuid=self._gpu_uuid, chunks=(chunk,))

    def import_fds(
        self, exported: ExportedMemory, *, region: Region | None = None, is_writable: bool = False
    ) -> Region:
        process = self._enter()
        memories = [self._host.exported(chunk.fd) for chunk in exported.chunks]
        if region is not None and self._state(region).memory is not None:
            raise InvalidUse(call="back", code="BACKED")
        target_bytes = exported.size_bytes if region is None else region.size_bytes
        if target_bytes != exported.size_bytes or exported.gpu_uuid != self._gpu_uuid or len(memories) != 1:
            raise InvalidUse(call="import_fds", code="DOES_NOT_MATCH", detail=f"{exported.size_bytes} bytes")
        state = self._state(self.reserve(target_bytes) if region is None else region)
        self._host.hold(memories[0], process)
        state.memory, state.is_imported, state.is_writable = memories[0], True, is_writable
        self._spend(self._profile.call_s)
        return state.region

    def close_export(self, exported: ExportedMemory) -> None:
        for chunk in exported.chunks:
            self._host.close_descriptor(chunk.fd)

    # ---- end

    def synchronize(self) -> None:
        self._enter()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        process = self._host.processes.get(self._pid)
        for state in self._regions.values():
            if state.memory is not None and process is not None and state.memory.memory_id in process.memories:
                self._host.let_go(state.memory, process)
        for buffer in self._buffers:
            buffer.close()
        self._regions.clear()
        self._host.close_context(self._gpu_uuid, self._pid)

    # ---- inside

    def _enter(self) -> Process:
        if self._is_closed:
            raise InvalidUse(call="device", code="CLOSED")
        process = self._host.process(self._pid)
        self._host.gpu(self._gpu_uuid)
        return process

    def _spend(self, cost_s: float) -> float:
        self._spent_s += cost_s
        return cost_s

    def _state(self, region: Region) -> _RegionState:
        self._enter()
        state = self._regions.get(region.region_id)
        if state is None or state.region != region:
            raise InvalidUse(call="device", code="UNKNOWN_REGION", detail=str(region))
        return state

    def _put_memory(self, state: _RegionState) -> Memory:
        if state.memory is not None:
            raise InvalidUse(call="back", code="BACKED")
        state.memory = self._host.create_memory(self._gpu_uuid, self._pid, state.region.size_bytes)
        return state.memory

    def _readable(self, region: Region) -> Memory:
        memory = self._state(region).memory
        check_access(is_backed=memory is not None)
        assert memory is not None
        return memory

    def _writable(self, region: Region) -> Memory:
        state = self._state(region)
        check_access(is_backed=state.memory is not None, is_writable=state.is_writable)
        assert state.memory is not None
        return state.memory


def _check_inside(region: Region, offset_bytes: int, size_bytes: int) -> None:
    check_range("region", offset_bytes=offset_bytes, size_bytes=size_bytes, whole_bytes=region.size_bytes)


def _buffer_content(host: HostBuffer, *, offset_bytes: int, size_bytes: int) -> SparseBytes:
    if not isinstance(host, VirtualBuffer):
        raise InvalidUse(call="host buffer", code="FOREIGN", detail=type(host).__name__)
    host.check(offset_bytes=offset_bytes, size_bytes=size_bytes)
    return host.content

"""The hardware port: what the rest of Sublet may ask of a GPU, in our own words.

`Inventory` looks at a whole host from outside (NVML): which GPUs, how full, by whom, and the driver's memory limits.
`Device` is one GPU inside the calling process (CUDA): addresses, memory behind them, copies.
`devices.checkpoint.ProcessCheckpoint` freezes another process and moves its GPU memory.

Rules that hold for every implementation:

- All calls are synchronous and may block for as long as the hardware takes. Call them from a worker thread, never from
  an event loop. Every object may be used from several threads; calls about one region wait for each other.
- Sizes and offsets are integers in bytes, durations are floats in seconds.
- A call either did everything or nothing: an operation that raises has given back what it had taken.
- Operations that cost time return it. The real implementation measured it; the virtual one computed it and never slept.
- Anything the driver refuses raises a `DeviceError`; nothing returns a sentinel. A missing measurement is None, not 0.

Implementations: `devices.nvml.NvmlInventory`, `devices.cuda.CudaDevice` and
`devices.cuda_checkpoint.CudaProcessCheckpoint` on any driver, NVIDIA's or the software one;
`devices.virtual.VirtualInventory`, `VirtualDevice` and `devices.virtual_checkpoint.VirtualProcessCheckpoint` in virtual
time, for the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

# Physical memory comes in pieces of this size: large enough that creating one (about 0.1 ms) costs a tenth of copying
# it over PCIe 5 (about 1.2 ms), small enough that a restore overlaps the two well and wastes little at the end.
CHUNK_BYTES_DEFAULT = 64 * MiB


# ---- errors ----------------------------------------------------------------------------------------------------------


class DeviceError(Exception):
    """A driver call was refused. Subclasses say what the caller can do about it; the bare class means: nothing known.

    `call` is the driver's entry point (for example `cuMemCreate`), `code` the driver's own name of the error.
    """

    def __init__(self, *, call: str, code: str, detail: str = "") -> None:
        super().__init__(f"{call}: {code}" + (f" ({detail})" if detail else ""))
        self.call = call
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        """Survives pickling, so that an error in another process keeps its fields."""
        return _revive, (type(self), self.args, self.__dict__)


def _revive(kind: type[DeviceError], arguments: tuple[object, ...], fields: dict[str, object]) -> DeviceError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(fields)
    return error


class OutOfMemory(DeviceError):
    """The GPU, or the memory limit of this process's group, has no room. Free something, then try again.

    `requested_bytes` is the whole operation, `free_bytes` what the device reported once all was rolled back; None when
    it could not be asked, or when it was the host's memory that ran out.
    """

    def __init__(self, *, call: str, code: str, requested_bytes: int, free_bytes: int | None) -> None:
        free = "unknown" if free_bytes is None else str(free_bytes)
        super().__init__(call=call, code=code, detail=f"requested {requested_bytes} bytes, free {free}")
        self.requested_bytes = requested_bytes
        self.free_bytes = free_bytes


class NotSupported(DeviceError):
    """This driver, device or privilege cannot do that, now or later. Choose another way."""


class NotPermitted(DeviceError):
    """The driver can do that but not for this user. Limits, for example, need root."""


class DeviceLost(DeviceError):
    """The GPU fell off the bus, was reset, or its context is broken. Close the device; its memory is gone."""


class ClientEvicted(DeviceError):
    """The driver ended this process's GPU access in favour of a guaranteed owner. The process has to be restarted."""


class NotFound(DeviceError):
    """No such GPU, process or namespace (any more)."""


class NotReady(DeviceError):
    """The driver gave up waiting within the given time. Trying again later may succeed."""


class InvalidUse(DeviceError):
    """The caller broke the port's contract: a range outside the region, memory that is not backed, a closed device."""


# ---- what a host has -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDescription:
    """One GPU of this host; nothing in it changes while the driver stays loaded."""

    uuid: str  # as NVML prints it, with its prefix: "GPU-…" or "MIG-…"
    index: int  # NVML's; not CUDA's ordinal, which depends on the process's environment
    name: str
    capacity_bytes: int  # total as NVML reports it, the driver's part included
    reserved_bytes: int  # held by the driver and firmware from the start; nobody can allocate it
    pci_bus_id: str
    link_generation: int | None  # PCIe generation the link can reach, for example 5
    link_width_count: int | None  # PCIe lanes
    is_software: bool  # True on the software driver; every figure measured there must be labelled so
    driver_version: str
    numa_index: int | None = None  # of the host memory that is nearest; None: the host has one, or does not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """How full one GPU is, as the asker sees it. Inside a limited cgroup, CUDA shows the limit as the capacity.

    `used_bytes` includes what the driver reserves, so that `used_bytes + free_bytes == capacity_bytes`.
    """

    capacity_bytes: int
    used_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """The driver's guard on a group of processes on one GPU: `soft_bytes` is guaranteed, `hard_bytes` never passed."""

    soft_bytes: int
    hard_bytes: int | None  # None: no upper limit
    used_bytes: int  # by the group's processes now, contexts included


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSupport:
    """Whether `set_limit` works on this GPU, found by asking the driver, not by its version; `reason` says why not."""

    is_supported: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFault:
    """A critical error that the driver reported for one GPU. `xid` is NVIDIA's number (79: fell off the bus)."""

    gpu_uuid: str
    xid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCondition:
    """How one GPU is; None: this one, or this driver, does not say."""

    temperature_c: int | None = None
    is_too_hot: bool | None = None  # its clocks are lowered because of its temperature, by the driver or the hardware
    ecc_error_count: int | None = None  # memory errors that could not be corrected, since the driver was loaded


class Inventory(Protocol):
    """A host's GPUs as seen from outside the workloads. The caller must sit outside every limited cgroup itself.

    Raises `NotFound` for an unknown GPU, `DeviceLost` for one that is gone, `NotSupported` where the driver cannot.
    """

    def gpus(self) -> tuple[GpuDescription, ...]:
        """All GPUs, by index. A lost GPU is left out."""

    def memory(self, gpu_uuid: str) -> GpuMemory:
        """How full the GPU is, everybody's use counted."""

    def process_bytes(self, gpu_uuid: str) -> Mapping[int, int | None]:
        """`{pid: bytes}` for each process with a context on the GPU, as pids of the asker's namespace, ascending.

        None where the driver does not say (it is not zero).
        """

    def utilization_fraction(self, gpu_uuid: str) -> float | None:
        """Part of the last sample period (1/6 to 1 s) in which a kernel ran, 0 to 1; None: the driver does not say."""

    def condition(self, gpu_uuid: str) -> GpuCondition:
        """Temperature, thermal slowdown, memory errors."""

    def peer_bytes_per_s(self, gpu_uuid: str) -> Mapping[str, float]:
        """`{uuid of another GPU of this host: rate of the direct links to it}`, in one direction.

        One that is not named has no direct link, or the driver does not say.
        """

    def limits_support(self, gpu_uuid: str) -> LimitsSupport:
        """Whether the driver can limit groups of processes on this GPU. Never raises for a mere no."""

    def set_limit(self, gpu_uuid: str, namespace: str, *, soft_bytes: int, hard_bytes: int | None) -> None:
        """Set both numbers for a group, at once, also while it runs. A hard limit below use takes nothing back.

        `namespace` is the path of a cgroup v2 directory (the container's leaf), or a group that the software driver
        knows. Needs root. Raises `InvalidUse` when soft is above hard, `NotFound` when the directory does not exist.
        """

    def limit(self, gpu_uuid: str, namespace: str) -> MemoryLimit:
        """The group's limits and use, as the driver has them. Without a limit: soft 0, hard None."""

    def clear_limit(self, gpu_uuid: str, namespace: str) -> None:
        """Soft 0, no hard limit. Call it before the cgroup goes, or its ancestors keep the reservation. Idempotent."""

    def faults(self, *, wait_s: float) -> tuple[GpuFault, ...]:
        """Critical errors since the last call, waiting up to `wait_s` for a first one. Empty: none came."""

    def close(self) -> None:
        """Let go of the driver. Idempotent."""


# ---- one GPU in this process -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """How a process uses its device."""

    # Size of one piece of physical memory, bytes; rounded up to the device's granularity. 2 MiB to 1 GiB is sensible.
    chunk_bytes: int = CHUNK_BYTES_DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A range of device addresses that stays the same while the region lives, with or without memory behind it.

    A value: the state (is it backed?) is with the device that made it, and only that device accepts it.
    """

    region_id: int  # unique within the device object
    gpu_uuid: str
    address: int
    size_bytes: int  # a multiple of the granularity, at least what was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedChunk:
    """One piece of physical memory as a file descriptor that another process can map."""

    fd: int = field(repr=False)
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedMemory:
    """All physical memory of a region, in address order. Each descriptor keeps its memory alive until it is closed.

    Send the descriptors over a Unix socket (SCM_RIGHTS), rebuild this value on the other side, then close both copies
    with `Device.close_export`: memory counts as free only when no mapping and no descriptor is left anywhere.
    """

    gpu_uuid: str
    chunks: tuple[ExportedChunk, ...]

    @property
    def size_bytes(self) -> int:
        return sum(chunk.size_bytes for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackResult:
    """Memory was put behind a region."""

    backed_bytes: int
    back_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnbackResult:
    """Memory was taken from a region. It is free for others unless someone else maps it or holds a descriptor."""

    released_bytes: int
    unback_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyResult:
    """Bytes moved over the link; `copy_s` runs from the call to the last byte, waiting for other copies included."""

    copied_bytes: int
    copy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """A region was backed and filled from host memory, both at once.

    `back_s` is the part spent on creating and mapping memory; the copies ran meanwhile, so the parts do not add up.
    """

    restored_bytes: int
    back_s: float
    restore_s: float  # the whole, from the call to the last byte


@runtime_checkable
class HostBuffer(Protocol):
    """Pinned host memory that the device copies to and from at full speed."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def is_closed(self) -> bool: ...

    def write(self, content: bytes | bytearray | memoryview, *, offset_bytes: int = 0) -> None:
        """Put bytes in place. Raises `InvalidUse` outside the buffer or after `close`."""

    def read(self, *, offset_bytes: int = 0, size_bytes: int) -> bytes:
        """A copy of a part of the buffer."""

    def fill(self, byte: int, *, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        """Set a part (default: all from the offset) to one value, 0 to 255. Scrub before another tenant's use."""

    def close(self) -> None:
        """Unpin and free. Not while a copy runs. Idempotent."""


class Device(Protocol):
    """One GPU in this process. Opening it makes a context, which costs device memory (hundreds of MiB on a real GPU).

    Never fork after opening; start children with spawn or exec.
    """

    @property
    def gpu_uuid(self) -> str: ...

    @property
    def granularity_bytes(self) -> int:
        """Sizes of regions and chunks are multiples of this (2 MiB on today's GPUs)."""

    @property
    def chunk_bytes(self) -> int: ...

    def memory(self) -> GpuMemory:
        """How full the GPU is as this process sees it, other processes' use included."""

    # -- regions

    def reserve(self, size_bytes: int) -> Region:
        """A stable address range without memory. Costs no device memory. `size_bytes` is rounded up."""

    def back(self, region: Region) -> BackResult:
        """Put memory behind the whole region; its content is undefined (possibly a former owner's: fill before use).

        Raises `OutOfMemory` with everything rolled back, `InvalidUse` if the region is backed already.
        """

    def unback(self, region: Region) -> UnbackResult:
        """Take the memory away, waiting first for copies on the region. The content is lost, the addresses stay.

        Idempotent: an unbacked region gives zero bytes.
        """

    def is_backed(self, region: Region) -> bool: ...

    def release_addresses(self, region: Region) -> None:
        """Give the address range back. Raises `InvalidUse` while it is backed. The region is unknown afterwards."""

    def allocate(self, size_bytes: int) -> Region:
        """Reserve and back in one step; on `OutOfMemory` nothing stays."""

    def free(self, region: Region) -> UnbackResult:
        """Unback and release the addresses, whatever state the region is in."""

    # -- copies

    def host_arena(self, size_bytes: int, *, shared_fd: int | None = None) -> HostBuffer:
        """Pinned host memory, of this process or shared.

        With `shared_fd` (a memfd or a file of at least that size) it is a mapping of that file, so that several
        processes can pin the same bytes; the descriptor may be closed afterwards.

        Pinning takes about as long as writing the memory once: do it at start. In the software driver's phantom mode
        pages cost nothing until written. Raises `OutOfMemory` when the host has no room.
        """

    def copy_to_device(
        self,
        region: Region,
        host: HostBuffer,
        *,
        region_offset_bytes: int = 0,
        host_offset_bytes: int = 0,
        size_bytes: int | None = None,
    ) -> CopyResult:
        """Host to device, chunk by chunk on a stream of its own; returns when the last byte is there.

        `size_bytes` defaults to the rest of the region or of the buffer, whichever is smaller.
        """

    def copy_to_host(
        self,
        region: Region,
        host: HostBuffer,
        *,
        region_offset_bytes: int = 0,
        host_offset_bytes: int = 0,
        size_bytes: int | None = None,
    ) -> CopyResult:
        """Device to host; otherwise as `copy_to_device`. Runs beside copies of the other direction."""

    def restore(
        self, region: Region, host: HostBuffer, *, host_offset_bytes: int = 0, size_bytes: int | None = None
    ) -> RestoreResult:
        """Back the region and fill it from its start, the copy of one chunk overlapping the creation of the next.

        `size_bytes` (default as in `copy_to_device`) may be less than the region; all of the region is backed.
        On any error the region is unbacked again.
        """

    def fill(self, region: Region, byte: int, *, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        """Set a part of the region (default: all from the offset) to one value, 0 to 255, on the device itself."""

    def write(self, region: Region, content: bytes, *, offset_bytes: int = 0) -> None:
        """Put a few bytes (up to 64 KiB) in place: markers and checksums, not weights."""

    def read(self, region: Region, *, offset_bytes: int = 0, size_bytes: int) -> bytes:
        """A few bytes (up to 64 KiB) from the device."""

    # -- sharing

    def export_fds(self, region: Region) -> ExportedMemory:
        """Descriptors for all memory of a backed region. The caller closes them with `close_export`.

        Raises `NotSupported` for a region that was itself imported: ask the process that made the memory.
        """

    def import_fds(
        self, exported: ExportedMemory, *, region: Region | None = None, is_writable: bool = False
    ) -> Region:
        """Map another process's memory, read-only unless said otherwise. Does not close the descriptors.

        It goes into `region` (reserved, unbacked, of the same size: so addresses survive park and wake) or a new one.

        `unback` or `free` drops the mapping. Writing to a read-only import raises `InvalidUse`.
        """

    def close_export(self, exported: ExportedMemory) -> None:
        """Close the descriptors of an export, on either side. Exactly once per copy of them."""

    # -- end

    def synchronize(self) -> None:
        """Wait until everything submitted by this process to the device is done. The way to see late faults."""

    def close(self) -> None:
        """Free all regions and buffers of this object, leave the device. Idempotent; later calls are `InvalidUse`."""


def round_up(size_bytes: int, *, granularity_bytes: int) -> int:
    """The smallest multiple of the granularity that holds `size_bytes`."""
    return -(-size_bytes // granularity_bytes) * granularity_bytes

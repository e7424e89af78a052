"""A host whose GPUs exist in virtual time: capacity, limits, links and processes, shared by all virtual devices on it.

Nothing here reads a clock, sleeps, draws random numbers or starts a thread: the simulation tells the time with
`advance_to`, and the same calls in the same order give the same results, bit for bit. It is meant for one thread.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from devices.api import (
    ClientEvicted,
    DeviceLost,
    GpuCondition,
    GpuDescription,
    GpuFault,
    GpuMemory,
    InvalidUse,
    MemoryLimit,
    NotFound,
    OutOfMemory,
)
from devices.sparse import SparseBytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from devices.profiles import GpuProfile

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
# Far above any real descriptor, so that one closed by mistake cannot hit a file of the simulator.
_FIRST_FD = 1_000_000
_FIRST_PID = 1_000
_WELL = GpuCondition(temperature_c=40, is_too_hot=False, ecc_error_count=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualGpu:
    """A GPU to put into a virtual host."""

    uuid: str
    profile: GpuProfile


@dataclass(slots=True, kw_only=True)
class Memory:
    """One piece of physical memory; it lives as long as somebody holds it."""

    memory_id: int
    gpu_uuid: str
    size_bytes: int
    content: SparseBytes
    owner_pid: int | None  # who is charged; None once the owner has let go and others still hold it
    holds: dict[int, int] = field(default_factory=dict)  # {pid: mappings and descriptors}


@dataclass(slots=True, kw_only=True)
class Process:
    """A process with GPU memory. `charged`, `contexts` and `parked` are bytes by GPU."""

    pid: int
    namespace: str
    is_evicted: bool = False
    is_frozen: bool = False  # locked or checkpointed: its calls would block
    charged: dict[str, int] = field(default_factory=dict)
    contexts: dict[str, int] = field(default_factory=dict)
    parked: dict[str, int] = field(default_factory=dict)  # of both, what a checkpoint has taken off the GPU
    memories: dict[int, Memory] = field(default_factory=dict)  # those it holds

    def used_bytes(self, gpu_uuid: str) -> int:
        held_bytes = self.charged.get(gpu_uuid, 0) + self.contexts.get(gpu_uuid, 0)
        return held_bytes - self.parked.get(gpu_uuid, 0)

    def is_in(self, namespace: str) -> bool:
        """Whether a limit on this group counts for the process: its own group, or an ancestor of it."""
        return self.namespace == namespace or self.namespace.startswith(namespace.rstrip("/") + "/")


@dataclass(slots=True, kw_only=True)
class Gpu:
    """The state of one GPU. `used_bytes` with the reserve never passes the capacity."""

    description: GpuDescription
    profile: GpuProfile
    used_bytes: int = 0
    to_device_busy_until_s: float = 0.0
    to_host_busy_until_s: float = 0.0
    is_lost: bool = False
    utilization_fraction: float | None = None
    condition: GpuCondition = _WELL
    limits: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # {namespace: (soft, hard)}
    leavings: SparseBytes = field(default_factory=SparseBytes)  # of the memory freed last: what the next owner finds

    @property
    def free_bytes(self) -> int:
        return self.description.capacity_bytes - self.description.reserved_bytes - self.used_bytes


class VirtualHost:
    """What all virtual devices of a host share.

    `has_limits`: the driver can guard groups. `evicts`: it ends a borrower's access when a guaranteed owner needs the
    room, as MPS does; off by default.
    """

    def __init__(self, gpus: Sequence[VirtualGpu], *, has_limits: bool = True, evicts: bool = False) -> None:
        self.has_limits = has_limits
        self.evicts = evicts
        self.now_s = 0.0
        self.gpus = {gpu.uuid: _new_gpu(index, gpu) for index, gpu in enumerate(gpus)}
        self.processes: dict[int, Process] = {}
        self.namespaces: set[str] = set()
        self.faults: list[GpuFault] = []
        self.shared_files: dict[int, tuple[int, SparseBytes]] = {}  # {fd: (size, content)}
        self._exports: dict[int, tuple[Memory, int]] = {}  # {fd: (memory, pid that holds the descriptor)}
        self._pids = itertools.count(_FIRST_PID)
        self._memory_ids = itertools.count(1)
        self._fds = itertools.count(_FIRST_FD)

    # ---- what the simulation does

    def advance_to(self, now_s: float) -> None:
        """Tell the time. Raises `ValueError` if it would go back."""
        if now_s < self.now_s:
            raise ValueError(f"virtual time cannot go from {self.now_s} back to {now_s}")
        self.now_s = now_s

    def start_process(self, *, namespace: str = "") -> int:
        """A new process in a group (none by default); its pid."""
        pid = next(self._pids)
        self.processes[pid] = Process(pid=pid, namespace=namespace)
        if namespace:
            self.namespaces.add(namespace)
        return pid

    def end_process(self, pid: int) -> None:
        """The process is gone, by whatever cause; what only it held is free. Idempotent."""
        process = self.processes.pop(pid, None)
        if process is not None:
            self._let_go_of_all(process)

    def add_namespace(self, namespace: str) -> None:
        """Create a group without a process, as making its cgroup directory does."""
        self.namespaces.add(namespace)

    def create_shared_file(self, size_bytes: int) -> int:
        """A descriptor for `host_arena(shared_fd=…)`, good in every process of this host."""
        descriptor = next(self._fds)
        self.shared_files[descriptor] = (size_bytes, SparseBytes())
        return descriptor

    def lose_gpu(self, gpu_uuid: str) -> None:
        """The GPU falls off the bus: every call about it fails from now on."""
        self.gpu(gpu_uuid).is_lost = True
        self.faults.append(GpuFault(gpu_uuid=gpu_uuid, xid=79))

    def find_gpu(self, gpu_uuid: str) -> None:
        """A lost one is there again; what was on it is gone, and its processes must open it anew."""
        gpu = self.gpus[gpu_uuid]
        if gpu.is_lost:
            for process in self.processes.values():
                for memory in [m for m in process.memories.values() if m.gpu_uuid == gpu_uuid]:
                    self.let_go(memory, process, times=memory.holds[process.pid])
                gpu.used_bytes -= process.contexts.pop(gpu_uuid, 0)
        gpu.is_lost = False

    def set_condition(self, gpu_uuid: str, condition: GpuCondition) -> None:
        self.gpu(gpu_uuid).condition = condition

    def set_utilization(self, gpu_uuid: str, fraction: float | None) -> None:
        self.gpu(gpu_uuid).utilization_fraction = fraction

    # ---- what the devices ask

    def gpu(self, gpu_uuid: str) -> Gpu:
        """The state of a GPU that is there. Raises `NotFound` or `DeviceLost`."""
        gpu = self.gpus.get(gpu_uuid)
        if gpu is None:
            raise NotFound(call="gpu", code="NO_SUCH_GPU", detail=gpu_uuid)
        if gpu.is_lost:
            raise DeviceLost(call="gpu", code="GPU_IS_LOST", detail=gpu_uuid)
        return gpu

    def process(self, pid: int) -> Process:
        """A process that may call the driver. Raises `InvalidUse` when it has ended, `ClientEvicted` when it must."""
        process = self.processes.get(pid)
        if process is None:
            raise InvalidUse(call="device", code="PROCESS_ENDED", detail=str(pid))
        if process.is_evicted:
            raise ClientEvicted(call="device", code="CUDA_ERROR_MPS_CLIENT_TERMINATED")
        if process.is_frozen:
            raise InvalidUse(call="device", code="PROCESS_FROZEN", detail="the call would block")
        return process

    def open_context(self, gpu_uuid: str, pid: int) -> None:
        """Charge a process's first context on a GPU. Raises `OutOfMemory`."""
        gpu, process = self.gpu(gpu_uuid), self.process(pid)
        if gpu_uuid not in process.contexts:
            self.admit(gpu, process, gpu.profile.context_bytes, call="cuDevicePrimaryCtxRetain")
            process.contexts[gpu_uuid] = gpu.profile.context_bytes
            gpu.used_bytes += gpu.profile.context_bytes

    def close_context(self, gpu_uuid: str, pid: int) -> None:
        process = self.processes.get(pid)
        if process is not None:
            self.gpus[gpu_uuid].used_bytes -= process.contexts.pop(gpu_uuid, 0)

    def create_memory(self, gpu_uuid: str, pid: int, size_bytes: int) -> Memory:
        """Physical memory, held once and charged to the process, with a former owner's bytes in it."""
        gpu, process = self.gpu(gpu_uuid), self.process(pid)
        self.admit(gpu, process, size_bytes, call="cuMemCreate")
        memory = Memory(
            memory_id=next(self._memory_ids),
            gpu_uuid=gpu_uuid,
            size_bytes=size_bytes,
            content=gpu.leavings.clone(size_bytes),
            owner_pid=pid,
        )
        gpu.used_bytes += size_bytes
        process.charged[gpu_uuid] = process.charged.get(gpu_uuid, 0) + size_bytes
        self.hold(memory, process)
        return memory

    def hold(self, memory: Memory, process: Process) -> None:
        memory.holds[process.pid] = memory.holds.get(process.pid, 0) + 1
        process.memories[memory.memory_id] = memory

    def let_go(self, memory: Memory, process: Process, *, times: int = 1) -> None:
        """End so many holds of a process; the memory is freed with the last hold of the last process."""
        left = memory.holds[process.pid] - times
        if left:
            memory.holds[process.pid] = left
            return
        del memory.holds[process.pid]
        del process.memories[memory.memory_id]
        if memory.owner_pid == process.pid:
            process.charged[memory.gpu_uuid] -= memory.size_bytes
            memory.owner_pid = None
        if not memory.holds:
            gpu = self.gpus[memory.gpu_uuid]
            gpu.used_bytes -= memory.size_bytes
            gpu.leavings = memory.content

    def export(self, memory: Memory, process: Process) -> int:
        """A descriptor that holds the memory for the process."""
        self.hold(memory, process)
        descriptor = next(self._fds)
        self._exports[descriptor] = (memory, process.pid)
        return descriptor

    def exported(self, descriptor: int) -> Memory:
        """What a descriptor stands for. Raises `InvalidUse` when it is closed."""
        if descriptor not in self._exports:
            raise InvalidUse(call="import_fds", code="BAD_DESCRIPTOR", detail=str(descriptor))
        return self._exports[descriptor][0]

    def send_descriptor(self, descriptor: int, *, to_pid: int) -> int:
        """Duplicate a descriptor into another process, as SCM_RIGHTS does."""
        return self.export(self.exported(descriptor), self.process(to_pid))

    def close_descriptor(self, descriptor: int) -> None:
        memory = self.exported(descriptor)
        _, pid = self._exports.pop(descriptor)
        self.let_go(memory, self.processes[pid])

    def memory_seen_by(self, gpu_uuid: str, process: Process) -> GpuMemory:
        """How full the GPU is as a process sees it: a hard limit on its own group (not on an ancestor) is its size."""
        gpu = self.gpu(gpu_uuid)
        capacity_bytes = gpu.description.capacity_bytes - gpu.description.reserved_bytes
        free_bytes = gpu.free_bytes
        _, hard_bytes = gpu.limits.get(process.namespace, (0, None))
        if hard_bytes is not None and hard_bytes < capacity_bytes:
            capacity_bytes = hard_bytes
            free_bytes = min(free_bytes, max(0, hard_bytes - self.group_bytes(gpu_uuid, process.namespace)))
        return GpuMemory(capacity_bytes=capacity_bytes, used_bytes=capacity_bytes - free_bytes, free_bytes=free_bytes)

    # ---- limits

    def group_bytes(self, gpu_uuid: str, namespace: str) -> int:
        """What the group's processes use on a GPU, contexts included."""
        return sum(process.used_bytes(gpu_uuid) for process in self._group(namespace))

    def limit(self, gpu_uuid: str, namespace: str) -> MemoryLimit:
        soft_bytes, hard_bytes = self.gpu(gpu_uuid).limits.get(namespace, (0, None))
        used_bytes = self.group_bytes(gpu_uuid, namespace)
        return MemoryLimit(soft_bytes=soft_bytes, hard_bytes=hard_bytes, used_bytes=used_bytes)

    def _group(self, namespace: str) -> Iterable[Process]:
        return (process for process in self.processes.values() if process.is_in(namespace))

    def admit(self, gpu: Gpu, process: Process, size_bytes: int, *, call: str) -> None:
        """Raises `OutOfMemory` when so many bytes may not be taken now; evicts borrowers first where that is on."""
        uuid = gpu.description.uuid
        is_guaranteed = False
        for namespace, (soft_bytes, hard_bytes) in gpu.limits.items():
            if not process.is_in(namespace):
                continue
            wanted_bytes = self.group_bytes(uuid, namespace) + size_bytes
            if hard_bytes is not None and wanted_bytes > hard_bytes:
                self._refuse(uuid, process, size_bytes, call=call)
            is_guaranteed |= wanted_bytes <= soft_bytes
        while size_bytes > gpu.free_bytes:
            victim = self._most_over_request(uuid, process) if self.evicts and is_guaranteed else None
            if victim is None:
                self._refuse(uuid, process, size_bytes, call=call)
            else:
                victim.is_evicted = True
                self._let_go_of_all(victim)

    def _refuse(self, gpu_uuid: str, process: Process, size_bytes: int, *, call: str) -> None:
        free_bytes = self.memory_seen_by(gpu_uuid, process).free_bytes
        raise OutOfMemory(call=call, code=_OUT_OF_MEMORY, requested_bytes=size_bytes, free_bytes=free_bytes)

    def _most_over_request(self, gpu_uuid: str, requester: Process) -> Process | None:
        """The process furthest above its guarantee, ties to the smaller pid; never the requester's own group."""
        over = [
            (-self._over_request_bytes(gpu_uuid, process), process.pid)
            for process in self.processes.values()
            if process is not requester and not process.is_evicted
        ]
        candidates = sorted(entry for entry in over if entry[0] < 0)
        return self.processes[candidates[0][1]] if candidates else None

    def _over_request_bytes(self, gpu_uuid: str, process: Process) -> int:
        over_bytes = process.used_bytes(gpu_uuid)
        for namespace, (soft_bytes, _) in self.gpus[gpu_uuid].limits.items():
            if process.is_in(namespace):
                over_bytes = min(over_bytes, max(0, self.group_bytes(gpu_uuid, namespace) - soft_bytes))
        return over_bytes

    def _let_go_of_all(self, process: Process) -> None:
        for gpu_uuid, parked_bytes in process.parked.items():  # what follows takes it off once more
            self.gpus[gpu_uuid].used_bytes += parked_bytes
        process.parked = {}
        for memory in list(process.memories.values()):
            self.let_go(memory, process, times=memory.holds[process.pid])
        for descriptor in [fd for fd, (_, pid) in self._exports.items() if pid == process.pid]:
            del self._exports[descriptor]
        for gpu_uuid, context_bytes in process.contexts.items():
            self.gpus[gpu_uuid].used_bytes -= context_bytes
        process.contexts.clear()

    # ---- links

    def book_to_device(self, gpu_uuid: str, size_bytes: int, *, ready_s: float) -> float:
        """When so many bytes, ready to go at `ready_s`, have arrived; one copy after the other in each direction."""
        gpu = self.gpus[gpu_uuid]
        start_s = max(ready_s, gpu.to_device_busy_until_s)
        gpu.to_device_busy_until_s = start_s + size_bytes / gpu.profile.to_device_bytes_per_s
        return gpu.to_device_busy_until_s

    def book_to_host(self, gpu_uuid: str, size_bytes: int, *, ready_s: float) -> float:
        gpu = self.gpus[gpu_uuid]
        start_s = max(ready_s, gpu.to_host_busy_until_s)
        gpu.to_host_busy_until_s = start_s + size_bytes / gpu.profile.to_host_bytes_per_s
        return gpu.to_host_busy_until_s

    def check_invariants(self) -> None:
        """What must always hold; the simulation calls it after each step."""
        for uuid, gpu in self.gpus.items():
            assert gpu.free_bytes >= 0, (uuid, gpu.used_bytes)
            memories = {m.memory_id: m for process in self.processes.values() for m in process.memories.values()}
            memory_bytes = sum(memory.size_bytes for memory in memories.values() if memory.gpu_uuid == uuid)
            context_bytes = sum(process.contexts.get(uuid, 0) for process in self.processes.values())
            parked_bytes = sum(process.parked.get(uuid, 0) for process in self.processes.values())
            held_bytes = memory_bytes + context_bytes - parked_bytes
            assert gpu.used_bytes == held_bytes, (uuid, gpu.used_bytes, memory_bytes, context_bytes, parked_bytes)


def _new_gpu(index: int, gpu: VirtualGpu) -> Gpu:
    profile = gpu.profile
    description = GpuDescription(
        uuid=gpu.uuid,
        index=index,
        name=profile.title,
        capacity_bytes=profile.capacity_bytes,
        reserved_bytes=profile.reserved_bytes,
        pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
        link_generation=profile.link_generation,
        link_width_count=profile.link_width_count,
        is_software=True,
        driver_version="virtual",
    )
    return Gpu(description=description, profile=profile)

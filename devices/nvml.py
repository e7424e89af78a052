"""`Inventory` over NVML; the only module that imports `pynvml`.

The process that uses it has to sit outside every limited cgroup and in the host's pid namespace: NVML corrects what it
shows for the asker's cgroup, and names pids as the asker's namespace knows them.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pynvml

from devices import mig
from devices.api import (
    DeviceError,
    DeviceLost,
    GpuCondition,
    GpuDescription,
    GpuFault,
    GpuMemory,
    InvalidUse,
    LimitsSupport,
    MemoryLimit,
    NotFound,
    NotPermitted,
    NotReady,
    NotSupported,
)
from devices.links import NVLINK_BYTES_PER_S, Link, direct_rates

if TYPE_CHECKING:
    from collections.abc import Mapping

# The software driver says in its driver version what it is.
_SOFTWARE_DRIVER_MARK = "softgpu"
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_NVLINK = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
_TOO_HOT = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
_PCI_DEVICES = Path("/sys/bus/pci/devices")
# A burst of faults is drained in one call up to this many; the rest comes with the next.
_FAULTS_PER_CALL_MAX = 64

_CLASSES: dict[int, type[DeviceError]] = {
    pynvml.NVML_ERROR_NOT_SUPPORTED: NotSupported,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: NotSupported,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NotSupported,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: NotSupported,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: NotSupported,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: NotSupported,
    pynvml.NVML_ERROR_NO_PERMISSION: NotPermitted,
    pynvml.NVML_ERROR_NOT_FOUND: NotFound,
    pynvml.NVML_ERROR_GPU_IS_LOST: DeviceLost,
    pynvml.NVML_ERROR_RESET_REQUIRED: DeviceLost,
    pynvml.NVML_ERROR_GPU_NOT_FOUND: DeviceLost,
    pynvml.NVML_ERROR_TIMEOUT: NotReady,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: InvalidUse,
    pynvml.NVML_ERROR_UNINITIALIZED: InvalidUse,
}


def call(name: str, *arguments: Any, **options: Any) -> Any:
    """The value of one NVML call; a refusal raises the matching `DeviceError`.

    A function that the installed `pynvml` or the driver does not have raises `NotSupported`.
    """
    function = getattr(pynvml, name, None)
    if function is None:
        raise NotSupported(call=name, code="FUNCTION_NOT_FOUND", detail="nvidia-ml-py is too old")
    try:
        return function(*arguments, **options)
    except pynvml.NVMLError as error:
        number = int(error.value)
        raise _CLASSES.get(number, DeviceError)(call=name, code=str(error) or str(number)) from error


class NvmlInventory:
    """The GPUs of this host. Opening it initialises NVML; raises `NotSupported` where there is no driver."""

    def __init__(self) -> None:
        call("nvmlInit")
        self._is_closed = False
        self._lock = threading.Lock()  # guards opening, use and closing of the event set
        self._events: Any = None
        self._event_parts: dict[int | None, list[mig.Part]] = {}  # {NVML's device pointer: what is offered of it}
        self._driver_version = str(call("nvmlSystemGetDriverVersion"))

    def gpus(self) -> tuple[GpuDescription, ...]:
        """A GPU that is cut into MIG instances is left out for them; they are numbered after all GPUs."""
        self._check_open()
        found: list[GpuDescription] = []
        gpu_count = instance_count = int(call("nvmlDeviceGetCount"))
        for index in range(gpu_count):
            try:
                gpu = call("nvmlDeviceGetHandleByIndex", index)
                instances = mig.instances_of(call, gpu)
                if instances is None:
                    found.append(self._describe(gpu, gpu, index))
                for instance in instances or ():
                    found.append(self._describe(instance, gpu, instance_count))
                    instance_count += 1
            except DeviceLost:
                continue
        return tuple(sorted(found, key=lambda each: each.index))

    def _describe(self, handle: Any, gpu: Any, index: int) -> GpuDescription:
        """`gpu`: itself, or the one that the instance is a part of."""
        memory = call("nvmlDeviceGetMemoryInfo", handle, version=pynvml.nvmlMemory_v2)
        bus_id = _text(call("nvmlDeviceGetPciInfo", gpu).busId)
        return GpuDescription(
            uuid=str(call("nvmlDeviceGetUUID", handle)),
            index=index,
            name=str(call("nvmlDeviceGetName", handle)),
            capacity_bytes=int(memory.total),
            reserved_bytes=int(memory.reserved),
            pci_bus_id=bus_id,
            link_generation=_optional("nvmlDeviceGetMaxPcieLinkGeneration", gpu),
            link_width_count=_optional("nvmlDeviceGetMaxPcieLinkWidth", gpu),
            is_software=_SOFTWARE_DRIVER_MARK in self._driver_version,
            driver_version=self._driver_version,
            numa_index=numa_index(bus_id),
        )

    def memory(self, gpu_uuid: str) -> GpuMemory:
        memory = call("nvmlDeviceGetMemoryInfo", self._handle(gpu_uuid), version=pynvml.nvmlMemory_v2)
        capacity_bytes, free_bytes = int(memory.total), int(memory.free)
        return GpuMemory(capacity_bytes=capacity_bytes, used_bytes=capacity_bytes - free_bytes, free_bytes=free_bytes)

    def process_bytes(self, gpu_uuid: str) -> Mapping[int, int | None]:
        handle = self._handle(gpu_uuid)
        processes = list(call("nvmlDeviceGetComputeRunningProcesses", handle))
        with contextlib.suppress(NotSupported):  # clients of an MPS server may be listed only here
            processes += call("nvmlDeviceGetMPSComputeRunningProcesses", handle)
        found: dict[int, int | None] = {}
        for process in processes:
            used_bytes = None if process.usedGpuMemory is None else int(process.usedGpuMemory)
            if found.get(int(process.pid)) is None:
                found[int(process.pid)] = used_bytes
        return dict(sorted(found.items()))

    def utilization_fraction(self, gpu_uuid: str) -> float | None:
        try:
            return float(call("nvmlDeviceGetUtilizationRates", self._handle(gpu_uuid)).gpu) / 100
        except NotSupported:
            return None

    def condition(self, gpu_uuid: str) -> GpuCondition:
        handle = mig.gpu_of(call, self._handle(gpu_uuid))  # What an instance's chip feels, it feels.
        reasons = _optional("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:  # Drivers before R535 know it under its older name.
            reasons = _optional("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        errors = (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        return GpuCondition(
            temperature_c=_optional("nvmlDeviceGetTemperature", handle, pynvml.NVML_TEMPERATURE_GPU),
            is_too_hot=None if reasons is None else bool(reasons & _TOO_HOT),
            ecc_error_count=_optional("nvmlDeviceGetTotalEccErrors", handle, *errors),
        )

    def peer_bytes_per_s(self, gpu_uuid: str) -> Mapping[str, float]:
        handle = self._handle(gpu_uuid)
        links = _links(handle)
        if not links:
            return {}
        peers = {}
        for gpu in self.gpus():
            reach = None
            if gpu.uuid != gpu_uuid:
                reach = _optional("nvmlDeviceGetP2PStatus", handle, self._handle(gpu.uuid), _NVLINK)
            if reach == pynvml.NVML_P2P_STATUS_OK:
                peers[gpu.uuid] = gpu.pci_bus_id
        return direct_rates(links, peers)

    def limits_support(self, gpu_uuid: str) -> LimitsSupport:
        handle = self._handle(gpu_uuid)
        namespace = str(_own_cgroup())
        try:
            limit = _read_limit(handle, namespace)
            # Writing back what was read changes nothing and shows whether this user may write at all.
            _write_limit(handle, namespace, soft_bytes=limit.soft_bytes, hard_bytes=limit.hard_bytes)
        except NotPermitted:
            return LimitsSupport(is_supported=False, reason="setting memory limits needs root")
        except NotSupported as error:
            return LimitsSupport(is_supported=False, reason=f"needs driver R615 or newer, and no MIG: {error}")
        except DeviceLost:
            raise
        except DeviceError as error:
            return LimitsSupport(is_supported=False, reason=f"the driver cannot use cgroup {namespace}: {error}")
        return LimitsSupport(is_supported=True, reason="")

    def set_limit(self, gpu_uuid: str, namespace: str, *, soft_bytes: int, hard_bytes: int | None) -> None:
        if soft_bytes < 0 or (hard_bytes is not None and hard_bytes < soft_bytes):
            raise InvalidUse(call="set_limit", code="SOFT_ABOVE_HARD", detail=f"{soft_bytes} > {hard_bytes}")
        _write_limit(self._handle(gpu_uuid), namespace, soft_bytes=soft_bytes, hard_bytes=hard_bytes)

    def limit(self, gpu_uuid: str, namespace: str) -> MemoryLimit:
        return _read_limit(self._handle(gpu_uuid), namespace)

    def clear_limit(self, gpu_uuid: str, namespace: str) -> None:
        _write_limit(self._handle(gpu_uuid), namespace, soft_bytes=0, hard_bytes=None)

    def faults(self, *, wait_s: float) -> tuple[GpuFault, ...]:
        found: list[GpuFault] = []
        with self._lock:
            self._check_open()
            self._open_events()
            wait_ms = int(wait_s * 1000)
            while len(found) < _FAULTS_PER_CALL_MAX:
                try:
                    event = call("nvmlEventSetWait_v2", self._events, wait_ms)
                except NotReady:
                    break
                parts = self._event_parts.get(_pointer(event.device), [])
                if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                    struck = mig.struck(parts, instance_id=int(event.gpuInstanceId))
                    found += [GpuFault(gpu_uuid=uuid, xid=int(event.eventData)) for uuid in struck]
                wait_ms = 0
        return tuple(found)

    def _open_events(self) -> None:
        if self._events is not None:
            return
        events = call("nvmlEventSetCreate")
        for index in range(int(call("nvmlDeviceGetCount"))):
            try:
                handle = call("nvmlDeviceGetHandleByIndex", index)
                call("nvmlDeviceRegisterEvents", handle, pynvml.nvmlEventTypeXidCriticalError, events)
                self._event_parts[_pointer(handle)] = mig.parts_of(call, handle)
            except (NotSupported, DeviceLost):
                continue
        self._events = events

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._events is not None:
                call("nvmlEventSetFree", self._events)
            call("nvmlShutdown")

    def _check_open(self) -> None:
        if self._is_closed:
            raise InvalidUse(call="inventory", code="CLOSED")

    def _handle(self, gpu_uuid: str) -> Any:
        self._check_open()
        try:
            return call("nvmlDeviceGetHandleByUUID", gpu_uuid)
        except InvalidUse as error:  # what the driver says to a string that is no UUID
            raise NotFound(call=error.call, code=error.code, detail=gpu_uuid) from error


def numa_index(pci_bus_id: str, *, devices: Path = _PCI_DEVICES) -> int | None:
    """The NUMA node of a PCI device, as the kernel has it; None where it has none, or does not say.

    NVML writes the domain with eight digits, the kernel with four.
    """
    domain, _, rest = pci_bus_id.lower().partition(":")
    try:
        number = int((devices / f"{domain[-4:]}:{rest}" / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return number if number >= 0 else None


def _optional(name: str, *arguments: Any) -> int | None:
    """A number that some devices do not have."""
    try:
        return int(call(name, *arguments))
    except NotSupported:
        return None


def _links(handle: Any) -> list[Link]:
    """The active NVLinks of a GPU whose rate is known."""
    found = []
    for number in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if _optional("nvmlDeviceGetNvLinkState", handle, number) != pynvml.NVML_FEATURE_ENABLED:
                continue
            rate = NVLINK_BYTES_PER_S.get(_optional("nvmlDeviceGetNvLinkVersion", handle, number) or 0)
            remote = call("nvmlDeviceGetNvLinkRemotePciInfo", handle, number)
        except (InvalidUse, NotSupported):
            continue  # A GPU with fewer links than NVML can count.
        if rate is not None:
            found.append(Link(remote_bus_id=_text(remote.busId), bytes_per_s=rate))
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _pointer(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _own_cgroup() -> Path:
    """This process's cgroup v2 directory, or the root where it is not seen."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return _CGROUP_ROOT
    own = next((line[3:] for line in lines if line.startswith("0::/")), "/")
    roots = (_CGROUP_ROOT, _CGROUP_ROOT / "unified")
    root = next((root for root in roots if (root / "cgroup.procs").exists()), _CGROUP_ROOT)
    path = root / own.lstrip("/")
    return path if path.is_dir() else root


def _read_limit(handle: Any, namespace: str) -> MemoryLimit:
    record = _limits_record("c_nvmlGetMemoryLimits_v1_t", namespace)
    call("nvmlDeviceGetMemoryLimits_v1", handle, record)
    hard_bytes = int(record.hardLimit)
    return MemoryLimit(
        soft_bytes=int(record.softLimit),
        hard_bytes=None if hard_bytes == pynvml.NVML_DEVICE_MEMORY_LIMIT_MAX else hard_bytes,
        used_bytes=int(record.currentUsed),
    )


def _write_limit(handle: Any, namespace: str, *, soft_bytes: int, hard_bytes: int | None) -> None:
    record = _limits_record("c_nvmlSetMemoryLimits_v1_t", namespace)
    record.softLimit = soft_bytes
    record.hardLimit = pynvml.NVML_DEVICE_MEMORY_LIMIT_MAX if hard_bytes is None else hard_bytes
    call("nvmlDeviceSetMemoryLimits_v1", handle, record)


def _limits_record(name: str, namespace: str) -> Any:
    record_type = getattr(pynvml, name, None)
    if record_type is None:
        raise NotSupported(call=name, code="FUNCTION_NOT_FOUND", detail="nvidia-ml-py is older than 13.615")
    record = record_type()
    record.nameSpace = namespace.encode()
    return record

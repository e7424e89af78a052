"""`ProcessCheckpoint` over the CUDA driver (570 and newer): park and wake processes that know nothing of us.

The caller must see the target in its pid namespace and be allowed to trace it. Restoring needs persistence mode, or a
process on the host that keeps the driver loaded; a node agent with an open `CudaDevice` is one.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import TYPE_CHECKING, Any, cast

from cuda.bindings import driver

from devices.api import DeviceError, InvalidUse, NotFound
from devices.checkpoint import CheckpointState, CheckpointSupport, SavedImage
from devices.cuda import call, device_ordinal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.api import HostBuffer
    from devices.pinned import PinnedBuffer

_VERSION_WITH_CUSTOM_STORAGE = 13041  # CUDA 13.4.1, as cuDriverGetVersion counts

_STATES = {
    driver.CUprocessState.CU_PROCESS_STATE_RUNNING: CheckpointState.RUNNING,
    driver.CUprocessState.CU_PROCESS_STATE_LOCKED: CheckpointState.LOCKED,
    driver.CUprocessState.CU_PROCESS_STATE_CHECKPOINTED: CheckpointState.CHECKPOINTED,
    driver.CUprocessState.CU_PROCESS_STATE_FAILED: CheckpointState.FAILED,
    # The memory is on its way: still, or again, with the process, which stays locked.
    driver.CUprocessState.CU_PROCESS_STATE_CHECKPOINTING: CheckpointState.LOCKED,
    driver.CUprocessState.CU_PROCESS_STATE_RESTORING: CheckpointState.LOCKED,
}


class _Block(ctypes.Structure):
    """CUcheckpointCustomStoragePerDeviceData: the memory of the process on one GPU, mapped into ours."""

    _fields_ = (("address", ctypes.c_uint64), ("size_bytes", ctypes.c_uint64), ("stream", ctypes.c_void_p))


class _StorageInfo(ctypes.Structure):
    """CUcheckpointCustomStorageInfo; the bindings hand it out as an address."""

    _fields_ = (("handle", ctypes.c_void_p), ("blocks", ctypes.POINTER(_Block)), ("count", ctypes.c_uint))


class CudaProcessCheckpoint:
    """The driver's checkpoint calls. Raises `NotFound` from any of them for a pid that the driver does not know."""

    def __init__(self) -> None:
        call("cuInit", 0)

    def support(self) -> CheckpointSupport:
        """Asks for this very process's state, which every driver that has checkpoints can tell."""
        try:
            call("cuCheckpointProcessGetState", os.getpid())
        except InvalidUse:
            pass  # the driver knows the call; it only has nothing to say about us
        except DeviceError as error:
            return CheckpointSupport(
                is_supported=False, has_custom_storage=False, reason=f"needs driver 570 or newer: {error}"
            )
        has_custom_storage = int(call("cuDriverGetVersion")) >= _VERSION_WITH_CUSTOM_STORAGE
        return CheckpointSupport(is_supported=True, has_custom_storage=has_custom_storage, reason="")

    def state(self, pid: int) -> CheckpointState:
        return _STATES[_call("cuCheckpointProcessGetState", pid)]

    def lock(self, pid: int, *, timeout_s: float) -> None:
        arguments = driver.CUcheckpointLockArgs()
        arguments.timeoutMs = max(1, int(timeout_s * 1000))  # 0 would mean: wait for ever
        _call("cuCheckpointProcessLock", pid, arguments)

    def checkpoint(self, pid: int) -> float:
        started_s = time.perf_counter()
        _call("cuCheckpointProcessCheckpoint", pid, None)
        return time.perf_counter() - started_s

    def restore(self, pid: int) -> float:
        started_s = time.perf_counter()
        _call("cuCheckpointProcessRestore", pid, None)
        return time.perf_counter() - started_s

    def save(self, pid: int, buffers: Mapping[str, HostBuffer]) -> SavedImage:
        started_s = time.perf_counter()
        arguments = driver.CUcheckpointCheckpointArgs()
        sizes = _transfer("cuCheckpointProcessCheckpoint", pid, arguments, buffers, copy="cuMemcpyDtoHAsync")
        return SavedImage(bytes_by_gpu=sizes, save_s=time.perf_counter() - started_s)

    def load(self, pid: int, buffers: Mapping[str, HostBuffer]) -> float:
        started_s = time.perf_counter()
        arguments = driver.CUcheckpointRestoreArgs()
        _transfer("cuCheckpointProcessRestore", pid, arguments, buffers, copy="cuMemcpyHtoDAsync")
        return time.perf_counter() - started_s

    def unlock(self, pid: int) -> None:
        _call("cuCheckpointProcessUnlock", pid, None)

    def close(self) -> None:
        """Nothing is held."""


def _transfer(name: str, pid: int, arguments: Any, buffers: Mapping[str, HostBuffer], *, copy: str) -> dict[str, int]:
    """Begins a step with custom storage, copies all blocks at once, completes it; the bytes of each GPU."""
    for gpu_uuid in buffers:
        _enter_device(gpu_uuid)  # Of a thread without any context the driver will not say whose a stream is.
    slot = ctypes.c_void_p()
    arguments.customStorageInfo_out = ctypes.addressof(slot)
    _call(name, pid, arguments)
    info = _StorageInfo.from_address(cast("int", slot.value))
    sizes: dict[str, int] = {}
    for block in info.blocks[: info.count]:
        gpu_uuid = _enter_context_of(block.stream)
        address = _address(buffers, gpu_uuid, block.size_bytes)
        pair = (address, block.address) if copy == "cuMemcpyDtoHAsync" else (block.address, address)
        call(copy, *pair, block.size_bytes, block.stream)
        sizes[gpu_uuid] = block.size_bytes
    call("cuCheckpointOperationComplete", driver.CUcheckpointOperationHandle(info.handle))
    return sizes


def _enter_device(gpu_uuid: str) -> None:
    """Makes the GPU's primary context current in this thread; whoever calls has a device open on it."""
    device = call("cuDeviceGet", device_ordinal(gpu_uuid))
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", device))
    call("cuDevicePrimaryCtxRelease", device)


def _enter_context_of(stream: int) -> str:
    """Makes the stream's context current in this thread; the UUID of its GPU. The mapped address itself has none."""
    context = call("cuStreamGetCtx", stream)
    call("cuCtxSetCurrent", context)
    digits = bytes(call("cuDeviceGetUuid", call("cuCtxGetDevice")).bytes).hex()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _address(buffers: Mapping[str, HostBuffer], gpu_uuid: str, size_bytes: int) -> int:
    if gpu_uuid not in buffers:
        raise InvalidUse(call="save or load", code="NO_BUFFER", detail=gpu_uuid)
    return cast("PinnedBuffer", buffers[gpu_uuid]).address_of(offset_bytes=0, size_bytes=size_bytes)


def _call(name: str, pid: int, *arguments: Any) -> Any:
    """A call about a process; the only value in it that can be invalid is the pid.

    Of a process that never used CUDA the driver says that it is not initialized.
    """
    try:
        return call(name, pid, *arguments)
    except InvalidUse as error:
        if error.code in {"CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_INITIALIZED"}:
            raise NotFound(call=name, code=error.code, detail=f"pid {pid}") from error
        raise

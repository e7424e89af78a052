"""`ProcessCheckpoint` over the CUDA driver (570 and newer): park and wake processes that know nothing of us.

The caller must see the target in its pid namespace and be allowed to trace it. Restoring needs persistence mode, or a
process on the host that keeps the driver loaded; a node agent with an open `CudaDevice` is one.
"""

from __future__ import annotations

import os
import time
from typing import Any

from cuda.bindings import driver

from devices.api import CheckpointState, CheckpointSupport, DeviceError, InvalidUse, NotFound
from devices.cuda import call

_VERSION_WITH_CUSTOM_STORAGE = 13041  # CUDA 13.4.1, as cuDriverGetVersion counts

_STATES = {
    driver.CUprocessState.CU_PROCESS_STATE_RUNNING: CheckpointState.RUNNING,
    driver.CUprocessState.CU_PROCESS_STATE_LOCKED: CheckpointState.LOCKED,
    driver.CUprocessState.CU_PROCESS_STATE_CHECKPOINTED: CheckpointState.CHECKPOINTED,
    driver.CUprocessState.CU_PROCESS_STATE_FAILED: CheckpointState.FAILED,
}


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

    def unlock(self, pid: int) -> None:
        _call("cuCheckpointProcessUnlock", pid, None)

    def close(self) -> None:
        """Nothing is held."""


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

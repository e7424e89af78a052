"""`ProcessCheckpoint` in virtual time: the protocol's states, and what they do to a virtual host's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.api import CheckpointState, CheckpointSupport, InvalidUse, NotFound, NotSupported

if TYPE_CHECKING:
    from devices.virtual_host import Process, VirtualHost


class VirtualProcessCheckpoint:
    """Takes a process's memory and contexts off the GPUs and puts them back. Refuses one that shares memory."""

    def __init__(self, host: VirtualHost) -> None:
        self._host = host
        self._states: dict[int, CheckpointState] = {}  # those not running

    def support(self) -> CheckpointSupport:
        return CheckpointSupport(is_supported=True, has_custom_storage=False, reason="")

    def state(self, pid: int) -> CheckpointState:
        self._process(pid)
        return self._states.get(pid, CheckpointState.RUNNING)

    def lock(self, pid: int, *, timeout_s: float) -> None:
        del timeout_s  # virtual calls have ended when they return, so there is nothing to wait for
        process = self._expect(pid, CheckpointState.RUNNING, "cuCheckpointProcessLock")
        process.is_frozen = True
        self._states[pid] = CheckpointState.LOCKED

    def checkpoint(self, pid: int) -> float:
        process = self._expect(pid, CheckpointState.LOCKED, "cuCheckpointProcessCheckpoint")
        if any(set(memory.holds) != {pid} for memory in process.memories.values()):
            detail = f"pid {pid} shares memory with other processes"
            raise NotSupported(call="cuCheckpointProcessCheckpoint", code="CUDA_ERROR_NOT_SUPPORTED", detail=detail)
        uuids = sorted(set(process.charged) | set(process.contexts))
        saved = {uuid: process.used_bytes(uuid) for uuid in uuids}
        for uuid, size_bytes in saved.items():
            self._host.gpus[uuid].used_bytes -= size_bytes
        process.parked = saved
        self._states[pid] = CheckpointState.CHECKPOINTED
        return sum(size / self._host.gpus[uuid].profile.checkpoint_bytes_per_s for uuid, size in saved.items())

    def restore(self, pid: int) -> float:
        process = self._expect(pid, CheckpointState.CHECKPOINTED, "cuCheckpointProcessRestore")
        for uuid, size_bytes in process.parked.items():
            self._host.admit(self._host.gpu(uuid), process, size_bytes, call="cuCheckpointProcessRestore")
        parked, process.parked = process.parked, {}
        for uuid, size_bytes in parked.items():
            self._host.gpus[uuid].used_bytes += size_bytes
        self._states[pid] = CheckpointState.LOCKED
        return sum(size / self._host.gpus[uuid].profile.restore_bytes_per_s for uuid, size in parked.items())

    def unlock(self, pid: int) -> None:
        process = self._expect(pid, CheckpointState.LOCKED, "cuCheckpointProcessUnlock")
        process.is_frozen = False
        del self._states[pid]

    def _process(self, pid: int) -> Process:
        process = self._host.processes.get(pid)
        if process is None:
            self._states.pop(pid, None)
            raise NotFound(call="cuCheckpointProcessGetState", code="CUDA_ERROR_INVALID_VALUE", detail=f"pid {pid}")
        return process

    def _expect(self, pid: int, state: CheckpointState, call: str) -> Process:
        process = self._process(pid)
        if self.state(pid) is not state:
            raise InvalidUse(call=call, code="CUDA_ERROR_ILLEGAL_STATE", detail=f"pid {pid} is {self.state(pid).value}")
        return process

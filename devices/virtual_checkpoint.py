"""`ProcessCheckpoint` in virtual time: the protocol's states, and what they do to a virtual host's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.api import InvalidUse, NotFound, NotSupported
from devices.checkpoint import CheckpointState, CheckpointSupport, SavedImage
from devices.sparse import SparseBytes
from devices.virtual import VirtualBuffer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.api import HostBuffer
    from devices.virtual_host import Memory, Process, VirtualHost


class VirtualProcessCheckpoint:
    """Takes a process's memory and contexts off the GPUs and puts them back. Refuses one that shares memory."""

    def __init__(self, host: VirtualHost) -> None:
        self._host = host
        self._states: dict[int, CheckpointState] = {}  # those not running
        self._saved: set[int] = set()  # those whose content is not with the driver

    def support(self) -> CheckpointSupport:
        return CheckpointSupport(is_supported=True, has_custom_storage=True, reason="")

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
        saved = self._take_off(process)
        return sum(size / self._host.gpus[uuid].profile.checkpoint_bytes_per_s for uuid, size in saved.items())

    def save(self, pid: int, buffers: Mapping[str, HostBuffer]) -> SavedImage:
        """As fast as the link, several GPUs at once; contexts cost no time."""
        process = self._expect(pid, CheckpointState.LOCKED, "cuCheckpointProcessCheckpoint")
        blocks = _blocks(process, buffers)
        self._take_off(process)
        self._saved.add(pid)
        end_s = self._host.now_s
        for uuid, memories in blocks.items():
            offset = 0
            for memory in memories:
                _content(buffers, uuid).copy_from(
                    memory.content, source_offset=0, offset=offset, size=memory.size_bytes
                )
                memory.content = SparseBytes()
                offset += memory.size_bytes
            end_s = max(end_s, self._host.book_to_host(uuid, offset, ready_s=self._host.now_s))
        return SavedImage(bytes_by_gpu=_sizes(blocks), save_s=end_s - self._host.now_s)

    def _take_off(self, process: Process) -> dict[str, int]:
        pid = process.pid
        if any(set(memory.holds) != {pid} for memory in process.memories.values()):
            detail = f"pid {pid} shares memory with other processes"
            raise NotSupported(call="cuCheckpointProcessCheckpoint", code="CUDA_ERROR_NOT_SUPPORTED", detail=detail)
        uuids = sorted(set(process.charged) | set(process.contexts))
        saved = {uuid: process.used_bytes(uuid) for uuid in uuids}
        for uuid, size_bytes in saved.items():
            self._host.gpus[uuid].used_bytes -= size_bytes
        process.parked = saved
        self._states[pid] = CheckpointState.CHECKPOINTED
        return saved

    def restore(self, pid: int) -> float:
        parked = self._bring_back(self._expect_away(pid, is_saved=False))
        return sum(size / self._host.gpus[uuid].profile.restore_bytes_per_s for uuid, size in parked.items())

    def load(self, pid: int, buffers: Mapping[str, HostBuffer]) -> float:
        process = self._expect_away(pid, is_saved=True)
        blocks = _blocks(process, buffers)
        self._bring_back(process)
        self._saved.discard(pid)
        end_s = self._host.now_s
        for uuid, memories in blocks.items():
            offset = 0
            for memory in memories:
                memory.content.copy_from(
                    _content(buffers, uuid), source_offset=offset, offset=0, size=memory.size_bytes
                )
                offset += memory.size_bytes
            end_s = max(end_s, self._host.book_to_device(uuid, offset, ready_s=self._host.now_s))
        return end_s - self._host.now_s

    def _expect_away(self, pid: int, *, is_saved: bool) -> Process:
        process = self._expect(pid, CheckpointState.CHECKPOINTED, "cuCheckpointProcessRestore")
        if (pid in self._saved) is not is_saved:
            detail = f"pid {pid} was {'saved' if pid in self._saved else 'checkpointed'}"
            raise InvalidUse(call="cuCheckpointProcessRestore", code="CUDA_ERROR_INVALID_VALUE", detail=detail)
        return process

    def _bring_back(self, process: Process) -> dict[str, int]:
        for uuid, size_bytes in process.parked.items():
            self._host.admit(self._host.gpu(uuid), process, size_bytes, call="cuCheckpointProcessRestore")
        parked, process.parked = process.parked, {}
        for uuid, size_bytes in parked.items():
            self._host.gpus[uuid].used_bytes += size_bytes
        self._states[process.pid] = CheckpointState.LOCKED
        return parked

    def unlock(self, pid: int) -> None:
        process = self._expect(pid, CheckpointState.LOCKED, "cuCheckpointProcessUnlock")
        process.is_frozen = False
        del self._states[pid]

    def _process(self, pid: int) -> Process:
        process = self._host.processes.get(pid)
        if process is None:
            self._states.pop(pid, None)
            self._saved.discard(pid)
            raise NotFound(call="cuCheckpointProcessGetState", code="CUDA_ERROR_INVALID_VALUE", detail=f"pid {pid}")
        return process

    def _expect(self, pid: int, state: CheckpointState, call: str) -> Process:
        process = self._process(pid)
        if self.state(pid) is not state:
            raise InvalidUse(call=call, code="CUDA_ERROR_ILLEGAL_STATE", detail=f"pid {pid} is {self.state(pid).value}")
        return process


def _blocks(process: Process, buffers: Mapping[str, HostBuffer]) -> dict[str, list[Memory]]:
    """Its memory by GPU, in the order of creation. Raises `InvalidUse` unless a buffer holds each part."""
    blocks: dict[str, list[Memory]] = {}
    for memory in sorted(process.memories.values(), key=lambda memory: memory.memory_id):
        blocks.setdefault(memory.gpu_uuid, []).append(memory)
    for uuid, size_bytes in _sizes(blocks).items():
        if uuid not in buffers or buffers[uuid].size_bytes < size_bytes:
            raise InvalidUse(call="save or load", code="NO_BUFFER", detail=f"{uuid}, {size_bytes} bytes")
    return blocks


def _sizes(blocks: Mapping[str, list[Memory]]) -> dict[str, int]:
    return {uuid: sum(memory.size_bytes for memory in memories) for uuid, memories in blocks.items()}


def _content(buffers: Mapping[str, HostBuffer], gpu_uuid: str) -> SparseBytes:
    buffer = buffers[gpu_uuid]
    assert isinstance(buffer, VirtualBuffer)
    return buffer.content

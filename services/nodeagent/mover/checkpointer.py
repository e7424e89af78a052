"""``python -m services.nodeagent.mover.checkpointer SOCKET FOLDER``: the process that calls the driver's checkpoints.

A new process pays seconds before the driver answers it, and custom storage needs a context on each GPU; so there is
one, it lives as long as the agent, and it ends when the agent does (its standard input ends), after what it is doing.
"""

import contextlib
import fcntl
import os
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from devices.api import DeviceError, HostBuffer, InvalidUse, NotFound
from devices.checkpoint import CheckpointState
from devices.cuda import CudaDevice
from devices.cuda_checkpoint import CudaProcessCheckpoint
from devices.nvml import NvmlInventory
from services.nodeagent.mover import wire
from services.nodeagent.mover.images import STEP_BYTES, Images

PLAIN: Final = "--plain"
"""Leave the images with the driver, as drivers without custom storage do."""


class Checkpointer:
    """Answers questions; each in a thread of its own."""

    def __init__(self, folder: Path, *, is_plain: bool) -> None:
        self._checkpoint = CudaProcessCheckpoint()
        self._inventory = NvmlInventory()
        self._support = self._checkpoint.support()
        self._is_ours = self._support.has_custom_storage and not is_plain
        is_software = any(gpu.is_software for gpu in self._inventory.gpus())
        self._images = Images(folder, should_fit=not is_software)
        self._images.drop_dead()
        self._devices: dict[str, CudaDevice] = {}
        self._buffers: dict[tuple[str, int], dict[str, HostBuffer]] = {}
        self._preparing = threading.Lock()

    def answer(self, question: wire.Question) -> Any:
        match question:
            case wire.Supports():
                return wire.Supported(
                    is_supported=self._support.is_supported,
                    has_custom_storage=self._is_ours,
                    reason=self._support.reason,
                )
            case wire.States():
                return self._states(question)
            case wire.Prepare():
                for pid in question.pids:
                    self._prepare(question.image, pid, self._sizes(pid))
            case wire.Lock():
                self._checkpoint.lock(question.pid, timeout_s=question.timeout_s)
            case wire.Unlock():
                self._checkpoint.unlock(question.pid)
            case wire.Save():
                return self._save(question.image, question.pid)
            case wire.Load():
                return self._load(question.image, question.pid)
            case wire.Drop():
                self._drop(question.image)
        return wire.Done()

    def _states(self, question: wire.States) -> wire.Told:
        states: dict[int, str] = {}
        away: dict[str, int] = {}
        for pid in question.pids:
            try:
                state = self._checkpoint.state(pid)
            except NotFound:
                continue
            states[pid] = state.value
            about = self._images.about(question.image, pid)
            if state is CheckpointState.CHECKPOINTED and about is not None:
                for gpu_uuid, size in about.bytes_by_gpu.items():
                    away[gpu_uuid] = away.get(gpu_uuid, 0) + size
        free = {gpu_uuid: self._inventory.memory(gpu_uuid).free_bytes for gpu_uuid in away}
        return wire.Told(states=states, away_bytes=away, free_bytes=free)

    def _sizes(self, pid: int) -> dict[str, int]:
        """What the process holds on each GPU now. Raises `InvalidUse` where the driver does not say."""
        sizes: dict[str, int] = {}
        for gpu in self._inventory.gpus():
            used = self._inventory.process_bytes(gpu.uuid)
            if pid not in used:
                continue
            size = used[pid]
            if size is None:
                raise InvalidUse(call="process_bytes", code="NOT_TOLD", detail=f"pid {pid} on {gpu.uuid}")
            sizes[gpu.uuid] = size
        return sizes

    def _prepare(self, image: str, pid: int, sizes: dict[str, int]) -> dict[str, HostBuffer]:
        """Pinned buffers of at least these sizes; with the driver's own storage there is nothing to prepare."""
        if not self._is_ours:
            return {}
        with self._preparing:
            buffers = self._buffers.setdefault((image, pid), {})
            for gpu_uuid, size in sizes.items():
                if gpu_uuid not in self._devices:
                    self._devices[gpu_uuid] = CudaDevice(gpu_uuid)
                if gpu_uuid in buffers and buffers[gpu_uuid].size_bytes >= size:
                    continue
                if gpu_uuid in buffers:
                    buffers.pop(gpu_uuid).close()
                rounded = -(-size // STEP_BYTES) * STEP_BYTES
                descriptor = self._images.open_file(image, pid, gpu_uuid, size_bytes=rounded)
                try:
                    buffers[gpu_uuid] = self._devices[gpu_uuid].host_arena(rounded, shared_fd=descriptor)
                finally:
                    os.close(descriptor)
            return dict(buffers)

    def _save(self, image: str, pid: int) -> wire.Moved:
        sizes = self._sizes(pid)
        buffers = self._prepare(image, pid, sizes)
        self._images.write_about(image, pid, is_ours=self._is_ours, bytes_by_gpu=sizes)
        if self._is_ours:
            saved = self._checkpoint.save(pid, buffers)
            self._images.write_about(image, pid, is_ours=True, bytes_by_gpu=saved.bytes_by_gpu)
            return wire.Moved(size_bytes=sum(saved.bytes_by_gpu.values()), move_s=saved.save_s)
        return wire.Moved(size_bytes=sum(sizes.values()), move_s=self._checkpoint.checkpoint(pid))

    def _load(self, image: str, pid: int) -> wire.Moved:
        about = self._images.about(image, pid)
        if about is None:
            raise NotFound(call="load", code="NO_IMAGE", detail=f"pid {pid}")
        size_bytes = sum(about.bytes_by_gpu.values())
        if about.is_ours:
            buffers = self._prepare(image, pid, about.bytes_by_gpu)
            return wire.Moved(size_bytes=size_bytes, move_s=self._checkpoint.load(pid, buffers))
        return wire.Moved(size_bytes=size_bytes, move_s=self._checkpoint.restore(pid))

    def _drop(self, image: str) -> None:
        with self._preparing:
            for key in [key for key in self._buffers if key[0] == image]:
                for buffer in self._buffers.pop(key).values():
                    buffer.close()
            self._images.drop(image)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, path: str, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        super().__init__(path, _Answer)


class _Answer(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        line = self.rfile.readline()
        if not line:
            return
        try:
            question = msgspec.json.decode(line, type=wire.Question)
            answer = self.server.checkpointer.answer(question)
        except DeviceError as error:
            answer = wire.Failed(error=type(error).__name__, reason=str(error))
        except OSError as error:
            answer = wire.Failed(error="OutOfMemory", reason=str(error))
        with contextlib.suppress(OSError):
            self.wfile.write(msgspec.json.encode(answer) + b"\n")


def main(arguments: list[str]) -> int:
    is_plain = PLAIN in arguments
    socket_path, folder = (word for word in arguments if word != PLAIN)
    Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    with (Path(folder) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # One of an earlier agent may still be finishing what it was told.
        checkpointer = Checkpointer(Path(folder), is_plain=is_plain)
        Path(socket_path).unlink(missing_ok=True)
        with _Server(socket_path, checkpointer) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            while sys.stdin.buffer.read(4096):
                time.sleep(0)
            server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

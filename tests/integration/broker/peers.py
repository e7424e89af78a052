"""The broker's peers in tests: the agent's side of a control socket, and an engine in a process of its own.

``python -m tests.integration.broker.peers SOCKET REPLICA KEY GPU``: a command is a line on stdin, its result one on
stdout.
"""

import array
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import softgpu
from devices.api import ExportedChunk, ExportedMemory, Region
from schemas.brokers import (
    DESCRIPTORS_MAX,
    AccountClose,
    AccountOpen,
    BrokerLook,
    BrokerMessage,
    BrokerRefused,
    BrokerView,
    EngineHello,
    HostReserve,
    ImageForget,
    ImageRestore,
    ImageSeal,
    MemoryAsk,
    MemoryReturn,
    Prefetch,
)

ROOT = Path(__file__).resolve().parents[3]
T = TypeVar("T", bound=msgspec.Struct)


class RefusedAnswer(Exception):
    def __init__(self, refused: BrokerRefused) -> None:
        super().__init__(refused.refused)
        self.short_by_bytes = refused.short_by_bytes
        self.again_after_s = refused.again_after_s


def until(condition: Callable[[], bool], *, wait_s: float = 60.0) -> None:
    ends_at_s = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < ends_at_s, "it did not come so far"
        time.sleep(0.02)


class Peer:
    """Lines over a Unix socket; blocking."""

    def __init__(self, path: Path, *, wait_s: float = 60.0) -> None:
        ends_at_s = time.monotonic() + wait_s
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > ends_at_s:
                    raise
                time.sleep(0.02)
        self._socket.settimeout(120)
        self._buffer = b""
        self.descriptors: list[int] = []

    def ask(self, message: BrokerMessage) -> dict[str, Any]:
        self._socket.sendall(msgspec.json.encode(message) + b"\n")
        return self.hear()

    def hear(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            content, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX))
            if not content:
                raise ConnectionError("the broker closed the connection")
            for level, kind, data in ancillary:
                assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                self.descriptors += array.array("i", data)
            self._buffer += content
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise RefusedAnswer(msgspec.json.decode(line, type=BrokerRefused))
        return answer

    def close(self) -> None:
        self._socket.close()


class Agent(Peer):
    def open(
        self, replica_id: str, granted: dict[str, int], *, tenant: str = "a", epoch: int = 1, deployment: str = ""
    ) -> None:
        self.ask(
            AccountOpen(
                replica_id=replica_id, lease_epoch=epoch, tenant=tenant, key=f"key-{replica_id}",
                granted_bytes=granted, deployment_id=deployment,
            )
        )  # fmt: skip

    def close_account(self, replica_id: str, epoch: int = 1) -> None:
        self.ask(AccountClose(replica_id=replica_id, lease_epoch=epoch))

    def reserve(self, replica_id: str, size_bytes: int, deployment: str = "d") -> None:
        self.ask(HostReserve(replica_id=replica_id, deployment_id=deployment, size_bytes=size_bytes))

    def forget(self, deployment: str) -> None:
        self.ask(ImageForget(deployment_id=deployment))

    def prefetch(self, replica_id: str) -> None:
        self.ask(Prefetch(replica_id=replica_id))

    def view(self) -> BrokerView:
        return msgspec.convert(self.ask(BrokerLook()), BrokerView)


class BrokerProcess:
    """``python -m services broker`` on a software host."""

    def __init__(self, folder: Path, host: softgpu.Host, **settings: object) -> None:
        self.folder = folder
        values = {"state_dir": folder / "broker", "arena_dir": folder / "arena", **settings}
        self._environment = {
            **os.environ, **host.environment(),
            **{f"SUBLET_BROKER_{name.upper()}": str(value) for name, value in values.items()},
        }  # fmt: skip
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with (self.folder / "broker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "services", "broker"], cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )

    @property
    def engine_socket(self) -> Path:
        return self.folder / "broker" / "engines.sock"

    def agent(self) -> Agent:
        return Agent(self.folder / "broker" / "control.sock")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)

    def log(self) -> str:
        return (self.folder / "broker.log").read_text()


class EngineProcess:
    """An engine in a process of its own, told by lines what to do."""

    def __init__(self, broker: BrokerProcess, host: softgpu.Host, replica_id: str, gpu_uuid: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.broker.peers", str(broker.engine_socket), replica_id,
             f"key-{replica_id}", gpu_uuid],
            cwd=ROOT, env={**os.environ, **host.environment()},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine ended with {self.process.wait()}"
        return json.loads(line)

    def do(self, *words: object) -> Any:
        """The command's result; a refusal is {"refused": …}."""
        self.tell(*words)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class _Engine:
    """What the child does."""

    def __init__(self, path: Path, replica_id: str, key: str, gpu_uuid: str) -> None:
        from devices.cuda import CudaDevice

        self._path, self._replica_id, self._key, self._gpu_uuid = path, replica_id, key, gpu_uuid
        self._device = CudaDevice(gpu_uuid)
        self._regions: dict[str, Region] = {}
        self._peer: Peer

    def hello(self, held_bytes: int = 0, wait_s: float = 60.0) -> object:
        ends_at_s = time.monotonic() + wait_s
        while True:
            self._peer = Peer(self._path)
            held = {self._gpu_uuid: held_bytes} if held_bytes else {}
            try:
                return self._peer.ask(
                    EngineHello(replica_id=self._replica_id, lease_epoch=1, key=self._key, held_bytes=held)
                )
            except RefusedAnswer as refused:
                if not refused.again_after_s or time.monotonic() > ends_at_s:
                    raise
                time.sleep(refused.again_after_s)

    def ask(self, range_id: str, size_bytes: int) -> object:
        answer = self._peer.ask(MemoryAsk(gpu_uuid=self._gpu_uuid, size_bytes=size_bytes, range_id=range_id))
        self._map(range_id, answer["piece_bytes"])
        return answer

    def ask_each(self, range_ids: list[str], size_bytes: int) -> object:
        """One piece for each: sizes of at most a piece."""
        first, *more = range_ids
        answer = self._peer.ask(
            MemoryAsk(gpu_uuid=self._gpu_uuid, size_bytes=size_bytes, range_id=first, more_range_ids=tuple(more))
        )
        descriptors = self._peer.descriptors
        assert len(range_ids) == len(descriptors)
        for range_id, piece_bytes, descriptor in zip(range_ids, answer["piece_bytes"], descriptors, strict=True):
            self._peer.descriptors = [descriptor]
            self._map(range_id, [piece_bytes])
        return answer

    def _map(self, range_id: str, piece_bytes: Sequence[int]) -> None:
        assert len(piece_bytes) == len(self._peer.descriptors)
        chunks = [
            ExportedChunk(fd=fd, size_bytes=size) for fd, size in zip(self._peer.descriptors, piece_bytes, strict=True)
        ]
        self._peer.descriptors = []
        exported = ExportedMemory(gpu_uuid=self._gpu_uuid, chunks=tuple(chunks))
        try:
            known = self._regions.get(range_id)
            self._regions[range_id] = self._device.import_fds(exported, region=known, is_writable=True)
        finally:
            self._device.close_export(exported)

    def unmap(self, range_id: str) -> object:
        return self._device.unback(self._regions[range_id]).released_bytes

    def give_back(self, range_id: str) -> object:
        self.unmap(range_id)
        return self._peer.ask(MemoryReturn(range_id=range_id))

    def give_back_adopted(self, range_id: str) -> object:
        size_bytes = self.unmap(range_id)
        assert isinstance(size_bytes, int)
        return self._peer.ask(MemoryReturn(range_id=range_id, gpu_uuid=self._gpu_uuid, size_bytes=size_bytes))

    def seal(self, range_id: str, image_id: str, generation: int, content_id: str = "") -> object:
        return self._peer.ask(
            ImageSeal(range_id=range_id, image_id=image_id, generation=generation, content_id=content_id)
        )

    def seal_on(self, range_id: str, image_id: str, first: int, count: int) -> object:
        """Seal so many generations, each filled with its number, until the broker is gone; the last that was kept."""
        generation = first
        while generation < first + count:
            self.fill(range_id, generation % 251)
            try:
                self.seal(range_id, image_id, generation)
            except (ConnectionError, RefusedAnswer):
                break
            generation += 1
        return generation - 1

    def restore(self, range_id: str, image_id: str, generation: int) -> object:
        started_s = time.perf_counter()
        grant = self._peer.ask(
            ImageRestore(gpu_uuid=self._gpu_uuid, range_id=range_id, image_id=image_id, generation=generation)
        )
        granted_s = time.perf_counter() - started_s
        self._map(range_id, grant["piece_bytes"])
        mapped_s = time.perf_counter() - started_s
        answer = self._peer.hear()
        return {
            **answer, "granted_s": granted_s, "mapped_s": mapped_s, "whole_s": time.perf_counter() - started_s,
            "pieces": len(grant["piece_bytes"]), "reserve_s": grant["reserve_s"],
        }  # fmt: skip

    def write(self, range_id: str, text: str, offset_bytes: int = 0) -> object:
        self._device.write(self._regions[range_id], text.encode(), offset_bytes=offset_bytes)
        return len(text)

    def fill(self, range_id: str, byte: int) -> object:
        self._device.fill(self._regions[range_id], byte)
        return byte

    def read(self, range_id: str, size_bytes: int, offset_bytes: int = 0) -> object:
        return self._device.read(self._regions[range_id], size_bytes=size_bytes, offset_bytes=offset_bytes).decode(
            "latin-1"
        )

    def bytes_seen(self, range_id: str) -> object:
        """Every byte value that a page somewhere in the range begins with."""
        region = self._regions[range_id]
        step = 64 * 1024
        return sorted({
            byte
            for offset in range(0, region.size_bytes, step)
            for byte in self._device.read(region, size_bytes=64, offset_bytes=offset)
        })  # fmt: skip


def main(path: str, replica_id: str, key: str, gpu_uuid: str) -> None:
    engine = _Engine(Path(path), replica_id, key, gpu_uuid)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            result = getattr(engine, name)(*arguments)
        except RefusedAnswer as refused:
            result = {"refused": str(refused), "short_by_bytes": refused.short_by_bytes}
        except ConnectionError as error:
            result = {"lost": str(error)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

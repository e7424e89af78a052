"""A memory broker with empty files for memory, and a device that maps them: the engine's client without a driver."""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from devices.api import DeviceError, ExportedMemory, InvalidUse, Region, UnbackResult
from engines.store.connection import StoreSettings
from schemas.brokers import (
    DESCRIPTORS_MAX,
    BrokerDone,
    BrokerRefused,
    EngineHello,
    ImageRestore,
    ImageRestored,
    ImageSeal,
    ImageSealed,
    MemoryAsk,
    MemoryGrant,
    MemoryReturn,
)

Question = EngineHello | MemoryAsk | MemoryReturn | ImageSeal | ImageRestore
PIECE_BYTES = 64
KEY = "secret"
HANG_UP = object()


class PlayedBroker:
    """Answers like a broker; `answers` may put another one in place, `{type of the question: function}`.

    The answer HANG_UP ends the connection.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[Question] = []
        self.ranges: dict[str, int] = {}
        self.answers: dict[type, Callable[[Any], list[Any]]] = {}
        self._images: dict[str, int] = {}
        self._news = threading.Condition()
        self._streams: list[socket.socket] = []
        self._servants: list[threading.Thread] = []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def settings(self) -> StoreSettings:
        return StoreSettings(socket_path=str(self.path), replica_id="r/0", lease_epoch=3, key=KEY)

    def told(self, kind: type) -> list[Any]:
        with self._news:
            return [question for question in self.heard if isinstance(question, kind)]

    def wait_for(self, kind: type) -> Any:
        """The first question of that kind."""
        with self._news:
            found = self._news.wait_for(lambda: any(isinstance(question, kind) for question in self.heard), 20)
        assert found, f"no {kind.__name__}"
        return self.told(kind)[0]

    def stop(self) -> None:
        """Die: every connection ends, and the socket's name goes."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.path.unlink(missing_ok=True)
        for stream in self._streams:
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        for servant in self._servants:
            servant.join(20)  # its copies of the descriptors are closed then

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                stream, _ = self._server.accept()
                self._streams.append(stream)
                servant = threading.Thread(target=self._serve, args=(stream,), daemon=True)
                servant.start()
                self._servants.append(servant)

    def _serve(self, stream: socket.socket) -> None:
        with suppress(OSError), stream, stream.makefile("rb") as lines:
            for line in lines:
                question = msgspec.json.decode(line, type=Question)
                with self._news:
                    self.heard.append(question)
                    self._news.notify_all()
                answer_to: Callable[[Any], list[Any]] = self.answers.get(type(question), self._answers)
                answers = answer_to(question)
                for answer in answers:
                    if answer is HANG_UP:
                        stream.shutdown(socket.SHUT_RDWR)
                        return
                    send(stream, answer)

    def _answers(self, question: Question) -> list[Any]:
        match question:
            case EngineHello():
                return [BrokerDone() if question.key == KEY else BrokerRefused(refused="another key")]
            case MemoryAsk():
                range_ids = (question.range_id, *question.more_range_ids)
                self.ranges.update(dict.fromkeys(range_ids, question.size_bytes))
                return [grant(question.range_id, question.size_bytes * len(range_ids))]
            case MemoryReturn():
                for range_id in (question.range_id, *question.more_range_ids):
                    if not question.size_bytes and self.ranges.pop(range_id, None) is None:
                        return [BrokerRefused(refused=f"no range {range_id}")]
                return [BrokerDone()]
            case ImageSeal():
                size_bytes = self.ranges[question.range_id]
                self._images[question.image_id] = size_bytes
                return [sealed(question, size_bytes)]
            case ImageRestore():
                size_bytes = self._images[question.image_id]
                self.ranges[question.range_id] = size_bytes
                return [
                    grant(question.range_id, size_bytes),
                    ImageRestored(range_id=question.range_id, copied_bytes=size_bytes, copy_s=0.5, wait_s=0.25),
                ]


def sealed(question: ImageSeal, size_bytes: int) -> ImageSealed:
    return ImageSealed(
        image_id=question.image_id,
        generation=question.generation,
        copied_bytes=size_bytes,
        shared_bytes=0,
        seal_s=0.1,
    )


def grant(range_id: str, size_bytes: int) -> MemoryGrant:
    return MemoryGrant(range_id=range_id, piece_bytes=(PIECE_BYTES,) * (size_bytes // PIECE_BYTES), reserve_s=0.125)


def send(stream: socket.socket, answer: Any) -> None:
    """The line, in parts where it names more descriptors than one message carries."""
    line = msgspec.json.encode(answer) + b"\n"
    sizes = answer.piece_bytes if isinstance(answer, MemoryGrant) else ()
    files = [os.memfd_create("piece") for _ in sizes]
    for file, size in zip(files, sizes, strict=True):
        os.truncate(file, size)
    while len(files) > DESCRIPTORS_MAX:
        batch, files = files[:DESCRIPTORS_MAX], files[DESCRIPTORS_MAX:]
        socket.send_fds(stream, [line[:1]], batch)
        line = line[1:]
        for file in batch:
            os.close(file)
    socket.send_fds(stream, [line], files) if files else stream.sendall(line)
    for file in files:
        os.close(file)


class PaperDevice:
    """Maps descriptors by looking at them: which files, in which order.

    `error` is raised by the next import, or by the one after `good_imports` more.
    """

    gpu_uuid = "GPU-1"

    def __init__(self) -> None:
        self.mapped: dict[int, list[int]] = {}
        self.error: DeviceError | None = None
        self.good_imports = 0
        self._regions = 0

    def reserve(self, size_bytes: int) -> Region:
        self._regions += 1
        return Region(
            region_id=self._regions, gpu_uuid=self.gpu_uuid, address=self._regions << 40, size_bytes=size_bytes
        )

    def import_fds(self, exported: ExportedMemory, *, region: Region, is_writable: bool = False) -> Region:
        if self.error is not None and self.good_imports:
            self.good_imports -= 1
        elif self.error is not None:
            error, self.error = self.error, None
            raise error
        if region.region_id in self.mapped or exported.size_bytes != region.size_bytes or not is_writable:
            raise InvalidUse(call="import_fds", code="DOES_NOT_MATCH")
        self.mapped[region.region_id] = [os.fstat(chunk.fd).st_size for chunk in exported.chunks]
        return region

    def unback(self, region: Region) -> UnbackResult:
        sizes = self.mapped.pop(region.region_id, [])
        return UnbackResult(released_bytes=sum(sizes), unback_s=0.0)

    def is_backed(self, region: Region) -> bool:
        return region.region_id in self.mapped

    def close_export(self, exported: ExportedMemory) -> None:
        for chunk in exported.chunks:
            os.close(chunk.fd)

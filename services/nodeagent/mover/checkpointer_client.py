"""The node agent's side of its checkpointer: starts it when it is first needed, and again when it died."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from services.nodeagent.mover import wire
from services.nodeagent.mover.checkpointer import PLAIN

T = TypeVar("T", bound=msgspec.Struct)

START_S: Final = 60.0
"""The driver's first answer takes seconds on a host with many GPUs, and one before it may be finishing."""
RETRY_S: Final = 0.02
END_S: Final = 10.0
ANSWER_BYTES_MAX: Final = 1 << 20


class CheckpointProblem(Exception):
    """`error` is the name of a class of `devices.api`, or ``Away`` when nobody answered."""

    def __init__(self, error: str, reason: str) -> None:
        super().__init__(reason)
        self.error = error


class CheckpointerClient:
    """One checkpointer process, and questions to it from any number of tasks."""

    def __init__(self, *, socket: Path, folder: Path, is_plain: bool = False) -> None:
        self._socket = socket
        self._folder = folder
        self._arguments = [str(socket), str(folder), *([PLAIN] if is_plain else [])]
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = anyio.Lock()

    @property
    def pids(self) -> frozenset[int]:
        """Whose use of the GPUs is ours."""
        return frozenset() if self._process is None else frozenset({self._process.pid})

    async def ask(self, question: wire.Question, kind: type[T], *, timeout_s: float) -> T:
        """Raises `CheckpointProblem`."""
        await self._running()
        with anyio.move_on_after(timeout_s):
            try:
                content = await self._exchange(msgspec.json.encode(question) + b"\n")
            except OSError as error:
                raise CheckpointProblem("Away", f"the checkpointer does not answer ({error})") from error
            try:
                answer = msgspec.json.decode(content, type=wire.Failed)
            except msgspec.ValidationError:
                return msgspec.json.decode(content, type=kind)
            except msgspec.MsgspecError as error:
                raise CheckpointProblem("Away", "the checkpointer ended while it was asked") from error
            raise CheckpointProblem(answer.error, answer.reason)
        raise CheckpointProblem("Away", f"the checkpointer did not answer in {timeout_s:.0f} s")

    async def _exchange(self, line: bytes) -> bytes:
        stream = await anyio.connect_unix(self._socket)
        async with stream:
            await stream.send(line)
            return await _read_line(stream)

    async def _running(self) -> None:
        async with self._starting:
            if self._process is not None and self._process.poll() is None:
                return
            self._socket.parent.mkdir(parents=True, exist_ok=True)
            self._socket.unlink(missing_ok=True)
            self._process = subprocess.Popen(  # noqa: ASYNC220  (it returns at once)
                [sys.executable, "-m", "services.nodeagent.mover.checkpointer", *self._arguments],
                stdin=subprocess.PIPE,
                start_new_session=True,
                env=os.environ.copy(),
            )
            with anyio.move_on_after(START_S):
                while self._process.poll() is None:
                    with contextlib.suppress(OSError):
                        stream = await anyio.connect_unix(self._socket)
                        await stream.aclose()
                        return
                    await anyio.sleep(RETRY_S)
            raise CheckpointProblem("Away", f"the checkpointer did not start (exit status {self._process.poll()})")

    async def close(self) -> None:
        """It ends after what it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with anyio.move_on_after(END_S, shield=True):
            await anyio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
            self._tidy()
            return
        process.kill()

    def _tidy(self) -> None:
        """A folder without images is of no use to the next agent, and would stay in the host's memory."""
        if not any(entry.is_dir() for entry in self._folder.iterdir()):
            shutil.rmtree(self._folder, ignore_errors=True)


async def _read_line(stream: anyio.abc.ByteReceiveStream) -> bytes:
    content = b""
    with contextlib.suppress(anyio.EndOfStream):
        while not content.endswith(b"\n") and len(content) < ANSWER_BYTES_MAX:
            content += await stream.receive()
    return content

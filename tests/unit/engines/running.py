"""An engine as a real process on a software GPU host, for the integration tests: started, watched by its log, ended.

Nothing here sleeps: a test waits for a log line, an answer, or the end of the process.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import softgpu

REPOSITORY = Path(__file__).resolve().parents[3]
# For a machine that does much else at once; a test that works needs a fraction of it.
PATIENCE_S = 60.0
MiB = 1 << 20
GiB = 1 << 30
# Small numbers for hosts that move real bytes.
SMALL_CONTEXT_BYTES = 8 * MiB

MISTRAL = "mistral-7b-instruct-v0.3"
MISTRAL_BYTES = 14_496_047_104


@contextlib.contextmanager
def software_host(
    *, phantom: bool, gpus: int = 1, total_bytes: int = 80 * GiB, context_bytes: int = 500 * MiB
) -> Iterator[softgpu.Host]:
    """A host of software GPUs, one by default, with calls that cost nothing, in a state directory of its own."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    state_dir = Path(tempfile.mkdtemp(prefix="sublet-engines-", dir=base))
    host = softgpu.Host(
        state_dir,
        gpus=gpus,
        phantom=phantom,
        total_bytes=total_bytes,
        reserved_bytes=0,
        context_bytes=context_bytes,
        costs={},
    ).create()
    try:
        yield host
    finally:
        host.remove()
        shutil.rmtree(state_dir, ignore_errors=True)


def used_bytes(host: softgpu.Host) -> int:
    """What the software driver says is in use on the GPU, by anybody."""
    return host.status()["devices"][0]["used_bytes"]


class Answer:
    """An HTTP answer, read to its end."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        body: dict[str, Any] = self.json["error"]
        return body

    @property
    def events(self) -> list[Any]:
        """The server-sent events of a stream; `[DONE]` as text."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Engine:
    """One engine process. Its log lines are kept, as dictionaries."""

    def __init__(
        self,
        host: softgpu.Host | None,
        kind: str,
        *arguments: str,
        port: int = 0,
        extra_environment: Mapping[str, str] | None = None,
        gpu_count: int = 1,
    ) -> None:
        environment = {**os.environ, **(host.environment() if host else {}), **(extra_environment or {})}
        gpu = ",".join(host.uuids()[:gpu_count]) if host else "GPU-none"
        command = [sys.executable, "-m", "engines", kind, "--gpu", gpu, "--port", str(port), *arguments]
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.lines: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._is_over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        port: int = self.wait_for("listening")["port"]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> Self:
        """Wait until it is loaded."""
        self.wait_for("ready")
        return self

    def wait_for(self, message: str, *, after: int = 0) -> dict[str, Any]:
        """The first log line with that message, at or behind position `after`."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.lines[after:] if line["message"] == message), None)

        with self._news:
            self._news.wait_for(lambda: found() is not None or self._is_over, PATIENCE_S)
            line = found()
        assert line is not None, f"no {message!r} in the log: {self.lines}"
        return line

    def until(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for /sublet/state until it is so; each answer is a turn of the engine's loop, so nothing here sleeps."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            state: dict[str, Any] = self.get("/sublet/state").json
            if is_so(state):
                return state
            assert time.monotonic() < deadline_s, state

    # -- HTTP

    def get(self, path: str) -> Answer:
        return self._ask("GET", path, None)

    def post(self, path: str, body: object = None) -> Answer:
        return self._ask("POST", path, body)

    def complete(self, prompt: str | list[int] = "hello", *, model: str = MISTRAL, **fields: object) -> Answer:
        return self.post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 4, **fields})

    def connection(self) -> http.client.HTTPConnection:
        """A connection to do with as the test likes; close it."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def open_stream(self, prompt: str, *, model: str = MISTRAL, **fields: object) -> http.client.HTTPConnection:
        """A streaming request that has been sent; close it to hang up."""
        connection = self.connection()
        body = {"model": model, "prompt": prompt, "stream": True, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def _ask(self, method: str, path: str, body: object) -> Answer:
        connection = self.connection()
        try:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    # -- the process

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def kill(self) -> None:
        """SIGKILL, if it still runs. The streams are closed."""
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def complaint(self) -> str:
        """What it wrote to standard error; call it once, after the end."""
        assert self._process.stderr is not None
        return self._process.stderr.read().decode()

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def thread_count(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.lines.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self._is_over = True
            self._news.notify_all()


def simulated(
    host: softgpu.Host,
    *extra: str,
    model: str = MISTRAL,
    weights_bytes: int = MISTRAL_BYTES,
    memory_bytes: int = 24 * GiB,
    cold_start_s: float = 0,
    time_scale: float = 0.05,
    extra_environment: Mapping[str, str] | None = None,
    gpu_count: int = 1,
) -> Engine:
    """A simulated engine that starts at once and runs twenty times faster than modelled."""
    arguments = {
        "--model": model,
        "--weights-bytes": weights_bytes,
        "--memory-bytes": memory_bytes,
        "--cold-start-s": cold_start_s,
        "--time-scale": time_scale,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    return Engine(host, "simulated", *words, *extra, extra_environment=extra_environment, gpu_count=gpu_count)


def training(
    host: softgpu.Host,
    directory: Path,
    *extra: str,
    memory_bytes: int = 10 * GiB,
    step_s: float = 0.005,
    extra_environment: Mapping[str, str] | None = None,
) -> Engine:
    """A training job with short steps."""
    arguments = {
        "--model": "job",
        "--memory-bytes": memory_bytes,
        "--checkpoint-dir": directory,
        "--step-s": step_s,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    return Engine(host, "training", *words, *extra, extra_environment=extra_environment)

"""Keeps a set of processes running on one host, for development and demonstrations.

`supervise` starts them in order, each when the one before is ready, restarts what dies, and stops all in reverse order.
When the supervising process itself is killed the kernel kills its children (`kit.process`).
"""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio
import anyio.abc

from kit.process import Child, spawn

ReadyCheck = Callable[[], bool | Awaitable[bool]] | str
"""A function, or `http://host:port/path` (answers 2xx), `tcp://host:port` or `unix:///path` (accepts connections)."""

LOG_LINES_SHOWN: Final = 15
# Fifteen lines with a traceback's long ones; a log may be gigabytes.
_LOG_TAIL_BYTES: Final = 32 * 1024
# Between two looks at a process that is starting. A look costs a connection on loopback; its death is noticed at once.
_CHECK_EVERY_S: Final = 0.05
_CHECK_TIMEOUT_S: Final = 2.0
_KILL_WAIT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process to keep."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    """All of it: nothing is inherited."""
    log_path: Path
    depends_on_ready: ReadyCheck | None = None
    """When it is ready, so that those after it may start; None: as soon as it runs."""
    restart: bool = True
    stop_grace_s: float = 5.0
    """Between SIGTERM and SIGKILL."""
    stop_order: int = 0
    """Lower stops earlier; equals stop in reverse order of their start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before a restart: doubling, and from the start again after a life of `reset_after_s`."""

    first_s: float = 0.1
    longest_s: float = 5.0
    reset_after_s: float = 10.0

    def delay_s(self, *, short_life_count: int) -> float:
        """After so many lives in a row (1 or more) that ended before `reset_after_s`; 0 counts as 1."""
        # The exponent is bounded: a float overflows at 1024.
        return min(self.longest_s, self.first_s * 2.0 ** min(max(short_life_count - 1, 0), 32))


class EventKind(StrEnum):
    STARTED = "started"
    READY = "ready"
    DIED = "died"
    RESTARTED = "restarted"
    GAVE_UP = "gave up"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEvent:
    """What happened to one process; for a banner or a log."""

    name: str
    kind: EventKind
    pid: int
    exit_code: int | None = None
    """Of a death; -N when signal N ended it."""
    next_start_s: float | None = None
    """Of a death: how long until it is started again; None when it is not."""


class NotReady(Exception):
    """A process did not get ready at its first start. Its text: the reason, the exit code and the end of the log."""

    def __init__(self, spec: ProcessSpec, *, reason: str, exit_code: int | None) -> None:
        tail = log_tail(spec.log_path)
        shown = "\n".join(f"  {line}" for line in tail) or "  (nothing)"
        super().__init__(f"{spec.name} {reason}; the end of {spec.log_path}:\n{shown}")
        self.name = spec.name
        self.exit_code = exit_code
        self.log_tail = tail


class Interrupted(Exception):
    """A signal came before all processes had started; those that had are stopped."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"ended by {signal.Signals(signal_number).name} while starting")
        self.signal_number = signal_number


class Supervisor:
    """What `supervise` gives its body: a look at the processes."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        on_event: Callable[[ProcessEvent], None],
        ready_timeout_s: float,
        backoff: Backoff,
    ) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ValueError(f"two processes of one name: {', '.join(sorted(names))}")
        self.signal_received: int | None = None
        """The signal that ended it; the usual exit status is 128 more."""
        self._specs = specs
        self._children: dict[str, Child] = {}
        self._on_event = on_event
        self._ready_timeout_s = ready_timeout_s
        self._backoff = backoff

    def pid(self, name: str) -> int | None:
        """None while it is not running."""
        child = self._children.get(name)
        return child.pid if child and child.exit_code is None else None

    # -- used by `supervise`

    async def keep(self, spec: ProcessSpec, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Start it, say when it is ready, restart it for ever. Raises `NotReady` for the first start only."""
        short_life_count = 0
        is_first = True
        while True:
            child = self._start(spec, EventKind.STARTED if is_first else EventKind.RESTARTED)
            started_at_s = anyio.current_time()
            reason = await self._reason_not_ready(spec, child)
            if reason is None:
                self._tell(spec, EventKind.READY, child)
            if is_first and reason is not None:
                code = child.exit_code
                await child.stop(grace_s=0)
                raise NotReady(spec, reason=reason, exit_code=code)
            if is_first:
                task_status.started()
                is_first = False
            code = await (child.exited() if reason is None else child.stop(grace_s=spec.stop_grace_s))
            if anyio.current_time() - started_at_s >= self._backoff.reset_after_s:
                short_life_count = 0
            short_life_count += 1
            delay_s = self._backoff.delay_s(short_life_count=short_life_count) if spec.restart else None
            self._tell(spec, EventKind.DIED, child, exit_code=code, next_start_s=delay_s)
            if delay_s is None:
                self._tell(spec, EventKind.GAVE_UP, child, exit_code=code)
                return
            await anyio.sleep(delay_s)

    async def stop_all(self, *, timeout_s: float) -> None:
        """One after another; when the time is up, all that is left at once."""
        started = [spec for spec in self._specs if spec.name in self._children]
        try:
            with anyio.move_on_after(timeout_s):
                order = {spec.name: (spec.stop_order, -position) for position, spec in enumerate(started)}
                for spec in sorted(started, key=lambda spec: order[spec.name]):
                    await self._children[spec.name].stop(grace_s=spec.stop_grace_s)
        finally:
            for child in self._children.values():
                child.kill_group()
        # A process inside a driver call may ignore even SIGKILL for a while; the kernel reaps it after us.
        with anyio.move_on_after(_KILL_WAIT_S):
            for child in self._children.values():
                await child.exited()

    async def watch_signals(self, scope: anyio.CancelScope, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                self.signal_received = int(number)
                scope.cancel()

    def _start(self, spec: ProcessSpec, kind: EventKind) -> Child:
        child = spawn(spec.arguments, environment=spec.environment, log_path=spec.log_path)
        self._children[spec.name] = child
        self._tell(spec, kind, child)
        return child

    async def _reason_not_ready(self, spec: ProcessSpec, child: Child) -> str | None:
        """None as soon as it is ready; a reason when it ended first, or when the deadline passed."""
        if spec.depends_on_ready is None:
            return None
        with anyio.move_on_after(self._ready_timeout_s):
            while child.exit_code is None:
                if await holds(spec.depends_on_ready):
                    return None
                with anyio.move_on_after(_CHECK_EVERY_S):
                    await child.exited()
        if child.exit_code is not None:
            return f"ended with exit code {child.exit_code} before it was ready"
        return f"was not ready after {self._ready_timeout_s:g} s (still running, no exit code)"

    def _tell(
        self,
        spec: ProcessSpec,
        kind: EventKind,
        child: Child,
        *,
        exit_code: int | None = None,
        next_start_s: float | None = None,
    ) -> None:
        self._on_event(
            ProcessEvent(name=spec.name, kind=kind, pid=child.pid, exit_code=exit_code, next_start_s=next_start_s)
        )


@asynccontextmanager
async def supervise(
    specs: Sequence[ProcessSpec],
    *,
    on_event: Callable[[ProcessEvent], None] = lambda _: None,
    ready_timeout_s: float = 60.0,
    stop_timeout_s: float = 30.0,
    backoff: Backoff | None = None,
    handles_signals: bool = True,
) -> AsyncIterator[Supervisor]:
    """Run the body while all processes run; they are stopped when it ends, is cancelled, or SIGINT or SIGTERM comes.

    On a signal the body is cancelled and the block ends without an exception; `signal_received` says so. Raises
    `NotReady` when a first start fails and `Interrupted` when a signal comes before the body, after stopping what had
    started. Call it from the main thread.
    """
    supervisor = Supervisor(specs, on_event=on_event, ready_timeout_s=ready_timeout_s, backoff=backoff or Backoff())
    failure: Exception | None = None
    has_started = False
    try:
        async with anyio.create_task_group() as tasks:
            if handles_signals:
                await tasks.start(supervisor.watch_signals, tasks.cancel_scope)
            try:
                for spec in specs:
                    await tasks.start(supervisor.keep, spec)
                has_started = True
                yield supervisor
            except Exception as error:  # noqa: BLE001  Raised again below: a task group would wrap it.
                failure = error
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await supervisor.stop_all(timeout_s=stop_timeout_s)
    if failure is not None:
        raise failure
    if supervisor.signal_received is not None and not has_started:
        raise Interrupted(supervisor.signal_received)


async def holds(check: ReadyCheck) -> bool:
    """Whether the check passes now. Network errors mean no; exceptions of a function are not caught."""
    if not isinstance(check, str):
        answer = check()
        return answer if isinstance(answer, bool) else await answer
    try:
        with anyio.fail_after(_CHECK_TIMEOUT_S):
            return await _answers(check)
    except (OSError, TimeoutError, anyio.BrokenResourceError, anyio.EndOfStream):
        return False


async def _answers(address: str) -> bool:
    url = urlsplit(address)
    match url.scheme:
        case "unix":
            async with await anyio.connect_unix(url.path):
                return True
        case "tcp" | "http" if url.hostname and url.port:
            async with await anyio.connect_tcp(url.hostname, url.port) as stream:
                if url.scheme == "tcp":
                    return True
                path = (url.path or "/") + (f"?{url.query}" if url.query else "")
                await stream.send(f"GET {path} HTTP/1.0\r\nHost: {url.netloc}\r\n\r\n".encode())
                head = await stream.receive(32)
                return head.startswith(b"HTTP/1.") and head[8:10] == b" 2"
        case _:
            raise ValueError(f"{address}: use http://host:port/path, tcp://host:port or unix:///path")


def log_tail(path: Path, *, lines_max: int = LOG_LINES_SHOWN) -> list[str]:
    """The last lines of a log, oldest first; empty when there is none."""
    try:
        with path.open("rb") as log:
            size_bytes = log.seek(0, 2)
            log.seek(max(0, size_bytes - _LOG_TAIL_BYTES))
            content = log.read()
    except OSError:
        return []
    return content.decode(errors="replace").splitlines()[-lines_max:]

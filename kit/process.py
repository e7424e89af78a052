"""Child processes that cannot outlive their parent, named so that a reused pid is never taken for one of them.

Linux only. Every child is started by a tiny launcher: it asks the kernel for SIGKILL at its parent's death, waits at
a gate when there is one, and then becomes the program. Nothing runs between fork and exec in the parent's image, so
that a parent with threads and a driver loaded may spawn.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

CANNOT_RUN_CODE: Final = 127
"""Exit code when the program could not be executed; as a shell's."""
GATE_CLOSED_CODE: Final = 125
"""Exit code when the parent went away before it opened the gate, or before the launcher looked."""

# prctl's 1 is PR_SET_PDEATHSIG and survives exec. A parent that died before the call is noticed by getppid. Python
# ignores SIGPIPE and SIGXFSZ, and exec would hand that on. argv: parent's pid, gate's descriptor or -1, program, its
# arguments.
_LAUNCHER: Final = f"""
import ctypes, os, signal, sys
parent, gate = int(sys.argv[1]), int(sys.argv[2])
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent or (gate >= 0 and not os.read(gate, 1)):
    os._exit({GATE_CLOSED_CODE})
if gate >= 0:
    os.close(gate)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    print(f"cannot run {{sys.argv[3]}}: {{error.strerror}}", file=sys.stderr, flush=True)
    os._exit({CANNOT_RUN_CODE})
"""
# Ports below this are services'; above the kernel's ephemeral range starts, where any outgoing connection may sit.
_PORT_MIN: Final = 15_000
_PORT_TRIES_MAX: Final = 64
# Of nobody's seed: processes that begin with the same one would all choose the same port.
_CHANCE: Final = random.SystemRandom()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """One process for ever: its pid, and when it started in clock ticks since boot."""

    pid: int
    started_ticks: int


def identity_of(pid: int) -> ProcessIdentity | None:
    """Who has this pid now; None when nobody has. A zombie still has its own."""
    fields = _stat_fields(pid)
    return ProcessIdentity(pid=pid, started_ticks=int(fields[19])) if fields else None


def is_alive(identity: ProcessIdentity) -> bool:
    """True while this very process runs: false for a zombie, and for a stranger with its pid."""
    fields = _stat_fields(identity.pid)
    return bool(fields) and int(fields[19]) == identity.started_ticks and fields[0] not in {"Z", "X"}


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty when it is gone. The second may hold anything."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return content.rpartition(")")[2].split()


def free_port(*, host: str = "127.0.0.1", taken: Container[int] = ()) -> int:
    """A TCP port that nobody listens on now and that no outgoing connection will be given; none of `taken`."""
    lowest_ephemeral = _lowest_ephemeral_port()
    if lowest_ephemeral > _PORT_MIN:
        for _ in range(_PORT_TRIES_MAX):
            port = _CHANCE.randrange(_PORT_MIN, lowest_ephemeral)
            if port not in taken and _can_listen(host, port):
                return port
    for _ in range(_PORT_TRIES_MAX):
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port
    raise OSError(f"no free TCP port on {host}")


def _lowest_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0


def _can_listen(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class Child:
    """A process that we started, in a session and process group of its own. Its group is killed when it ends."""

    def __init__(self, process: subprocess.Popen[bytes], *, gate_fd: int | None) -> None:
        identity = identity_of(process.pid)
        assert identity is not None, "an unreaped child has an entry in /proc"
        self.identity = identity
        self._process = process
        self._gate_fd = gate_fd

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def is_gated(self) -> bool:
        """True until `open_gate`: the program has not run a single instruction."""
        return self._gate_fd is not None

    @property
    def exit_code(self) -> int | None:
        """None until `exited` has returned once; -N when signal N ended it."""
        return self._process.returncode

    def open_gate(self) -> None:
        """Let the program run. Idempotent; a child that died at the gate is no error."""
        if self._gate_fd is None:
            return
        fd, self._gate_fd = self._gate_fd, None
        with contextlib.suppress(BrokenPipeError):
            os.write(fd, b"g")
        os.close(fd)

    def signal(self, number: int) -> None:
        """To the leader alone; none when it has ended."""
        if self._process.returncode is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL to the leader and to all that stayed in its group; none once it was reaped."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    async def exited(self) -> int:
        """The exit code, as soon as it has ended and the rest of its group was killed. Any number of tasks may wait."""
        if self._process.returncode is None:
            fd = os.pidfd_open(self.pid)
            try:
                await anyio.wait_readable(fd)
            finally:
                os.close(fd)
        if self._process.returncode is None:
            # Before it is reaped: until then nobody else can have its number.
            self.kill_group()
            self._process.wait()
            if self._gate_fd is not None:
                os.close(self._gate_fd)
                self._gate_fd = None
        assert self._process.returncode is not None
        return self._process.returncode

    async def stop(self, *, grace_s: float) -> int:
        """SIGTERM to the leader, SIGKILL to the group after `grace_s`; the exit code. Cancelled: killed at once."""
        try:
            self.signal(signal.SIGTERM)
            with anyio.move_on_after(grace_s):
                return await self.exited()
        finally:
            self.kill_group()
        return await self.exited()


def spawn(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    log_path: Path,
    is_gated: bool = False,
    folder: Path | None = None,
) -> Child:
    """Start a program with exactly this environment, its output appended to `log_path`; it dies with this process.

    Call it from the main thread: the kernel counts the end of the *thread* that spawned as the parent's death. A
    program that cannot be run ends with `CANNOT_RUN_CODE` and a line in its log.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("spawn from the main thread: a child dies with the thread that started it")
    read_fd, write_fd = os.pipe() if is_gated else (-1, None)
    try:
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(read_fd), *arguments],
                env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=folder, start_new_session=True, pass_fds=(read_fd,) if is_gated else (),
            )  # fmt: skip
    except BaseException:
        if write_fd is not None:
            os.close(write_fd)
        raise
    finally:
        if is_gated:
            os.close(read_fd)
    return Child(process, gate_fd=write_fd)

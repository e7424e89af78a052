"""What a stack keeps on disk: its folders, the ports that it took, who it is for, and which processes run now."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kit.process import free_port

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  (the software GPU and a short socket path; a folder of our own in it)
CONTEXT_FILE: Final = "context.json"
LOCK_FILE: Final = "lock"
OWNER_FILE: Final = "owner"
PORTS_FILE: Final = "ports.json"
PROCESSES_FILE: Final = "processes.json"
OWN_NAMES: Final = frozenset(
    {CONTEXT_FILE, LOCK_FILE, PORTS_FILE, PROCESSES_FILE, "keys", "logs", "nats", "holder", "nodeagent"}
)
"""All that a stack puts into its state folder."""


class StackError(Exception):
    """The stack cannot be started; the text says why and what helps."""


class AlreadyRunning(StackError):
    """Another process runs a stack with this state folder."""


@dataclass(frozen=True, slots=True)
class StateFolder:
    """Paths below the state folder, and below the one in shared memory that belongs to it."""

    path: Path
    """Absolute."""

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def nats(self) -> Path:
        return self.path / "nats"

    @property
    def context(self) -> Path:
        return self.path / CONTEXT_FILE

    @property
    def processes(self) -> Path:
        return self.path / PROCESSES_FILE

    @property
    def runtime(self) -> Path:
        """For what ends with the stack: the software GPU's memory, and a socket whose path must be short."""
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        return parent / f"sublet-{hashlib.sha256(str(self.path).encode()).hexdigest()[:12]}"

    def service(self, name: str) -> Path:
        return self.path / name

    def make(self) -> None:
        for folder in (self.path, self.keys, self.logs, self.nats, self.runtime):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise StackError(f"the folder {folder} cannot be made: {error.strerror}") from error
        (self.runtime / OWNER_FILE).write_text(str(self.path), encoding="utf-8")

    def remove_runtime(self) -> None:
        shutil.rmtree(self.runtime, ignore_errors=True)

    def clear(self) -> None:
        """Forget everything; call it while `locked`. Refuses a folder that is not a stack's."""
        children = [child for child in self.path.iterdir() if child.name != LOCK_FILE]
        if not {child.name for child in children} <= OWN_NAMES:
            raise StackError(f"{self.path} does not look like the state of a stack; remove it yourself if you mean it")
        for child in children:
            shutil.rmtree(child) if child.is_dir() else child.unlink()

    def remove_leftovers(self) -> None:
        """Take away what killed stacks of this user left in shared memory: their state folder is gone or unlocked."""
        for owner in self.runtime.parent.glob(f"sublet-*/{OWNER_FILE}"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                other = StateFolder(Path(owner.read_text(encoding="utf-8")))
                if other.path == self.path or other.runtime != owner.parent or owner.stat().st_uid != os.getuid():
                    continue
                if not other.path.exists():
                    other.remove_runtime()
                    continue
                with contextlib.suppress(AlreadyRunning), other.locked():
                    other.remove_runtime()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises `AlreadyRunning` while another process has it; the kernel lets go of it however that one ends."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / LOCK_FILE).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AlreadyRunning(f"a stack runs already with {self.path}") from error
            yield


def write_private(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file that only its owner may read; readers see the old or the new one."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    new.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Empty when there is no such file, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- ports ----------------------------------------------------------------------------------------------------------


def choose_ports(folder: StateFolder, names: tuple[str, ...], *, gateway_port: int) -> dict[str, int]:
    """A free port for each name, the same as last time where possible; `gateway_port` 0: any."""
    remembered = read_json(folder.path / PORTS_FILE)
    ports: dict[str, int] = {}
    for name in names:
        port = remembered.get(name, 0)
        if name == "gateway" and gateway_port:
            check_port(gateway_port)
            port = gateway_port
        elif not isinstance(port, int) or port == 0 or port in ports.values() or not _is_free(port):
            port = free_port(taken=set(ports.values()) | {gateway_port})
        ports[name] = port
    write_private(folder.path / PORTS_FILE, ports)
    return ports


def check_port(port: int) -> None:
    """Raises `StackError` when nobody can listen there, naming who does."""
    try:
        _bind(port)
    except OSError as error:
        other = 8090 if port != 8090 else 8091
        remedy = f'choose another port: make up ARGS="--port {other}"'
        if error.errno != errno.EADDRINUSE:
            raise StackError(f"port {port} cannot be used ({error.strerror}); {remedy}") from error
        raise StackError(f"port {port} is used by {_listener(port)}; {remedy}") from error


def _bind(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def _is_free(port: int) -> bool:
    try:
        _bind(port)
    except OSError:
        return False
    return True


def _listener(port: int) -> str:
    """Who listens there, as far as this user may know."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in Path(table).read_text(encoding="ascii").splitlines()[1:]]
            inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for link in folder.iterdir():
                found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
                if found and found[1] in inodes:
                    name = (folder.parent / "comm").read_text(encoding="utf-8").strip()
                    return f"'{name}' (pid {folder.parent.name})"
    return "another program"

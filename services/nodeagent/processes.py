"""What belongs to an engine's process: its memory on a GPU is often in the hands of its children."""

import contextlib
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")


def tree_of(pid: int, *, proc: Path = PROC) -> frozenset[int]:
    """The process and all below it, as they are now. One that nobody can see any more is a tree of its own."""
    return trees_of([pid], proc=proc)


def is_there(pid: int, *, proc: Path = PROC) -> bool:
    """Whether it is a process of this host now."""
    return (proc / str(pid)).exists()


def peer_pid(socket_path: str) -> int:
    """Who listens on a Unix socket, as a pid of this namespace; 0 where that cannot be told."""
    credentials = struct.Struct("3i")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        connection.connect(socket_path)
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
        pid: int = credentials.unpack(told)[0]
        return pid
    return 0


def trees_of(pids: Iterable[int], *, proc: Path = PROC) -> frozenset[int]:
    """These processes and all below them, in one look; none below no process (0)."""
    children: dict[int, list[int]] = {}
    for folder in proc.glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # It ended meanwhile.
        parent = int(status.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(folder.name))
    ahead = [pid for pid in pids if pid > 0]
    found = set(ahead)
    while ahead:
        for child in children.get(ahead.pop(), ()):
            if child not in found:
                found.add(child)
                ahead.append(child)
    return frozenset(found)

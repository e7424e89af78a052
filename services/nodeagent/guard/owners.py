"""Whose process it is: NVML tells bytes by pid, and an engine may be many processes."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from schemas.holders import EngineView

DEPTH_MAX: Final = 64
"""Of parents that are followed; a process tree is a handful deep."""
_UNIFIED: Final = re.compile(r"^0::/(.*)$", re.MULTILINE)


def owners_of(pids: Iterable[int], engines: Iterable[EngineView], *, proc: Path = Path("/proc")) -> Mapping[int, str]:
    """`{pid: replica}` for those that belong to an engine: it is the engine, its descendant, or in its cgroup leaf.

    An engine whose pid is another process here, as it is for an agent in a pid namespace of its own, has none by it.
    """
    alive = [engine for engine in engines if engine.is_alive]
    by_pid = {
        engine.pid: engine.replica_id for engine in alive if started_ticks(engine.pid, proc) == engine.started_ticks
    }
    by_leaf = {engine.namespace: engine.replica_id for engine in alive if engine.namespace.startswith("/")}
    found = {}
    for pid in pids:
        owner = by_pid.get(pid) or _by_leaf(pid, by_leaf, proc) or _by_parent(pid, by_pid, proc)
        if owner is not None:
            found[pid] = owner
    return found


def started_ticks(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When it started, in clock ticks since boot; None when it is gone."""
    fields = _stat_fields(pid, proc)
    return int(fields[19]) if len(fields) > 19 else None


def _stat_fields(pid: int, proc: Path) -> list[str]:
    """From the third on. After the last bracket: a process's name may hold anything."""
    try:
        return (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _by_leaf(pid: int, by_leaf: Mapping[str, str], proc: Path) -> str | None:
    path = cgroup_of(pid, proc=proc)
    if path is None:
        return None
    return next((owner for leaf, owner in by_leaf.items() if f"{path}/".find(f"{_below_mount(leaf)}/") == 0), None)


def _below_mount(leaf: str) -> str:
    for mount in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        if leaf.startswith(mount):
            return leaf.removeprefix(mount)
    return leaf


def cgroup_of(pid: int, *, proc: Path = Path("/proc")) -> str | None:
    """Its path in cgroup v2, below the mount; None when it has none, or is gone."""
    try:
        found = _UNIFIED.search((proc / str(pid) / "cgroup").read_text(errors="replace"))
    except OSError:
        return None
    return f"/{found.group(1)}" if found is not None else None


def _by_parent(pid: int, by_pid: Mapping[int, str], proc: Path) -> str | None:
    for _ in range(DEPTH_MAX):
        fields = _stat_fields(pid, proc)
        if len(fields) < 2:
            return None
        pid = int(fields[1])
        if pid in by_pid:
            return by_pid[pid]
        if pid <= 1:
            return None
    return None

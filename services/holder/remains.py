"""Finds and ends what an engine leaves behind: children in sessions of their own, or orphans of a killed holder.

Every engine carries its name in the environment, and so do its children unless they clear it; a cgroup leaf misses
none.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from services.holder.cgroups import is_populated, pids_in

MARK: Final = "SUBLET_ENGINE"
# SIGKILL needs a moment; a process inside a driver call may need seconds.
_LOOK_EVERY_S: Final = 0.01
KILL_WAIT_S: Final = 10.0


def mark(state_dir: Path, replica_id: str = "") -> str:
    """The value of the variable; without a replica: how those of all engines of this holder begin."""
    return f"{state_dir}#{replica_id}" + ("#" if replica_id else "")


def pids_with_mark(value: str) -> list[int]:
    """Living processes whose mark begins so, ascending. Those of other users that we may not read are left out."""
    wanted = f"{MARK}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            content = (folder / "environ").read_bytes()  # Empty for a zombie.
            if any(entry.startswith(wanted) for entry in content.split(b"\0")):
                found.append(int(folder.name))
    return sorted(found)


async def end(value: str, leaf: Path | None) -> bool:
    """Kill all that carry the mark or sit in the leaf; true when nothing is left of them, false after `KILL_WAIT_S`."""
    with anyio.move_on_after(KILL_WAIT_S):
        # No event tells of the end of processes that are not our children.
        while not await anyio.to_thread.run_sync(_killed_all, value, leaf):  # noqa: ASYNC110
            await anyio.sleep(_LOOK_EVERY_S)
        return True
    return False


def _killed_all(value: str, leaf: Path | None) -> bool:
    """True when there was nothing left to kill."""
    pids = {*pids_with_mark(value), *(pids_in(leaf) if leaf else ())} - {os.getpid()}
    for pid in sorted(pids):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return not pids and (leaf is None or not is_populated(leaf))

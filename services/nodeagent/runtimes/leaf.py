"""Where a process is in cgroup v2: what the driver's memory limits hold on to."""

from pathlib import Path
from typing import Final

MOUNTS: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
"""Of cgroup v2, alone or beside v1."""


def leaf_of(pid: int, *, container_id: str, proc: Path = Path("/proc"), mounts: tuple[Path, ...] = MOUNTS) -> str:
    """The path of its cgroup; empty where there is none of its container's own that we could see.

    That is so on hosts with cgroup v1, where containers stay in the cgroup of who started them, so that a limit would
    hold them all; and where the agent sees neither the host's processes nor its cgroups. The engine names a container's
    own cgroup after it, whatever its cgroup driver.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "").strip("/")
    # "..": it lies outside of what this process may see.
    if not path or ".." in path.split("/") or container_id not in path.rpartition("/")[2]:
        return ""
    found = (mount / path for mount in mounts if (mount / "cgroup.controllers").exists())
    return next((str(leaf) for leaf in found if (leaf / "cgroup.procs").exists()), "")

"""One cgroup v2 leaf for each engine: what the driver's memory limits hold on to, and a kill that nothing escapes."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from devices.api import DeviceError, DeviceLost, Inventory, NotFound, NotSupported

_LEAF_PREFIX = "sublet-"
# The software driver keeps 63 bytes of a declared group's name.
_GROUP_NAME_BYTES_MAX = 63


def declared_group(replica_id: str) -> str:
    """The group's name on the software GPU where there is no cgroup. Unique for each replica."""
    name = _LEAF_PREFIX + replica_id
    if len(name.encode()) <= _GROUP_NAME_BYTES_MAX:
        return name
    return _LEAF_PREFIX + hashlib.sha256(replica_id.encode()).hexdigest()[:32]


class Cgroups:
    """The leaves below one cgroup; without one (`parent` None) every method does nothing and gives nothing."""

    def __init__(self, parent: Path | None) -> None:
        self.parent = parent

    def place(self, replica_id: str, pid: int) -> Path | None:
        """The replica's leaf, with this process in it; None where the kernel or our rights do not allow it."""
        if self.parent is None:
            return None
        leaf = self._leaf(replica_id)
        try:
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError:
            with contextlib.suppress(OSError):
                leaf.rmdir()
            return None
        return leaf

    def remove(self, replica_id: str) -> None:
        """Take the empty leaf away. Its limits must be cleared before, or the ancestors keep the reservation."""
        if self.parent is not None:
            with contextlib.suppress(OSError):
                self._leaf(replica_id).rmdir()

    def remove_all(self) -> None:
        """Take every empty leaf away, and the folder around them."""
        for replica_id in self.leaves():
            self.remove(replica_id)
        if self.parent is not None:
            with contextlib.suppress(OSError):
                self.parent.rmdir()

    def leaves(self) -> dict[str, Path]:
        """`{replica: leaf}` of all that exist, whoever made them, by replica."""
        if self.parent is None or not self.parent.is_dir():
            return {}
        found = {unquote(path.name.removeprefix(_LEAF_PREFIX)): path for path in self.parent.glob(f"{_LEAF_PREFIX}*")}
        return dict(sorted(found.items()))

    def _leaf(self, replica_id: str) -> Path:
        assert self.parent is not None
        return self.parent / (_LEAF_PREFIX + quote(replica_id, safe=""))


def clear_limits(leaves: Iterable[Path]) -> bool:
    """Take the driver's limits off these leaves, on every GPU; true when none is left. Blocks in the driver.

    The agent does this for each engine that it has stopped; here it is for those whose agent did not come to it.
    """
    leaves = tuple(leaves)
    if not leaves:
        return True
    try:
        from devices.nvml import NvmlInventory  # Late: a holder needs no driver until here.

        inventory = NvmlInventory()
    except (ImportError, NotSupported):
        return True  # Without a driver there are no limits.
    with contextlib.closing(inventory):
        cleared = [_clear(inventory, gpu.uuid, leaf) for gpu in inventory.gpus() for leaf in leaves]
    return all(cleared)


def _clear(inventory: Inventory, gpu_uuid: str, leaf: Path) -> bool:
    try:
        inventory.clear_limit(gpu_uuid, str(leaf))
    except (NotSupported, NotFound, DeviceLost):
        return True
    except DeviceError:
        return False
    return True


def find(setting: str, *, holder_name: str) -> Cgroups:
    """The place that the setting names, when it can be made: a folder of this holder in cgroup v2."""
    mount = mount_point()
    if setting == "off" or mount is None:
        return Cgroups(None)
    outer = mount / (_own_path() if setting == "auto" else setting.removeprefix(str(mount)).lstrip("/"))
    parent = outer / f"sublet-holder.{holder_name}"
    with contextlib.suppress(OSError):
        parent.mkdir(exist_ok=True)
    # Without this right a process could be put in no leaf: it is needed at the common ancestor of here and there.
    return Cgroups(parent if parent.is_dir() and os.access(outer / "cgroup.procs", os.W_OK) else None)


def mount_point() -> Path | None:
    """Where cgroup v2 is mounted, alone or beside v1; None when it is not."""
    for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (mount / "cgroup.procs").exists() and (mount / "cgroup.controllers").exists():
            return mount
    return None


def _own_path() -> str:
    content = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    found = re.search(r"^0::/(.*)$", content, re.MULTILINE)
    return found.group(1) if found else ""


def pids_in(leaf: Path) -> list[int]:
    """Living processes of a leaf, ascending; none when it is gone."""
    try:
        return sorted(int(line) for line in (leaf / "cgroup.procs").read_text(encoding="ascii").split())
    except OSError:
        return []


def is_populated(leaf: Path) -> bool:
    """Whether the kernel still counts processes there; it may for a moment after the last one was reaped."""
    try:
        return "populated 1" in (leaf / "cgroup.events").read_text(encoding="ascii")
    except OSError:
        return False

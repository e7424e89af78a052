"""Where this host's memory lies, as far as the kernel says it; and files whose pages are to lie in one place."""

import ctypes
import mmap
import os
import platform
from pathlib import Path
from typing import Final

_NODES: Final = Path("/sys/devices/system/node")
_MPOL_PREFERRED: Final = 1
# The number of mbind(2), which the C library does not wrap.
_MBIND: Final = {"x86_64": 237, "aarch64": 235}


def nodes(folder: Path = _NODES) -> tuple[int, ...]:
    """The NUMA nodes that have memory, ascending; (0,) where the kernel knows of none."""
    try:
        found = [int(path.name[4:]) for path in folder.glob("node[0-9]*") if _has_memory(path)]
    except (OSError, ValueError):
        found = []
    return tuple(sorted(found)) or (0,)


def _has_memory(node: Path) -> bool:
    try:
        first = (node / "meminfo").read_text(encoding="ascii").splitlines()[0]
    except (OSError, IndexError):
        return True
    return int(first.split()[3]) > 0


def node_of_pci(pci_bus_id: str, folder: Path = Path("/sys/bus/pci/devices")) -> int:
    """The NUMA node nearest to a device; 0 where the kernel does not say."""
    name = pci_bus_id.lower()
    for candidate in (name, name.removeprefix("0000")):  # NVML writes the domain with eight digits
        try:
            return max(0, int((folder / candidate / "numa_node").read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return 0


def place(descriptor: int, *, size_bytes: int, numa_index: int) -> bool:
    """Ask that the file's pages, which must lie in a tmpfs, come from one node; whether the kernel took it.

    The policy stays with the file. It is a wish: where that node is full, pages come from another.
    """
    number = _MBIND.get(platform.machine())
    if number is None or not size_bytes:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    mask_words = numa_index // 64 + 1
    mask = (ctypes.c_ulong * mask_words)()
    mask[numa_index // 64] = 1 << numa_index % 64
    with mmap.mmap(descriptor, size_bytes) as mapping:
        view = ctypes.c_char.from_buffer(mapping)
        address = ctypes.addressof(view)
        del view  # else the mapping could not be closed
        result = library.syscall(
            ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_ulong(size_bytes), ctypes.c_int(_MPOL_PREFERRED),
            mask, ctypes.c_ulong(mask_words * 64 + 1), ctypes.c_uint(0),
        )  # fmt: skip
    return bool(result == 0)


def available_bytes(path: Path = Path("/proc/meminfo")) -> int:
    """What the kernel thinks that new work may take without swapping."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))

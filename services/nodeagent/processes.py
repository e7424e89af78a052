"""What belongs to an engine's process: its memory on a GPU is often in the hands of its children."""

from pathlib import Path


def tree_of(pid: int, *, proc: Path = Path("/proc")) -> frozenset[int]:
    """The process and all below it, as they are now. One that nobody can see any more is a tree of its own."""
    children: dict[int, list[int]] = {}
    for folder in proc.glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # It ended meanwhile.
        parent = int(status.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(folder.name))
    found, ahead = {pid}, [pid]
    while ahead:
        for child in children.get(ahead.pop(), ()):
            if child not in found:
                found.add(child)
                ahead.append(child)
    return frozenset(found)

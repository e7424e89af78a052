"""Which processes an engine is made of."""

from pathlib import Path

from schemas.holders import EngineView


def pids_of(engine: EngineView) -> tuple[int, ...]:
    """Its first process and all that came of it, ascending: its cgroup's, or else by who started whom."""
    found = _in_cgroup(Path(engine.namespace)) or _descendants(engine.pid)
    return tuple(sorted({engine.pid, *found}))


def _in_cgroup(leaf: Path) -> set[int]:
    if not leaf.is_absolute() or not (leaf / "cgroup.procs").exists():
        return set()
    files = [leaf / "cgroup.procs", *leaf.glob("**/cgroup.procs")]
    return {int(line) for file in files for line in _read(file).split()}


def _descendants(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _read(stat).rpartition(")")[2].split()
        if len(fields) > 1:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: set[int] = set()
    queue = [root]
    while queue:
        fresh = [pid for pid in children.get(queue.pop(), []) if pid not in found]
        found.update(fresh)
        queue += fresh
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

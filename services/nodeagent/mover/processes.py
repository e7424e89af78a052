"""Which processes an engine is made of."""

from pathlib import Path

from schemas.holders import EngineView
from services.nodeagent.processes import tree_of


def pids_of(engine: EngineView) -> tuple[int, ...]:
    """Its first process and all that came of it, ascending; with a cgroup also those whose parent is gone."""
    return tuple(sorted(tree_of(engine.pid) | _in_cgroup(Path(engine.namespace))))


def _in_cgroup(leaf: Path) -> frozenset[int]:
    if not leaf.is_absolute():
        return frozenset()
    found: set[int] = set()
    for file in leaf.glob("**/cgroup.procs"):
        try:
            found.update(int(line) for line in file.read_text().split())
        except OSError:
            continue  # It went meanwhile.
    return frozenset(found)

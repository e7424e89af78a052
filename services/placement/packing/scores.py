"""Scores of all nodes by workload class, kept up as nodes change: a decision looks at what changed, not at the cluster.

Each class has a tournament over the nodes and remembers how far in the log of changes it has come. When it is asked, it
rates again the nodes that changed since, each once, and replays their matches: O(changes since x log nodes). A new
class, and each one when the policy is told anew or nodes come or go, rates all nodes; uncompiled, equal ones once.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from services.placement.packing import columns
from services.placement.packing import kernels as plain_kernels
from services.placement.packing.columns import Ints
from services.placement.packing.fleet import Ask, Fleet, GpuShape
from services.placement.packing.rating import Policy
from services.placement.packing.rules import ask_of, ints, needs_of, rules_of

CLASSES_MAX: Final = 2048
"""The class that came first is dropped beyond; it is rated anew if it comes again. 16 bytes for each node and class."""
NOBODY: Final = ints([])
NO_ASK: Final = ints([])
"""For kernels that read an ask only where it takes something."""
FIRST_FREE: Final = columns.GPUS + columns.FREE


@dataclass(slots=True, kw_only=True)
class _ClassScores:
    ask: Ints
    needs: list[int]
    """[kind of GPU] units."""
    scores: Ints
    winners: Ints
    seen: int = -1
    """How far in the log of changes."""


class ScoreIndex:
    """Of one fleet under one policy, with the kernels given."""

    def __init__(self, fleet: Fleet, kernels: Any) -> None:
        self._fleet = fleet
        self.kernels = kernels
        self._changes = fleet.watch()
        self._membership = -1
        self._policy: Policy | None = None
        self._classes: dict[tuple[Ask, bool], _ClassScores] = {}
        self._now = 0
        self._known_twins: Ints | None = None

    def choose(
        self, policy: Policy, ask: Ask, without_nodes: Collection[str], *, gpu_spread: bool
    ) -> tuple[str, list[int]] | None:
        """(node, indices of its GPUs) before links are looked at. `policy` is informed already."""
        changed = self._changed(policy)
        entry = self._entry(ask, gpu_spread=gpu_spread)
        n, taken, self._now = self.kernels.choose(
            self._nodes,
            self._rules,
            entry.ask,
            entry.scores,
            entry.winners,
            self._log,
            changed,
            self._twins() if entry.seen < 0 else NOBODY,
            self._slots(without_nodes) if without_nodes else NOBODY,
            len(self._names),
            entry.seen,
            self._now,
        )
        entry.seen = self._now
        return None if n < 0 else (self._names[n], _indices(taken))

    def nth_roomy(self, policy: Policy, ask: Ask, without_nodes: Collection[str], nth: int) -> tuple[int, str]:
        """(how many nodes have room, name of the nth of them). O(nodes)."""
        changed = self._changed(policy)
        entry = self._entry(ask, gpu_spread=False)
        if len(changed):
            self._now = self.kernels.settle(self._nodes, self._rules, entry.ask, self._log, changed, self._now)
        found, n = self.kernels.roomy(self._nodes, entry.ask, self._slots(without_nodes), len(self._names), nth)
        return found, self._names[n]

    def units(self, ask: Ask, node: str, gpus: list[int]) -> tuple[int, ...]:
        needs = self._entry(ask, gpu_spread=False).needs
        kinds = self._kinds_of[self._slot_of[node]]
        return tuple([needs[kinds[gpu]] for gpu in gpus])

    def _slots(self, names: Collection[str]) -> Ints:
        if not names:
            return NOBODY
        return ints(sorted({self._slot_of[name] for name in names if name in self._slot_of}))

    def _changed(self, policy: Policy) -> Ints:
        """Copies what changed into the columns; numbers of nodes whose consequences are still to be drawn."""
        if self._membership != self._fleet.membership_version:
            self._begin()
            self._policy = None
        if policy is not self._policy:
            self._policy = policy
            self._rules = rules_of(policy, self._kinds)
            self._classes.clear()
            self._now = 0
            self._changes.update(dict.fromkeys(self._names))
        if not self._changes:
            return NOBODY
        changed = [self._slot_of[name] for name in self._changes]
        self._changes.clear()
        self._known_twins = None
        nodes = self._nodes
        for n in changed:
            room = self._fleet.nodes[self._names[n]]
            row = nodes[n]
            row[columns.CPU] = room.cpu_milli
            row[columns.MEMORY] = room.memory_bytes
            row[columns.OPEN] = room.is_open
            row[FIRST_FREE :: columns.GPU_WIDTH][: len(room.free_units)] = room.free_units
        if len(changed) < len(self._names):
            return ints(changed)
        self._now = self.kernels.settle_all(nodes, self._rules, NO_ASK, self._log, self._twins(), self._now)
        return NOBODY

    def _twins(self) -> Ints:
        """[node] the first one that is equal in all that matters: uncompiled, rating it once is worth the comparing."""
        if self._known_twins is None:
            count = len(self._names)
            if self.kernels is plain_kernels:
                rows = self._nodes[:, self._told_columns]
                first: dict[bytes, int] = {}
                self._known_twins = ints([first.setdefault(rows[n].tobytes(), n) for n in range(count)])
            else:
                self._known_twins = np.arange(count, dtype=np.int64)
        return self._known_twins

    def _begin(self) -> None:
        """From nothing: nodes came or went."""
        fleet = self._fleet
        self._membership = fleet.membership_version
        self._names = list(fleet.names)
        self._slot_of = {name: n for n, name in enumerate(self._names)}
        kinds: dict[GpuShape, int] = {}
        labels: dict[frozenset[str], int] = {}
        self._kinds_of = [[kinds.setdefault(gpu, len(kinds)) for gpu in room.shape.gpus] for room in fleet]
        of_labels = [labels.setdefault(room.shape.labels, len(labels)) for room in fleet]
        self._kinds = list(kinds)
        self._labels = list(labels)
        count = len(self._names)
        width = max((len(of_node) for of_node in self._kinds_of), default=0)
        log_length = 1 << max(4, count.bit_length() + 1)

        self._nodes = np.zeros((count, columns.GPUS + columns.GPU_WIDTH * width), dtype=np.int64)
        self._log = np.zeros(log_length, dtype=np.int64)
        for n, of_node in enumerate(self._kinds_of):
            self._nodes[n, columns.LABELS] = of_labels[n]
            self._nodes[n, columns.GPU_COUNT] = len(of_node)
            self._nodes[n, columns.GPUS + columns.KIND :: columns.GPU_WIDTH][: len(of_node)] = of_node
        follows = {
            columns.VALUE,
            columns.CHANGED,
            *range(columns.GPUS + columns.PART, self._nodes.shape[1], columns.GPU_WIDTH),
        }
        self._told_columns = [column for column in range(self._nodes.shape[1]) if column not in follows]
        self._known_twins = None
        self._changes.clear()
        self._leaves = 1 << max(1, (count - 1).bit_length())

    def _entry(self, ask: Ask, *, gpu_spread: bool) -> _ClassScores:
        entry = self._classes.get((ask, gpu_spread))
        if entry is None:
            entry = _ClassScores(
                ask=ask_of(ask, self._kinds, self._labels, gpu_spread=gpu_spread),
                needs=needs_of(ask, self._kinds),
                scores=np.full(self._leaves, self.kernels.NONE, dtype=np.int64),
                winners=np.zeros(self._leaves, dtype=np.int64),
            )
            if len(self._classes) >= CLASSES_MAX:
                del self._classes[next(iter(self._classes))]
            self._classes[ask, gpu_spread] = entry
        return entry


def _indices(bits: int) -> list[int]:
    return [gpu for gpu in range(bits.bit_length()) if bits >> gpu & 1]

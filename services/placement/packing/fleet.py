"""What the nodes have left. Units of a GPU are whole numbers: bytes in the service, thousandths in benchmarks."""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

PARTS: Final = 1_000_000
"""A GPU in parts: what policies count in, so that GPUs of different capacity compare. Whole numbers, rounded down."""

CAPACITY_UNITS_MAX: Final = 1 << 42
"""Four TiB in bytes: times `PARTS` it is still a number of 64 bits."""
GPUS_PER_NODE_MAX: Final = 62
"""A node's GPUs are a set of bits in one signed number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShape:
    """One GPU of a node, when nothing is on it."""

    model: str
    capacity_units: int
    grade_rank: int = 0
    """How well it keeps shares apart; smaller is stronger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShape:
    """One node, when nothing is on it."""

    cpu_milli: int
    memory_bytes: int
    gpus: tuple[GpuShape, ...]
    labels: frozenset[str] = frozenset()
    """``key=value``"""
    links: tuple[tuple[int, ...], ...] = ()
    """``links[i][j]``: rank of the link between GPUs i and j, larger is better, symmetric; () where all are alike."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one replica needs. Hashable: equal asks are one workload class.

    Exactly one of `portion` and `size_units` says what each GPU must have, unless `gpu_count` is 0.
    """

    gpu_count: int = 1
    """So many different GPUs of one node, the same part of each."""
    portion: Fraction | None = None
    """Of each GPU's capacity, rounded down to units. 1 is the whole GPU: only one with nothing on it."""
    size_units: int | None = None
    cpu_milli: int = 0
    memory_bytes: int = 0
    gpu_models: frozenset[str] = frozenset()
    """Any of these; empty: any at all."""
    labels: frozenset[str] = frozenset()
    """All of these."""
    grade_rank: int | None = None
    """At least this strong."""

    def __post_init__(self) -> None:
        """Refuse what could not be fitted exactly."""
        if self.gpu_count < 0 or self.cpu_milli < 0 or self.memory_bytes < 0:
            raise ValueError(f"an ask cannot be negative: {self}")
        if self.gpu_count and (self.portion is None) == (self.size_units is None):
            raise ValueError(f"an ask for GPUs names either a portion or a size: {self}")
        if self.portion is not None and not 0 < self.portion <= 1:
            raise ValueError(f"a portion is above 0 and at most 1, not {self.portion}")
        if self.size_units is not None and self.size_units < 0:
            raise ValueError(f"a size cannot be negative: {self.size_units}")

    def units_on(self, gpu: GpuShape) -> int | None:
        """The units that it takes of such a GPU; None where model or grade will not do, or it asks for none."""
        if not self.gpu_count:
            return None
        if self.gpu_models and gpu.model not in self.gpu_models:
            return None
        if self.grade_rank is not None and gpu.grade_rank > self.grade_rank:
            return None
        if self.size_units is not None:
            return self.size_units
        assert self.portion is not None
        return gpu.capacity_units * self.portion.numerator // self.portion.denominator


@dataclass(frozen=True, slots=True)
class Place:
    """Where one replica can go. `units[i]` is what it takes of GPU `gpu_indices[i]`."""

    node: str
    gpu_indices: tuple[int, ...]
    units: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class NodeRoom:
    """What one node has left."""

    name: str
    shape: NodeShape
    is_open: bool = True
    """A closed one keeps what it holds and takes nothing new."""
    cpu_milli: int
    memory_bytes: int
    free_units: list[int]
    """[units by GPU]; below zero where more was promised than there is."""
    foreign_units: list[int] = field(default_factory=list)

    def free_parts(self, gpu: int) -> int:
        """What is left of a GPU in parts of it (`PARTS`), none where it is overcommitted."""
        free = self.free_units[gpu]
        return free * PARTS // self.shape.gpus[gpu].capacity_units if free > 0 else 0


class Fleet:
    """All nodes and what they have left. Changed in place, by its owner's folds or within a `Packer.trial`."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeRoom] = {}
        self.names: list[str] = []
        """Sorted: the order in which equal nodes are taken."""
        self.gpu_count = 0
        self.membership_version = 0
        """Grows with each node that comes or goes."""
        self._watchers: list[dict[str, None]] = []
        self._undo: list[tuple[str, Sequence[int], list[int], int, int]] = []
        self._marks: list[int] = []

    def __iter__(self) -> Iterator[NodeRoom]:
        return (self.nodes[name] for name in self.names)

    def add_node(self, name: str, shape: NodeShape) -> None:
        """Raises `ValueError` for a name that is there already, and for a shape that no node can have."""
        if name in self.nodes:
            raise ValueError(f"node {name} is in the fleet already: remove it first")
        if any(not 0 < gpu.capacity_units <= CAPACITY_UNITS_MAX for gpu in shape.gpus):
            raise ValueError(f"node {name} has a GPU without capacity, or with more than {CAPACITY_UNITS_MAX} units")
        if len(shape.gpus) > GPUS_PER_NODE_MAX:
            raise ValueError(f"node {name} has more than {GPUS_PER_NODE_MAX} GPUs")
        self.nodes[name] = NodeRoom(
            name=name,
            shape=shape,
            cpu_milli=shape.cpu_milli,
            memory_bytes=shape.memory_bytes,
            free_units=[gpu.capacity_units for gpu in shape.gpus],
            foreign_units=[0] * len(shape.gpus),
        )
        insort(self.names, name)
        self.gpu_count += len(shape.gpus)
        self.membership_version += 1
        self._changed(name)

    def remove_node(self, name: str) -> None:
        """With all that it held."""
        self.gpu_count -= len(self.nodes[name].shape.gpus)
        del self.nodes[name]
        del self.names[bisect_left(self.names, name)]
        self.membership_version += 1
        self._changed(name)

    def set_open(self, name: str, is_open: bool) -> None:  # noqa: FBT001  (the function names it)
        self.nodes[name].is_open = is_open
        self._changed(name)

    def take(
        self, node: str, gpu_indices: Sequence[int], ask_units: Sequence[int], cpu_milli: int = 0, memory_bytes: int = 0
    ) -> None:
        """Take so many units of these GPUs, and of the host. More than is free is allowed: it counts below zero."""
        self._move(node, gpu_indices, [-units for units in ask_units], -cpu_milli, -memory_bytes)

    def give(
        self, node: str, gpu_indices: Sequence[int], ask_units: Sequence[int], cpu_milli: int = 0, memory_bytes: int = 0
    ) -> None:
        """Give back what `take` took, in the same words."""
        self._move(node, gpu_indices, list(ask_units), cpu_milli, memory_bytes)

    def set_foreign(self, node: str, gpu_index: int, units: int) -> None:
        """Units used by processes that are not ours count as taken; this replaces what was known of them."""
        room = self.nodes[node]
        room.free_units[gpu_index] += room.foreign_units[gpu_index] - units
        room.foreign_units[gpu_index] = units
        self._changed(node)

    def free_units(self, node: str) -> tuple[int, ...]:
        return tuple(self.nodes[node].free_units)

    def cpu_milli_left(self, node: str) -> int:
        return self.nodes[node].cpu_milli

    def memory_bytes_left(self, node: str) -> int:
        return self.nodes[node].memory_bytes

    def watch(self) -> dict[str, None]:
        """A set, in order, that gets the name of each node that changes, comes or goes. Its reader empties it."""
        watcher = dict.fromkeys(self.names)
        self._watchers.append(watcher)
        return watcher

    def begin_trial(self) -> None:
        """From here on takes and gives can be undone. Trials nest."""
        self._marks.append(len(self._undo))

    def end_trial(self) -> None:
        """Undo the takes and gives since the last `begin_trial`, newest first."""
        mark = self._marks.pop()
        undone = self._undo[mark:]
        del self._undo[mark:]
        for node, gpus, units, cpu_milli, memory_bytes in reversed(undone):
            self._change(node, gpus, [-more for more in units], -cpu_milli, -memory_bytes)

    def _move(self, node: str, gpus: Sequence[int], units: list[int], cpu_milli: int, memory_bytes: int) -> None:
        self._change(node, gpus, units, cpu_milli, memory_bytes)
        if self._marks:
            self._undo.append((node, gpus, units, cpu_milli, memory_bytes))

    def _change(self, node: str, gpus: Sequence[int], units: list[int], cpu_milli: int, memory_bytes: int) -> None:
        room = self.nodes[node]
        for gpu, more in zip(gpus, units, strict=True):
            room.free_units[gpu] += more
        room.cpu_milli += cpu_milli
        room.memory_bytes += memory_bytes
        self._changed(node)

    def _changed(self, name: str) -> None:
        for watcher in self._watchers:
            watcher[name] = None


def unsuited(room: NodeRoom, ask: Ask, without_nodes: Collection[str] = ()) -> bool:
    """Whether all but GPUs rules the node out."""
    return (
        not room.is_open
        or room.cpu_milli < ask.cpu_milli
        or room.memory_bytes < ask.memory_bytes
        or not ask.labels <= room.shape.labels
        or room.name in without_nodes
    )

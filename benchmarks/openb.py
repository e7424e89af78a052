"""The openb protocol (FGD, ATC'23): a cluster and a list of pods from CSV files, and the order in which pods arrive.

As the artefact has it (hkust-adsl/kubernetes-scheduler-simulator, Apache-2.0): pods sorted by name and shuffled with
the seed, then clones of pods drawn with replacement until 130 % of the cluster's GPUs are asked for. Each pod is tried
once; what fits nowhere is dropped; nothing departs.
"""

import csv
import gzip
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.placement.packing.fleet import Ask, Fleet, GpuShape, NodeShape

MILLI: Final = 1000
"""Units of a GPU in these files."""
MIB: Final = 1 << 20
ARRIVALS_PERCENT: Final = 130
NODE_COLUMNS: Final = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
POD_COLUMNS: Final = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")
"""`gpu_spec` is optional: models that will do, separated by ``|``."""


class InputError(Exception):
    """A file that cannot be used, told in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes with GPUs; others are not used."""

    shapes: tuple[tuple[str, NodeShape], ...]
    """(name, shape), by name."""

    @property
    def gpu_milli(self) -> int:
        return sum(gpu.capacity_units for _, shape in self.shapes for gpu in shape.gpus)

    def fleet(self) -> Fleet:
        fleet = Fleet()
        for name, shape in self.shapes:
            fleet.add_node(name, shape)
        return fleet

    def times(self, scale: int) -> "Cluster":
        """Each node so many times, beside its equals in the order of names."""
        if scale == 1:
            return self
        return Cluster(shapes=tuple((f"{name}-{i:03}", shape) for name, shape in self.shapes for i in range(scale)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PodList:
    """Pods in the order of their names, and what it is called."""

    name: str
    asks: tuple[Ask, ...]

    @property
    def classes(self) -> Counter[Ask]:
        return Counter(self.asks)

    def arrivals(self, seed: int, cluster_gpu_milli: int) -> list[Ask]:
        """Until `ARRIVALS_PERCENT` of the cluster's GPUs are asked for: clones are added or pods removed at random."""
        rng = random.Random(seed)
        order = list(range(len(self.asks)))
        rng.shuffle(order)
        asked = [gpu_milli_of(ask) for ask in self.asks]
        total, target = sum(asked), ARRIVALS_PERCENT * cluster_gpu_milli // 100
        if not total:
            raise InputError(f"no pod of '{self.name}' asks for a GPU, so there is nothing to pack")
        if total > target:
            while total > target:
                total -= asked[order.pop(rng.randrange(len(order)))]
            return [self.asks[pod] for pod in order]
        while total < target:
            pod = rng.randrange(len(self.asks))
            order.append(pod)
            total += asked[pod]
        return [self.asks[pod] for pod in order]


def gpu_milli_of(ask: Ask) -> int:
    return ask.gpu_count * (ask.size_units or 0)


def read_cluster(path: Path) -> Cluster:
    """Raises `InputError`."""
    shapes = []
    for row in _rows(path, NODE_COLUMNS):
        gpu = GpuShape(model=row["model"], capacity_units=MILLI)
        count = row.number("gpu")
        if count:
            shape = NodeShape(
                cpu_milli=row.number("cpu_milli"), memory_bytes=row.number("memory_mib") * MIB, gpus=(gpu,) * count
            )
            shapes.append((row["sn"], shape))
    if not shapes:
        raise InputError(f"{path}: no node in it has a GPU")
    names = Counter(name for name, _ in shapes)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"{path}: node '{twice[0]}' is in it more than once")
    return Cluster(shapes=tuple(sorted(shapes, key=lambda entry: entry[0])))


def read_pods(path: Path) -> PodList:
    """Raises `InputError`."""
    pods = sorted(((row["name"], _ask(row)) for row in _rows(path, POD_COLUMNS)), key=lambda pod: pod[0])
    if not pods:
        raise InputError(f"{path}: no pods in it")
    # Equal pods share one object: they are one class.
    shared: dict[Ask, Ask] = {}
    return PodList(name=list_name(path), asks=tuple(shared.setdefault(ask, ask) for _, ask in pods))


def list_name(path: Path) -> str:
    """``default`` of ``openb_pod_list_default.csv.gz``."""
    name = path.name
    for suffix in (".gz", ".csv"):
        name = name.removesuffix(suffix)
    return name.removeprefix("openb_pod_list_")


class _Row:
    """One line, with its place for errors."""

    def __init__(self, path: Path, line: int, values: dict[str, str | None]) -> None:
        self.path, self.line, self._values = path, line, values

    def __getitem__(self, column: str) -> str:
        return (self._values.get(column) or "").strip()

    def number(self, column: str) -> int:
        """A whole number of 0 or more; empty is 0."""
        text = self[column] or "0"
        try:
            value = int(text)
        except ValueError:
            value = -1
        if value < 0:
            raise InputError(f"{self.path}:{self.line}: {column} must be a whole number of 0 or more, not '{text}'")
        return value


def _ask(row: _Row) -> Ask:
    count, milli = row.number("num_gpu"), row.number("gpu_milli")
    if count and not 0 < milli <= MILLI:
        raise InputError(f"{row.path}:{row.line}: gpu_milli must be from 1 to {MILLI} for a pod with GPUs, not {milli}")
    return Ask(
        gpu_count=count,
        size_units=milli if count else None,
        cpu_milli=row.number("cpu_milli"),
        memory_bytes=row.number("memory_mib") * MIB,
        gpu_models=frozenset(model for model in row["gpu_spec"].split("|") if model) if count else frozenset(),
    )


def _rows(path: Path, needed: Sequence[str]) -> Iterable[_Row]:
    """Of a plain or gzipped CSV file with a header."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else "it is neither CSV nor gzipped CSV"
        )
        raise InputError(f"{path} cannot be read: {reason}") from error
    reader = csv.DictReader(text.splitlines())
    try:
        missing = [column for column in needed if column not in (reader.fieldnames or ())]
        rows = [_Row(path, line, row) for line, row in enumerate(reader, start=2)]
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(needed)}")
    return rows

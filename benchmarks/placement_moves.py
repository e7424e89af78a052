"""Moves after a failed arrival, for `--migrate K`: up to K running pods go elsewhere, so that the arrival finds room.

A plan is searched before anything moves: the arrival takes the place of a few smaller pods, which go where the policy
puts them, or take the place of still smaller ones in turn, K moves in all. Pods that are cheapest to move come first:
few, then small. Pods without GPUs move to make room for CPU; an arrival without GPUs moves nobody.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Final

from benchmarks.placement_run import Held
from services.placement.packing.fleet import Ask, NodeRoom, Place
from services.placement.packing.index import Packer

Gpu = tuple[str, int]
Look = tuple[int, tuple[int, ...]]
"""(free units, units of each pod on it, ascending): GPUs that look alike are tried once or twice, not each."""

TRIED_MAX: Final = 24
"""So many targets are tried for an arrival."""
TRIED_IN_TURN_MAX: Final = 6
"""And for each pod that has to go."""
TRIED_IN_ALL_MAX: Final = 100
"""And for both together."""
ALIKE_MAX: Final = 2
LOOKED_AT_MAX: Final = 16
"""So many GPUs that look alike are asked for CPU and memory."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A place for an ask, once these pods have left it."""

    place: Place
    movers: tuple[int, ...]
    price: tuple[int, int]


class Moves:
    """A `placement_run.Mover` of one run."""

    def __init__(self, move_count_max: int) -> None:
        self.move_count_max = move_count_max
        self._known_count = 0
        self._on_gpu: dict[Gpu, list[int]] = {}
        self._on_host: dict[str, list[int]] = {}
        """{node: its pods without GPUs}"""
        self._alike: dict[Look, dict[Gpu, None]] = {}
        self._look_of: dict[Gpu, Look] = {}
        self._hopeless: set[Ask] = set()
        """For whom no plan was found since anything changed."""
        self._steps: list[tuple[int, Place]] = []
        self._tried_count = 0
        self._busy: set[int] = set()

    def __call__(self, packer: Packer, ask: Ask, held: list[Held]) -> tuple[Place | None, int]:
        self._packer, self._fleet, self._held = packer, packer.fleet, held
        self._learn()
        if not ask.gpu_count or ask in self._hopeless:
            return None, 0
        self._steps.clear()
        self._busy.clear()
        self._tried_count = 0
        place = self._room_for(ask, TRIED_MAX)
        if place is None:
            self._hopeless.add(ask)
            return None, 0
        for pod, target in self._steps:
            self._moved(pod, target)
        return place, len(self._steps)

    # ---- the search; the fleet is changed on the way, and as before where nothing was found ----

    def _room_for(self, ask: Ask, tried_max: int) -> Place | None:
        """A place that is free now, after the moves in `_steps`."""
        place = self._packer.choose(ask)
        left = self.move_count_max - len(self._busy)
        if place is not None or not left:
            return place
        targets = sorted(self._targets(ask, left), key=lambda t: (t.price, t.place.node, t.place.gpu_indices))
        for target in targets[:tried_max]:
            self._tried_count += 1
            if self._tried_count > TRIED_IN_ALL_MAX:
                break
            if self._cleared(target, ask):
                return target.place
        return None

    def _cleared(self, target: _Target, ask: Ask) -> bool:
        """Whether all who have to leave find another place; if so, the target is free."""
        began = len(self._steps)
        self._busy.update(target.movers)
        for pod in target.movers:
            self._give(self._held[pod])
        self._take(Held(ask, target.place))
        for pod in target.movers:
            mover = self._held[pod].ask
            place = self._room_for(mover, TRIED_IN_TURN_MAX)
            if place is None:
                break
            self._take(Held(mover, place))
            self._steps.append((pod, place))
        else:
            self._give(Held(ask, target.place))
            return True
        for pod, place in reversed(self._steps[began:]):
            self._give(Held(self._held[pod].ask, place))
            if pod not in target.movers:
                self._take(self._held[pod])
                self._busy.discard(pod)
        del self._steps[began:]
        self._give(Held(ask, target.place))
        for pod in target.movers:
            self._take(self._held[pod])
        self._busy.difference_update(target.movers)
        return False

    def _targets(self, ask: Ask, left: int) -> Iterator[_Target]:
        if ask.gpu_count > 1:
            for room in self._fleet:
                yield from self._whole(ask, room, left)
            return
        for (free, sizes), gpus in self._alike.items():
            units = ask.size_units or 0
            subset = _cheapest(sizes, units - free, units, left)
            if subset is None:
                continue
            found = 0
            for node, index in list(gpus)[:LOOKED_AT_MAX]:
                target = self._on_one(ask, node, index, subset, left)
                if target is not None:
                    yield target
                    found += 1
                    if found == ALIKE_MAX:
                        break

    def _on_one(self, ask: Ask, node: str, index: int, subset: tuple[int, ...], left: int) -> _Target | None:
        room = self._fleet.nodes[node]
        units = ask.units_on(room.shape.gpus[index])
        if units is None:
            return None
        movers: list[int] = []
        on_gpu = sorted(self._on_gpu.get((node, index), ()), key=lambda pod: (-self._held[pod].ask.cpu_milli, pod))
        for size in subset:
            pod = next((p for p in on_gpu if p not in movers and self._units(p, index, node) == size), None)
            if pod is None or pod in self._busy:
                return None
            movers.append(pod)
        freed = sum(self._units(pod, index, node) for pod in movers)
        if room.free_units[index] + freed < units:
            return None  # Changed by moves that are planned already.
        return self._with_host(ask, room, Place(node, (index,), (units,)), movers, left)

    def _whole(self, ask: Ask, room: NodeRoom, left: int) -> Iterator[_Target]:
        """The GPUs of the node with the fewest pods."""
        usable = []
        for index, gpu in enumerate(room.shape.gpus):
            units = ask.units_on(gpu)
            if units is not None:
                pods = [] if room.free_units[index] >= units else self._on_gpu.get((room.name, index), [])
                gone = sum(self._units(pod, index, room.name) for pod in pods)
                alone = all(self._held[pod].ask.gpu_count == 1 and pod not in self._busy for pod in pods)
                if (
                    alone
                    and room.free_units[index] + gone >= units
                    and not any(self._units(pod, index, room.name) >= units for pod in pods)
                ):
                    usable.append((len(pods), gone, index, pods, units))
        usable.sort(key=lambda entry: entry[:3])
        chosen = usable[: ask.gpu_count]
        movers = [pod for *_, pods, _ in chosen for pod in pods]
        if len(chosen) < ask.gpu_count or len(movers) > left:
            return
        chosen.sort(key=lambda entry: entry[2])
        place = Place(room.name, tuple(entry[2] for entry in chosen), tuple(entry[4] for entry in chosen))
        target = self._with_host(ask, room, place, movers, left)
        if target is not None:
            yield target

    def _with_host(self, ask: Ask, room: NodeRoom, place: Place, movers: list[int], left: int) -> _Target | None:
        """With one more who leaves for its CPU, where that is what is missing."""
        cpu = room.cpu_milli + sum(self._held[pod].ask.cpu_milli for pod in movers) - ask.cpu_milli
        memory = room.memory_bytes + sum(self._held[pod].ask.memory_bytes for pod in movers) - ask.memory_bytes
        if cpu < 0 or memory < 0:
            helping = [
                pod
                for pod in self._on_host.get(room.name, ())
                if pod not in self._busy
                and self._held[pod].ask.cpu_milli >= -cpu
                and self._held[pod].ask.memory_bytes >= -memory
            ]
            if not helping:
                return None
            movers = [*movers, min(helping, key=lambda pod: (self._held[pod].ask.cpu_milli, pod))]
        if not movers or len(movers) > left:
            return None
        moved_units = sum(sum(self._held[pod].place.units) for pod in movers)
        return _Target(place, tuple(movers), (len(movers), moved_units))

    # ---- what is where ----

    def _learn(self) -> None:
        """Of pods that came since; at first, of all GPUs."""
        if not self._look_of:
            for room in self._fleet:
                for index in range(len(room.shape.gpus)):
                    self._see((room.name, index))
        for pod in range(self._known_count, len(self._held)):
            self._arrived(pod)
        if self._known_count < len(self._held):
            self._hopeless.clear()
        self._known_count = len(self._held)

    def _moved(self, pod: int, place: Place) -> None:
        old = self._held[pod]
        for index in old.place.gpu_indices:
            self._on_gpu[old.place.node, index].remove(pod)
            self._see((old.place.node, index))
        if not old.place.gpu_indices:
            self._on_host[old.place.node].remove(pod)
        self._held[pod] = Held(old.ask, place)
        self._arrived(pod)

    def _arrived(self, pod: int) -> None:
        place = self._held[pod].place
        for index in place.gpu_indices:
            self._on_gpu.setdefault((place.node, index), []).append(pod)
            self._see((place.node, index))
        if not place.gpu_indices:
            self._on_host.setdefault(place.node, []).append(pod)

    def _see(self, gpu: Gpu) -> None:
        node, index = gpu
        before = self._look_of.get(gpu)
        if before is not None:
            del self._alike[before][gpu]
            if not self._alike[before]:
                del self._alike[before]
        sizes = tuple(sorted(self._units(pod, index, node) for pod in self._on_gpu.get(gpu, ())))
        look = (self._fleet.nodes[node].shape.gpus[index].capacity_units - sum(sizes), sizes)
        self._look_of[gpu] = look
        self._alike.setdefault(look, {})[gpu] = None

    def _units(self, pod: int, index: int, node: str) -> int:
        place = self._held[pod].place
        return place.units[place.gpu_indices.index(index)]

    def _take(self, held: Held) -> None:
        place, ask = held.place, held.ask
        self._fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)

    def _give(self, held: Held) -> None:
        place, ask = held.place, held.ask
        self._fleet.give(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)


@lru_cache(maxsize=1 << 16)
def _cheapest(sizes: tuple[int, ...], missing: int, below: int, count_max: int) -> tuple[int, ...] | None:
    """The fewest, then smallest of these sizes that give so many units; all smaller than the ask; () for none."""
    if missing <= 0:
        return ()
    smaller = [size for size in sizes if size < below]
    for count in range(1, min(count_max, len(smaller)) + 1):
        enough = [some for some in combinations(smaller, count) if sum(some) >= missing]
        if enough:
            return min(enough, key=lambda some: (sum(some), some))
    return None

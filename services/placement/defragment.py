"""Which moves turn whole GPUs free, or let a waiting ask in.

Pure, over one `Packer` and what is where. The search is bounded: it looks at the GPUs that are used least, and asks the
packer where their occupants would go if they came anew, so that a move is not undone by the next placement. A move
takes its target while it still holds its source: every target has room beside all that is there now.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

from services.placement.packing.fleet import Ask, Fleet, NodeRoom, Place, unsuited
from services.placement.packing.index import Packer

Gpu = tuple[str, int]
"""(node, index of the GPU)"""

LOOKED_AT_MAX: Final = 16
"""So many GPUs (or nodes) are tried in each round; those that are used least come first."""
RETRIES_MAX: Final = 8
"""So many targets that would not help are blocked for one occupant before it is taken to be stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """One replica as the search sees it."""

    replica_id: str
    node: str
    gpu_indices: tuple[int, ...]
    units: tuple[int, ...]
    """What it holds of each of these GPUs."""
    ask: Ask
    """What it would ask for elsewhere."""
    is_movable: bool = True
    is_leaving: bool = False
    """It ends, or is being moved away already: what it holds will be free, and is not yet."""
    is_serving: bool = False
    """It has requests, or nobody knows that it has none: moved only if nothing else helps."""
    moved_bytes: int = 0
    """What has to be loaded at the target."""
    park_bytes: int = 0
    """Host memory that it may need while it is parked, at the target and, until it is gone, at the source."""
    without_nodes: frozenset[str] = frozenset()
    """Where it may not go."""

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return tuple((self.node, index) for index in self.gpu_indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One move."""

    occupant: Occupant
    place: Place

    @property
    def targets(self) -> tuple[Gpu, ...]:
        return tuple((self.place.node, index) for index in self.place.gpu_indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Moves that can all begin at once, and the GPUs that are empty when all are done."""

    steps: tuple[Step, ...] = ()
    freed: tuple[Gpu, ...] = ()

    @property
    def nodes(self) -> frozenset[str]:
        """All that it changes."""
        return frozenset(node for step in self.steps for node in (step.occupant.node, step.place.node))

    @property
    def moved_bytes(self) -> int:
        return sum(step.occupant.moved_bytes for step in self.steps)

    @property
    def serving_count(self) -> int:
        return sum(step.occupant.is_serving for step in self.steps)


@dataclass(slots=True)
class Board:
    """What is where, while moves are being tried on it."""

    packer: Packer
    on_gpu: Mapping[Gpu, Sequence[Occupant]]
    """{GPU: who holds a part of it}; a GPU that nobody holds a part of is idle."""
    park_room: Mapping[str, int]
    """{node: bytes of its budget for parked weights that nobody may need}; a node that is not named has none."""
    park_taken: dict[str, int] = field(default_factory=dict)
    moved: dict[str, Step] = field(default_factory=dict)
    """{replica_id: its move}, in the order in which they were decided."""
    targets: set[Gpu] = field(default_factory=set)

    @property
    def fleet(self) -> Fleet:
        return self.packer.fleet

    @property
    def leaving(self) -> list[Occupant]:
        """Those that are on their way out already."""
        found = {o.replica_id: o for occupants in self.on_gpu.values() for o in occupants if o.is_leaving}
        return [found[replica_id] for replica_id in sorted(found)]

    def is_gone(self, occupant: Occupant) -> bool:
        """Once all moves are done."""
        return occupant.is_leaving or occupant.replica_id in self.moved

    @contextmanager
    def trial(self) -> Iterator[None]:
        """What is tried inside is undone at the end."""
        before = dict(self.park_taken), dict(self.moved), set(self.targets)
        try:
            with self.packer.trial():
                yield
        finally:
            self.park_taken, self.moved, self.targets = before

    def block(self, gpu: Gpu) -> None:
        """Take what is free there, so that nothing is put there."""
        node, index = gpu
        free = self.fleet.nodes[node].free_units[index]
        if free > 0:
            self.fleet.take(node, (index,), (free,))

    def is_idle(self, gpu: Gpu) -> bool:
        return gpu not in self.on_gpu and gpu not in self.targets

    def move(self, occupant: Occupant, *, may_break_idle: bool) -> bool:
        """Find it a place beside all that is there, and take it; False when there is none that helps."""
        without = {*occupant.without_nodes}
        for _ in range(RETRIES_MAX):
            place = self.packer.choose(occupant.ask, without_nodes=without)
            if place is None:
                return False
            if not self._has_park_room(place.node, occupant):
                without.add(place.node)
                continue
            idle = [(place.node, index) for index in place.gpu_indices if self.is_idle((place.node, index))]
            if idle and not may_break_idle:
                self.block(idle[0])
                continue
            self.take(occupant, place)
            return True
        return False

    def _has_park_room(self, node: str, occupant: Occupant) -> bool:
        left_bytes = self.park_room.get(node, 0) - self.park_taken.get(node, 0)
        return occupant.park_bytes <= left_bytes or not occupant.park_bytes

    def take(self, occupant: Occupant, place: Place) -> None:
        ask = occupant.ask
        self.fleet.take(place.node, place.gpu_indices, place.units, ask.cpu_milli, ask.memory_bytes)
        self.park_taken[place.node] = self.park_taken.get(place.node, 0) + occupant.park_bytes
        step = Step(occupant=occupant, place=place)
        self.moved[occupant.replica_id] = step
        self.targets.update(step.targets)


# --- Whole GPUs -------------------------------------------------------------------------------------------------------


def free_gpus(board: Board, *, move_count_max: int, may_move_serving: bool = True) -> Plan:
    """The moves that free most GPUs for the bytes that they move, within the budget.

    Greedy: in each round the cheapest GPU to empty, those without serving replicas first, then those that make a whole
    node idle, then the GPU on the node with fewest used GPUs; ties by name. O(rounds x `LOOKED_AT_MAX`) choices.
    """
    steps: list[Step] = []
    freed: list[Gpu] = []
    with board.trial():
        for gpu in sorted({gpu for occupant in board.leaving for gpu in occupant.gpus}):
            board.block(gpu)
        used = _used_least(board, may_move_serving=may_move_serving)
        tried: dict[Gpu, Plan | None] = {}
        while len(steps) < move_count_max:
            candidates = _still_used(board, used, freed)
            for gpu in candidates:
                if gpu not in tried:
                    tried[gpu] = _emptied(board, gpu, move_count_max=move_count_max)
            found = [plan for gpu in candidates if (plan := tried[gpu]) is not None]
            found = [plan for plan in found if len(plan.steps) <= move_count_max - len(steps)]
            if not found:
                break
            best = min(found, key=lambda plan: _price(board, plan, freed))
            _repeat(board, best)
            steps += best.steps
            freed += best.freed
            # What was found for others holds where nothing has changed; what had no room has none now.
            tried = {gpu: plan for gpu, plan in tried.items() if plan is None or not plan.nodes & best.nodes}
    return Plan(steps=tuple(steps), freed=tuple(freed))


def _used_least(board: Board, *, may_move_serving: bool) -> list[Gpu]:
    """GPUs whose occupants may all be moved, the least used part of a GPU first."""
    found = []
    for gpu, occupants in board.on_gpu.items():
        staying = [occupant for occupant in occupants if not occupant.is_leaving]
        if not all(o.is_movable and (may_move_serving or not o.is_serving) for o in staying):
            continue
        node, index = gpu
        room = board.fleet.nodes.get(node)
        if room is None or room.foreign_units[index]:
            continue  # Memory of others would stay: the GPU would not be whole.
        capacity = room.shape.gpus[index].capacity_units
        held = [_held(occupant, gpu) for occupant in occupants]
        if max(held) < capacity:  # One that fills a GPU would fill another: nothing is won.
            found.append((Fraction(sum(held), capacity), gpu))
    return [gpu for _, gpu in sorted(found)]


def _still_used(board: Board, used: Sequence[Gpu], freed: Sequence[Gpu]) -> list[Gpu]:
    gone = {*freed, *board.targets}
    return [gpu for gpu in used if gpu not in gone][:LOOKED_AT_MAX]


def _emptied(board: Board, gpu: Gpu, *, move_count_max: int) -> Plan | None:
    """Moves after which this GPU is empty; with replicas on several GPUs others may be too."""
    movers = [occupant for occupant in board.on_gpu[gpu] if not board.is_gone(occupant)]
    if not movers or len(movers) > move_count_max:
        return None
    with board.trial():
        before_count = len(board.moved)
        for left in sorted({each for mover in movers for each in mover.gpus}):
            board.block(left)
        movers.sort(key=lambda o: (-max(o.units), o.replica_id))
        if not all(board.move(mover, may_break_idle=False) for mover in movers):
            return None
        steps = tuple(board.moved.values())[before_count:]
        touched = {each for step in steps for each in step.occupant.gpus}
        emptied = [each for each in sorted(touched) if _is_empty(board, each)]
        return Plan(steps=steps, freed=tuple(emptied))


def _is_empty(board: Board, gpu: Gpu) -> bool:
    return gpu not in board.targets and all(board.is_gone(occupant) for occupant in board.on_gpu.get(gpu, ()))


def _price(board: Board, plan: Plan, freed: Sequence[Gpu]) -> tuple[int, Fraction, bool, int, Gpu]:
    empty = {*freed, *plan.freed}
    used_counts = [
        sum((node, index) in board.on_gpu and (node, index) not in empty for index in range(_gpu_count(board, node)))
        for node, _ in plan.freed
    ]
    per_gpu = Fraction(plan.moved_bytes, len(plan.freed))
    return plan.serving_count, per_gpu, 0 not in used_counts, min(used_counts), plan.freed[0]


def _gpu_count(board: Board, node: str) -> int:
    return len(board.fleet.nodes[node].shape.gpus)


def _repeat(board: Board, plan: Plan) -> None:
    """Carry out on the board what was tried."""
    for gpu in sorted({each for step in plan.steps for each in step.occupant.gpus}):
        board.block(gpu)
    for step in plan.steps:
        board.take(step.occupant, step.place)


# --- GPUs that are to be empty ----------------------------------------------------------------------------------------


def empty_gpus(board: Board, gpus: Iterable[Gpu]) -> Plan:
    """Moves of all that may be moved off these GPUs, wherever there is room: who must stay keeps nobody else there.

    Who serves comes last, then the largest first. O(occupants) choices.
    """
    leaving = set(gpus)
    with board.trial():
        for gpu in sorted(leaving | {gpu for occupant in board.leaving for gpu in occupant.gpus}):
            board.block(gpu)
        found = {o.replica_id: o for gpu in leaving for o in board.on_gpu.get(gpu, ())}
        movers = [o for o in found.values() if o.is_movable and not o.is_leaving]
        movers.sort(key=lambda o: (o.is_serving, -max(o.units), o.replica_id))
        for mover in movers:
            board.move(mover, may_break_idle=True)
        freed = tuple(gpu for gpu in sorted(leaving & board.on_gpu.keys()) if _is_empty(board, gpu))
        return Plan(steps=tuple(board.moved.values()), freed=freed)


# --- Room for one that waits ------------------------------------------------------------------------------------------


def make_room(
    board: Board, ask: Ask, *, move_count_max: int, without_nodes: frozenset[str] = frozenset()
) -> Plan | None:
    """The cheapest moves after which the packer finds a place for this ask; None where no few moves help.

    A plan without steps says that moves which have begun already will do.
    On each node the GPUs that are cheapest to clear for their part of the ask are added up; the cheapest nodes are
    tried, serving replicas last, then fewest bytes, ties by name.
    """
    if not ask.gpu_count:
        return None
    offers = []
    for room in board.fleet:
        offer = None if unsuited(room, ask, without_nodes) else _offer(board, room, ask)
        if offer is None:
            continue
        if not offer.movers and any(o.is_leaving for gpu in offer.gpus for o in board.on_gpu.get(gpu, ())):
            return Plan()
        if 0 < len(offer.movers) <= move_count_max:
            offers.append(offer)
    offers.sort(key=lambda offer: (*offer.price, offer.gpus))
    for offer in offers[:LOOKED_AT_MAX]:
        plan = _cleared(board, offer, ask, without_nodes)
        if plan is not None:
            return plan
    return None


@dataclass(frozen=True, slots=True)
class _Offer:
    """GPUs of one node that would do, and who would have to leave them."""

    gpus: tuple[Gpu, ...]
    movers: tuple[Occupant, ...]

    @property
    def price(self) -> tuple[int, int]:
        return sum(mover.is_serving for mover in self.movers), sum(mover.moved_bytes for mover in self.movers)


def _offer(board: Board, room: NodeRoom, ask: Ask) -> _Offer | None:
    """This node's GPUs that are cheapest to clear; None where the ask can have no place."""
    offers = []
    for index, gpu in enumerate(room.shape.gpus):
        units = ask.units_on(gpu)
        if units is None:
            continue
        leaving = _clearing(board, (room.name, index), units - room.free_units[index])
        if leaving is not None:
            offers.append(_Offer(((room.name, index),), tuple(leaving)))
    if len(offers) < ask.gpu_count:
        return None
    offers.sort(key=lambda offer: (*offer.price, offer.gpus))
    chosen = offers[: ask.gpu_count]
    movers_by_id = {mover.replica_id: mover for offer in chosen for mover in offer.movers}
    movers = tuple(movers_by_id[replica_id] for replica_id in sorted(movers_by_id))
    return _Offer(tuple(gpu for offer in chosen for gpu in offer.gpus), movers)


def _clearing(board: Board, gpu: Gpu, missing_units: int) -> list[Occupant] | None:
    """The fewest of the cheapest movable ones that give so many units of this GPU; None when all do not."""
    chosen: list[Occupant] = []
    here = board.on_gpu.get(gpu, ())
    missing_units -= sum(_held(occupant, gpu) for occupant in here if occupant.is_leaving)
    if missing_units <= 0:
        return chosen
    movable = [occupant for occupant in here if occupant.is_movable and not occupant.is_leaving]
    movable.sort(key=lambda o: (o.is_serving, o.moved_bytes, -_held(o, gpu), o.replica_id))
    for occupant in movable:
        if missing_units > 0:
            chosen.append(occupant)
            missing_units -= _held(occupant, gpu)
    if missing_units > 0:
        return None
    for occupant in list(chosen):
        if missing_units + _held(occupant, gpu) <= 0:
            chosen.remove(occupant)
            missing_units += _held(occupant, gpu)
    return chosen


def _held(occupant: Occupant, gpu: Gpu) -> int:
    return sum(units for each, units in zip(occupant.gpus, occupant.units, strict=True) if each == gpu)


def _cleared(board: Board, offer: _Offer, ask: Ask, without_nodes: frozenset[str]) -> Plan | None:
    """The moves, if all find a place and the ask then does."""
    movers = offer.movers
    with board.trial():
        before_count = len(board.moved)
        with board.packer.trial():
            sources = [each for occupant in (*movers, *board.leaving) for each in occupant.gpus]
            for gpu in sorted({*offer.gpus, *sources}):
                board.block(gpu)
            for mover in sorted(movers, key=lambda o: (-max(o.units), o.replica_id)):
                if not board.move(mover, may_break_idle=True):
                    return None
            steps = tuple(board.moved.values())[before_count:]
        for step in steps:  # Without the blocks, and with the sources free: as it is when all moves are done.
            mover, place = step.occupant, step.place
            board.fleet.take(place.node, place.gpu_indices, place.units, mover.ask.cpu_milli, mover.ask.memory_bytes)
        for gone in (*movers, *board.leaving):
            board.fleet.give(gone.node, gone.gpu_indices, gone.units, gone.ask.cpu_milli, gone.ask.memory_bytes)
        if board.packer.choose(ask, without_nodes=without_nodes) is None:
            return None
        emptied = sorted({each for mover in movers for each in mover.gpus if _is_empty(board, each)})
        return Plan(steps=steps, freed=tuple(emptied))

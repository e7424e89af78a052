"""Places for one class of newcomers, least harm first, without working out those that cannot be the first."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

from services.placement.harm import Harm, Relief

LEAST_BOUND: Final = (-1, -1, 0, 0, 0, 0.0, ())
"""Of a place that may only have to be waited for."""
MINUS_BYTES: Final = -(1 << 62)
Bounding = tuple[int, int, bool, float, str]
"""(priority, bytes on this GPU, is parkable, when its work began, replica or gang) of one who may go"""
Bound = tuple[int, int, int, int, int, float, tuple[str, ...]]
"""A harm, field by field, or less than the harm that a place turns out to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What was decided since the state was folded."""

    gpus: AbstractSet[str] = frozenset()
    """Nothing more is decided about these. Within one turn there are only ever more of them."""
    turn: object = field(default_factory=object)
    """The same one for questions of one turn."""


@dataclass(slots=True)
class Ranking:
    """The places for one class of newcomers, least harm first."""

    dirty: dict[str, None]
    """Places to look at anew: GPUs, or nodes for those that span several."""
    versions: dict[str, int] = field(default_factory=dict)
    """{place: version of its entry}; a place without one is none"""
    heap: list[tuple[Bound, tuple[str, ...], str, int, Relief | None]] = field(default_factory=list)
    """(its harm, its GPUs, place, version, the relief); of one that was not worked out yet, at most the harm it is"""
    ripening: list[tuple[float, str]] = field(default_factory=list)
    """(when somebody there has run for his minimum, place)"""
    version: int = 0
    aside: list[tuple[Bound, tuple[str, ...], str, int, Relief | None]] = field(default_factory=list)
    """Entries of places that are spoken for in the turn at hand, so that they are passed over once and not each time"""
    turn: object = None

    def put(self, place: str, bound: Bound | None, relief: Relief | None = None) -> None:
        """`relief`: None while only a bound is known; without a bound the place is none."""
        if bound is None:
            self.versions.pop(place, None)
            return
        self.version += 1
        self.versions[place] = self.version
        heappush(self.heap, (bound, relief.gpu_uuids if relief is not None else (), place, self.version, relief))

    def least(
        self, work_out: Callable[[str], Relief | None], accept: Callable[[str, Relief], bool], taken: Taken
    ) -> Relief | None:
        """The least harmful one that is accepted. Those that are not are kept for others.

        Bounds never exceed the harm, so that what comes first with its relief worked out is the least there is.
        """
        if self.turn is not taken.turn:
            for top in self.aside:
                heappush(self.heap, top)
            self.aside, self.turn = [], taken.turn
        passed = []
        found = None
        while self.heap and found is None:
            top = heappop(self.heap)
            _, _, place, version, relief = top
            if self.versions.get(place) != version:
                continue
            if relief is None:
                relief = work_out(place)
                self.put(place, None if relief is None else bound_of(relief.harm), relief)
                continue
            if not taken.gpus.isdisjoint(relief.gpu_uuids):
                self.aside.append(top)
                continue
            passed.append(top)
            if accept(place, relief):
                found = relief
        for top in passed:
            heappush(self.heap, top)
        return found


def bound_of(harm: Harm) -> Bound:
    return (
        harm.priority,
        harm.rank,
        harm.unparkable_count,
        harm.ended_count,
        harm.excess_bytes,
        harm.began_s,
        harm.holders,
    )


def bound_beside(allowed: Sequence[Bounding], missing_bytes: int, best_rank: int) -> Bound | None:
    """Of those who may go: what is missing decides how many must."""
    if len(allowed) == 1:
        ((priority, size_bytes, is_parkable, began_s, holder),) = allowed
        if size_bytes < missing_bytes:
            return None
        excess_bytes = size_bytes - max(0, missing_bytes)
        return (priority, best_rank, int(not is_parkable), 1, excess_bytes, -began_s, (holder,))
    freed_bytes = priority = 0
    for each in sorted(allowed):
        priority = each[0]
        freed_bytes += each[1]
        if freed_bytes >= missing_bytes:
            break
    else:
        return None
    pool = [each for each in allowed if each[0] <= priority]
    parked_bytes = sum(each[1] for each in pool if each[2])
    freed_bytes = count = 0
    for size_bytes in sorted((each[1] for each in pool), reverse=True):
        freed_bytes += size_bytes
        count += 1
        if freed_bytes >= missing_bytes:
            break
    youngest = sorted((each[3] for each in pool), reverse=True)[:count]
    first = min(each[4] for each in pool)
    return (priority, best_rank, int(parked_bytes < missing_bytes), count, 0, -sum(sorted(youngest)), (first,))

"""The least harm that makes room in one place: which of those who stand there go, and what that costs them.

Pure arithmetic over numbers that `occupancy` reads from the state. A place is one GPU, or all GPUs of one node for a
newcomer that spans several.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

SETS_TRIED_MAX: Final = 4096
"""Sets of candidates that are compared on one GPU; where there are more, they are taken greedily and none in vain.

Twelve candidates have so many subsets; the sets that matter have one to three members.
"""


@dataclass(frozen=True, slots=True)
class Stand:
    """One replica on one GPU, as far as room is concerned."""

    holder: str
    """Its id, or its gang's."""
    request_bytes: int
    residue_bytes: int
    """What it keeps while it is parked; its whole request where it never parks."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who may be displaced, as a whole: one replica, or all of a gang."""

    holder: str
    replica_ids: tuple[str, ...]
    """Those that end."""
    tenant: str
    priority: int
    rank: int
    """How far its tenant is over its part, 0 for the one that is over most."""
    is_parkable: bool
    """All of it."""
    began_s: float
    """When its work began, summed over `replica_ids`: the larger, the less is lost."""
    freed_bytes: int
    """On all GPUs."""


@dataclass(frozen=True, slots=True)
class GpuRoom:
    """One GPU and who will still stand there when those who are leaving have left."""

    gpu_uuid: str
    allocatable_bytes: int
    claimed_bytes: int
    """For newcomers whose room is being made."""
    stands: tuple[Stand, ...]
    has_leaving: bool
    """Somebody is on his way out: room that is wanted may only have to be waited for."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the newcomer takes of one GPU."""

    request_bytes: int
    residue_bytes: int | None
    """None: it never parks."""


@dataclass(frozen=True, slots=True, order=True)
class Harm:
    """How much harm a set of victims is; compared field by field, the smaller the better."""

    priority: int
    """The highest among them."""
    rank: int
    """Of the tenant among them that is least over its part."""
    unparkable_count: int
    ended_count: int
    excess_bytes: int
    """Freed beyond what is missing."""
    began_s: float
    """Negative: the youngest work first."""
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relief:
    """A place with its victims, least harm first where several are compared; no victim: it need only be waited for."""

    harm: Harm
    gpu_uuids: tuple[str, ...]
    victims: tuple[Candidate, ...]


NO_HARM: Final = Harm(-1, -1, 0, 0, 0, 0.0, ())


def missing_bytes(room: GpuRoom, wanted: Wanted) -> int:
    """Bytes that are missing beside all requests; negative where some are left."""
    return (
        sum(s.request_bytes for s in room.stands) + room.claimed_bytes + wanted.request_bytes - room.allocatable_bytes
    )


def fits_beside(room: GpuRoom, wanted: Wanted, gone: Collection[str]) -> bool:
    """Whether there is room beside the requests of all who stay."""
    return (
        sum(s.request_bytes for s in room.stands if s.holder not in gone) + room.claimed_bytes + wanted.request_bytes
        <= room.allocatable_bytes
    )


def fits_by_turns(room: GpuRoom, wanted: Wanted, gone: Collection[str]) -> bool:
    """Whether those who stay and the newcomer can take turns: the residues of all, and the largest return of one."""
    always_bytes = room.claimed_bytes
    largest_bytes = 0
    for stand in room.stands:
        if stand.holder not in gone:
            always_bytes += stand.residue_bytes
            largest_bytes = max(largest_bytes, stand.request_bytes - stand.residue_bytes)
    residue_bytes = wanted.request_bytes if wanted.residue_bytes is None else wanted.residue_bytes
    largest_bytes = max(largest_bytes, wanted.request_bytes - residue_bytes)
    return always_bytes + residue_bytes + largest_bytes <= room.allocatable_bytes


class _Room:
    """One GPU with the rule that decides whether the newcomer fits."""

    def __init__(self, room: GpuRoom, wanted: Wanted) -> None:
        self.room, self.wanted = room, wanted
        self.missing_bytes = max(0, missing_bytes(room, wanted))
        # Where turns would do already and nobody leaves, whoever chooses places has refused them: they do not count.
        self._has_turns = room.has_leaving or not fits_by_turns(room, wanted, ())
        self.is_free = self.fits(())

    def fits(self, gone: Collection[str]) -> bool:
        if fits_beside(self.room, self.wanted, gone):
            return True
        return self._has_turns and fits_by_turns(self.room, self.wanted, gone)


def relief_of(
    rooms: Sequence[GpuRoom], wanted: Mapping[str, Wanted], gpu_count: int, candidates: Sequence[Candidate]
) -> Relief | None:
    """The least harm that gives `gpu_count` of these GPUs the room that the newcomer wants there.

    `wanted` names the GPUs that will do. None: nobody who may be displaced helps, or it is free and yet was not chosen.
    The set's priority and rank are the least possible; on one GPU the whole order holds, on several the sets are found
    greedily from each GPU on. No member can be left out.
    """
    usable = [_Room(room, wanted[room.gpu_uuid]) for room in rooms if room.gpu_uuid in wanted]
    if len(usable) < gpu_count:
        return None
    free = [room for room in usable if room.is_free]
    if len(free) >= gpu_count:
        is_leaving = any(room.room.has_leaving for room in free)
        return Relief(NO_HARM, tuple(r.room.gpu_uuid for r in free[:gpu_count]), ()) if is_leaving else None
    pool = _least_pool(usable, gpu_count, candidates)
    if pool is None:
        return None
    found: list[tuple[tuple[Candidate, ...], tuple[_Room, ...]]]
    if gpu_count == 1:
        found = [(victims, (room,)) for room in usable if (victims := _least_on(room, pool, ())) is not None]
    else:
        found = list(_greedy(usable, gpu_count, pool))
    reliefs = [
        Relief(harm_of(victims, sum(r.missing_bytes for r in on)), tuple(r.room.gpu_uuid for r in on), tuple(victims))
        for victims, on in found
    ]
    return min(reliefs, key=lambda relief: (relief.harm, relief.gpu_uuids)) if reliefs else None


def harm_of(victims: Sequence[Candidate], missing_bytes: int) -> Harm:
    """What their end costs. `missing_bytes`: what the place lacked without it."""
    return Harm(
        priority=max(v.priority for v in victims),
        rank=max(v.rank for v in victims),
        unparkable_count=sum(not v.is_parkable for v in victims),
        ended_count=sum(len(v.replica_ids) for v in victims),
        excess_bytes=sum(v.freed_bytes for v in victims) - missing_bytes,
        began_s=-sum(sorted(v.began_s for v in victims)),
        holders=tuple(sorted(v.holder for v in victims)),
    )


def _least_pool(rooms: Sequence[_Room], gpu_count: int, candidates: Sequence[Candidate]) -> list[Candidate] | None:
    """Those up to the lowest priority, and then the lowest rank, with whose end it fits at all."""
    for priority in sorted({c.priority for c in candidates}):
        lower = [c for c in candidates if c.priority <= priority]
        if not _fits_without(rooms, gpu_count, lower):
            continue
        for rank in sorted({c.rank for c in lower}):
            pool = [c for c in lower if c.rank <= rank]
            if _fits_without(rooms, gpu_count, pool):
                return pool
    return None


def _fits_without(rooms: Sequence[_Room], gpu_count: int, gone: Sequence[Candidate]) -> bool:
    holders = {c.holder for c in gone}
    return sum(room.fits(holders) for room in rooms) >= gpu_count


def _least_on(room: _Room, pool: Sequence[Candidate], gone: Collection[str]) -> tuple[Candidate, ...] | None:
    """The least harmful of the sets with which it fits this GPU, when `gone` have left already."""
    if room.fits(gone):
        return ()
    standing = {stand.holder for stand in room.room.stands}
    here = [c for c in pool if c.holder in standing and c.holder not in gone]
    if not room.fits({*gone, *(c.holder for c in here)}):
        return None
    parkable = sorted((c for c in here if c.is_parkable), key=_young_first)
    stopped = sorted((c for c in here if not c.is_parkable), key=_young_first)
    tried_count = 0
    for stop_count in range(len(stopped) + 1):
        best: tuple[Harm, tuple[Candidate, ...]] | None = None
        for park_count in range(len(parkable) + 1):
            if best is not None and stop_count + park_count > best[0].ended_count:
                break
            for victims in _sets(stopped, stop_count, parkable, park_count):
                tried_count += 1
                if tried_count > SETS_TRIED_MAX:
                    return _needed([*parkable, *stopped], [room], gone)
                if room.fits({*gone, *(v.holder for v in victims)}):
                    harm = harm_of(victims, room.missing_bytes)
                    if best is None or harm < best[0]:
                        best = (harm, victims)
        if best is not None:
            return best[1]
    return None


def _young_first(candidate: Candidate) -> tuple[float, str]:
    return (-candidate.began_s, candidate.holder)


def _sets(
    stopped: Sequence[Candidate], stop_count: int, parkable: Sequence[Candidate], park_count: int
) -> Iterator[tuple[Candidate, ...]]:
    if not stop_count + park_count:
        return
    for first in combinations(stopped, stop_count):
        for second in combinations(parkable, park_count):
            yield (*first, *second)


def _needed(victims: Sequence[Candidate], rooms: Sequence[_Room], gone: Collection[str]) -> tuple[Candidate, ...]:
    """Those of a set that is enough which cannot be left out, the most harmful tried first."""
    kept = {v.holder: v for v in victims}
    for victim in sorted(victims, key=_most_harmful_first):
        left = {*gone, *(holder for holder in kept if holder != victim.holder)}
        if all(room.fits(left) for room in rooms):
            del kept[victim.holder]
    return tuple(kept.values())


def _most_harmful_first(candidate: Candidate) -> tuple[int, int, bool, int, int, float, str]:
    c = candidate
    return (-c.priority, -c.rank, c.is_parkable, -len(c.replica_ids), -c.freed_bytes, c.began_s, c.holder)


def _greedy(
    rooms: Sequence[_Room], gpu_count: int, pool: Sequence[Candidate]
) -> Iterator[tuple[tuple[Candidate, ...], tuple[_Room, ...]]]:
    """Sets of victims for several GPUs: from each GPU on, always the one that costs least beside what has gone."""
    known: dict[tuple[str, frozenset[str]], tuple[Candidate, ...] | None] = {}

    def least(room: _Room, gone: Mapping[str, Candidate]) -> tuple[Candidate, ...] | None:
        here = frozenset(stand.holder for stand in room.room.stands if stand.holder in gone)
        key = (room.room.gpu_uuid, here)
        if key not in known:
            known[key] = _least_on(room, pool, here)
        return known[key]

    starts = rooms if gpu_count < len(rooms) else rooms[:1]
    for start in starts:
        gone: dict[str, Candidate] = {}
        chosen: list[_Room] = []
        left = list(rooms)
        while len(chosen) < gpu_count:
            steps = [
                (_step(victims, room), room.room.gpu_uuid, room, victims)
                for room in ([start] if not chosen else left)
                if (victims := least(room, gone)) is not None
            ]
            if not steps:
                break
            _, _, room, victims = min(steps, key=lambda step: step[:2])
            gone.update((v.holder, v) for v in victims)
            chosen.append(room)
            left.remove(room)
        if len(chosen) == gpu_count and gone:
            chosen.sort(key=lambda room: room.room.gpu_uuid)
            yield _needed(list(gone.values()), chosen, ()), tuple(chosen)


def _step(victims: Sequence[Candidate], room: _Room) -> Harm:
    return harm_of(victims, room.missing_bytes) if victims else NO_HARM

"""Who gives way, once it is known who may and what each is worth: enough on every GPU, and nobody for nothing.

The same for all policies. Lower priorities first, whatever their worth: of a higher one as little as possible goes.
Ties go to fewer and then by key, so that the order in which candidates are handed in does not matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.swapper.policies.port import Worth

SEARCH_STEP_COUNT_MAX: Final = 4000
"""Sets looked at for the cheapest: about 4 ms of Python at most. Beyond it the best found so far is taken."""
WORTH_MIN: Final = 1e-30
"""Nobody is free to take: so a set with somebody more is always dearer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One that may give way."""

    key: str
    priority: int
    freed_bytes: Mapping[str, int]
    """{gpu_uuid: what parking it gives there}"""
    worth: Worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who gives way, and how dear that is: smaller `cost` is better among choices by the same policy."""

    keys: tuple[str, ...]
    cost: tuple[float, ...]


def chosen(candidates: Sequence[Candidate], *, missing_bytes: Mapping[str, int], adds: bool) -> Choice | None:
    """None where all together do not free enough. No victim can be left out of the choice."""
    lacking = {uuid: size for uuid, size in missing_bytes.items() if size > 0}
    useful = [c for c in candidates if any(c.freed_bytes.get(uuid, 0) > 0 for uuid in lacking)]
    useful.sort(key=lambda c: (c.priority, c.worth, c.key))
    picked = _in_order(useful, lacking)
    if picked is None:
        return None
    if adds:
        picked = _Search(useful, lacking).cheapest(picked)
    return Choice(keys=tuple(c.key for c in picked), cost=_cost(picked, adds=adds))


def _in_order(ordered: Sequence[Candidate], lacking: Mapping[str, int]) -> list[Candidate] | None:
    """The first that suffice, without those that later ones made needless."""
    picked: list[Candidate] = []
    left = dict(lacking)
    for candidate in ordered:
        if not left:
            break
        if any(candidate.freed_bytes.get(uuid, 0) > 0 for uuid in left):
            picked.append(candidate)
            left = _left(left, candidate)
    if left:
        return None
    return _minimal(picked, lacking)


def _left(lacking: Mapping[str, int], candidate: Candidate) -> dict[str, int]:
    """By GPU: what is still missing when this one has gone too."""
    rest = {uuid: size - candidate.freed_bytes.get(uuid, 0) for uuid, size in lacking.items()}
    return {uuid: size for uuid, size in rest.items() if size > 0}


def _minimal(picked: list[Candidate], lacking: Mapping[str, int]) -> list[Candidate]:
    """Dearest first, each that the others make needless is kept resident."""
    kept = list(picked)
    for candidate in reversed(picked):
        left = dict(lacking)
        for other in kept:
            if other is not candidate:
                left = _left(left, other)
        if not left:
            kept.remove(candidate)
    return kept


def _cost(picked: Sequence[Candidate], *, adds: bool) -> tuple[float, ...]:
    """Highest priority first; within one, the sum, or the worths from the dearest down."""
    if not adds:
        dearest = sorted(picked, key=lambda c: (c.priority, c.worth), reverse=True)
        return tuple(part for c in dearest for part in (c.priority, *c.worth))
    sums: dict[int, float] = {}
    for c in picked:
        sums[c.priority] = sums.get(c.priority, 0.0) + max(c.worth[0], WORTH_MIN)
    return tuple(part for priority in sorted(sums, reverse=True) for part in (priority, sums[priority]))


class _Search:
    """Branch and bound over sets; with a handful of models on a GPU it is exact."""

    def __init__(self, ordered: Sequence[Candidate], lacking: Mapping[str, int]) -> None:
        self._ordered = ordered
        self._lacking = lacking
        self._step_count = 0
        self._best: list[Candidate] = []
        self._best_cost: tuple[tuple[float, ...], int] = ((), 0)

    def cheapest(self, start: list[Candidate]) -> list[Candidate]:
        self._best, self._best_cost = start, self._priced(start)
        self._extend(0, [], dict(self._lacking))
        return _minimal(self._best, self._lacking)

    @staticmethod
    def _priced(picked: Sequence[Candidate]) -> tuple[tuple[float, ...], int]:
        return _cost(picked, adds=True), len(picked)

    def _extend(self, index: int, picked: list[Candidate], left: Mapping[str, int]) -> None:
        """All sets that begin with `picked` and go on from `index`. A dearer set does not become cheaper by more."""
        self._step_count += 1
        if not left:
            if (cost := self._priced(picked)) < self._best_cost:
                self._best, self._best_cost = list(picked), cost
            return
        if index == len(self._ordered) or self._step_count > SEARCH_STEP_COUNT_MAX:
            return
        candidate = self._ordered[index]
        rest = _left(left, candidate)
        if rest != left:
            picked.append(candidate)
            if self._priced(picked) < self._best_cost:
                self._extend(index + 1, picked, rest)
            picked.pop()
        self._extend(index + 1, picked, left)

"""How many seeds it takes until a check finds a planted fault; and the table for people."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from tests.properties.planted.bug import Bug

NOTICED = (AssertionError, LookupError, TypeError, ValueError, AttributeError, ExceptionGroup)
"""What a check, or a service that was led astray, raises."""


@dataclass(frozen=True, slots=True)
class Found:
    bug: Bug
    seed_count: int | None
    """Seeds played until it was found, the finding one included; None: not found."""
    reason: str = ""
    """What the check said."""


def play(bug: Bug, seed: int) -> str:
    """What was noticed; empty when nothing was."""
    return _noticed(partial(bug.play, seed))


def play_known(bug: Bug) -> str:
    """Likewise, of the case that is known to find it; empty also when none is named."""
    return _noticed(bug.play_known) if bug.play_known is not None else ""


def _noticed(play: Callable[[], None]) -> str:
    try:
        play()
    except NOTICED as error:
        found: BaseException = error
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        return f"{type(found).__name__}: {found}"
    return ""


def search(bug: Bug, *, seeds_max: int, first_seed: int = 0) -> Found:
    for number in range(seeds_max):
        if reason := play(bug, first_seed + number):
            return Found(bug=bug, seed_count=number + 1, reason=reason)
    return Found(bug=bug, seed_count=None)


def table(found: Iterable[Found]) -> str:
    """One line for each fault."""
    rows = [
        (
            f.bug.name.replace("_", " "),
            f.bug.guards,
            "not found" if f.seed_count is None else str(f.seed_count),
            f.bug.breaks,
        )
        for f in found
    ]
    rows.insert(0, ("planted fault", "guards", "seeds", "what it breaks; what finds it"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )

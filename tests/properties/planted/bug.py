"""What a planted fault is."""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

from kit.outcomes import Outcome
from kit.service import Service

Play = Callable[[int], None]
"""Plays one seed with the fault in place; raises when a check finds it."""


@dataclass(frozen=True, slots=True)
class Bug:
    """One fault."""

    name: str
    guards: str
    """The invariant of the design (I1 ... I10) or the recovery path that it breaks."""
    breaks: str
    """A sentence: what it does wrong, and what finds it."""
    play: Play
    play_known: Callable[[], None] | None = None
    """Plays what is known to find it, where a seed that does is rare."""


def with_handler(service: Service[Any], kind: type, handler: Callable[..., Any]) -> Service[Any]:
    return changed(service, handlers={**service.handlers, kind: handler})


def with_fold(service: Service[Any], kind: type, fold: Callable[..., None]) -> Service[Any]:
    return changed(service, folds={**service.folds, kind: fold})


def without(service: Service[Any], kind: type, *dropped: type) -> Service[Any]:
    """The handler's outcomes of these classes are dropped."""

    def handler(state: Any, item: Any, ctx: Any) -> list[Outcome]:
        return [o for o in service.handlers[kind](state, item, ctx) if not isinstance(o, dropped)]

    return with_handler(service, kind, handler)

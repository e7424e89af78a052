"""How a service is declared: which inputs it handles, how its state is folded, and what must always hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, Final, Generic, TypeVar

import msgspec

from kit.outcomes import Context, Handled, Outcome
from schemas.messages import Command, Fact, Order, Query, Signal

S = TypeVar("S")
E = TypeVar("E")
Q = TypeVar("Q", bound=Query)

NOT_DURABLE: Final = frozenset({"derived", "observed", "settings"})
"""Fields of a state that are no part of history, or follow from the others: no digest and no snapshot holds them."""

Handler = Callable[[S, E, Context], Sequence[Outcome]]
Fold = Callable[[S, E], None]
Answer = Callable[[S, E, str], msgspec.Struct | None]
"""(state, query, tenant) -> the answer, or None for "nothing to tell yet": asked again until its patience ends."""


def _nothing_to_start(state: Any, ctx: Context) -> Sequence[Outcome]:
    return ()


def _nothing_to_check(state: Any) -> None:
    return None


@dataclass(slots=True)
class Service(Generic[S]):
    """One decision maker: a pure core. Both shells, real time and simulation, run exactly this."""

    name: str
    new_state: Callable[[Any], S]
    """Takes the service's settings; the empty state before any history."""
    reads: Callable[[str], Sequence[str]]
    """Takes the node's name ('' for cluster-wide services); the subject filters of others' facts that it follows."""
    on_start: Callable[[S, Context], Sequence[Outcome]] = _nothing_to_start
    """Re-issues what is unfinished in the state, after this writer has taken over."""
    check_invariants: Callable[[S], None] = _nothing_to_check
    state_version: int = 1
    """Raise it when a fold changes what it makes of old facts: snapshots of other versions are refolded."""
    inbox_cursor: Callable[[S], int] | None = None
    """Set by the one service that admits commands: the highest inbox sequence that a fact of its names."""
    handlers: dict[type, Handler[S, Any]] = field(default_factory=dict)
    folds: dict[type, Fold[S, Any]] = field(default_factory=dict)
    observers: dict[type, Callable[[S, Any, float], None]] = field(default_factory=dict)
    answers: dict[type[Query], Answer[S, Any]] = field(default_factory=dict)

    def on(self, kind: type[E]) -> Callable[[Handler[S, E]], Handler[S, E]]:
        """Register the handler of an input class. It decides and returns outcomes; it never changes the state."""

        def register(handler: Handler[S, E]) -> Handler[S, E]:
            assert kind not in self.handlers, f"{self.name} handles {kind.__name__} twice"
            self.handlers[kind] = handler
            return handler

        return register

    def folding(self, kind: type[E]) -> Callable[[Fold[S, E]], Fold[S, E]]:
        """Register how a fact, own or foreign, changes the state. The only place where durable state changes."""

        def register(fold: Fold[S, E]) -> Fold[S, E]:
            assert kind not in self.folds, f"{self.name} folds {kind.__name__} twice"
            self.folds[kind] = fold
            return fold

        return register

    def observing(self, kind: type[E]) -> Callable[[Callable[[S, E, float], None]], Callable[[S, E, float], None]]:
        """Register how a signal changes `state.observed`, which is no part of history and is lost on a restart."""

        def register(observe: Callable[[S, E, float], None]) -> Callable[[S, E, float], None]:
            assert kind not in self.observers, f"{self.name} observes {kind.__name__} twice"
            self.observers[kind] = observe
            return observe

        return register

    def answering(self, kind: type[Q]) -> Callable[[Answer[S, Q]], Answer[S, Q]]:
        """Register the answer to a query, computed from acknowledged state."""

        def register(answer: Answer[S, Q]) -> Answer[S, Q]:
            assert kind not in self.answers, f"{self.name} answers {kind.__name__} twice"
            self.answers[kind] = answer
            return answer

        return register

    def evolve(self, state: S, fact: Fact) -> None:
        """Fold one fact. A fact of a class without a fold changes nothing."""
        fold = self.folds.get(type(fact))
        if fold is not None:
            fold(state, fact)

    def kinds(self, base: type[Handled]) -> list[type]:
        """The registered input classes that derive from `base`, in name order."""
        found = {kind for kind in (*self.handlers, *self.observers) if issubclass(kind, base)}
        return sorted(found, key=lambda kind: kind.__name__)

    @property
    def signals(self) -> list[type]:
        return self.kinds(Signal)

    @property
    def orders(self) -> list[type]:
        return self.kinds(Order)

    @property
    def commands(self) -> list[type]:
        return self.kinds(Command)


def digest(state: Any) -> bytes:
    """Canonical bytes of the durable part of a state; equal states give equal bytes. Skips fields named `observed`."""
    return msgspec.json.encode(_plain(state), order="deterministic")


_AS_IT_IS: Final = frozenset({str, int, float, bool, NoneType})


def _durable_names(kind: type) -> tuple[str, ...] | None:
    """Of a dataclass: its fields that are part of history. None for other types. Looked up once for each type."""
    if kind not in _names_of:
        names = tuple(f.name for f in fields(kind) if f.name not in NOT_DURABLE) if is_dataclass(kind) else None
        _names_of[kind] = names
    return _names_of[kind]


_names_of: Final[dict[type, tuple[str, ...] | None]] = {}


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _AS_IT_IS:
        return value
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    names = _durable_names(kind)
    if names is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(child) for child in value)
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value

"""The residency machine as a table: where a replica can be, which fact brings it where, what its lease holds there.

Data only. Folds go by it (`target_of`): a fact that is not in the table is a defect of ours and stops the agent.
Results of effects that come late or twice never become facts: handlers drop them. `docs/residency.md` is made of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from msgspec import Struct


class Residency(StrEnum):
    """Where a replica is. `STATES` says what its lease holds there."""

    GRANTED = "granted"
    STARTING = "starting"
    RESIDENT = "resident"
    DRAINING = "draining"
    PARKED = "parked"
    WAITING = "waiting"
    WAKING = "waking"
    RELEASING = "releasing"
    SUSPECT = "suspect"
    FAILED = "failed"


class Holding(StrEnum):
    """What a lease holds on each of its GPUs."""

    NOTHING = "nothing"
    SHARE = "its share"
    RESIDUE = "its residue, or nothing before its first start"
    KEPT = "what it held before"


class Cause(StrEnum):
    """The fact behind a transition, with what tells two uses of one fact apart."""

    LEASE_GRANTED = "LeaseGranted"
    START_BEGUN = "ReplicaStarting"
    READY = "ReplicaReady"
    PARK_BEGUN = "ReplicaDraining"
    RELEASE_BEGUN = "ReplicaDraining, to be released"
    PARKED = "ReplicaParked"
    PARKED_NOWHERE = "ReplicaParked, nowhere"
    PARK_ABANDONED = "ParkAbandoned"
    WAKE_ACCEPTED = "ReplicaWaking"
    WAKE_BEGUN = "ReplicaWaking, reserved"
    RESIDENT = "ReplicaResident"
    WAKE_REFUSED = "WakeRefused"
    START_REFUSED = "WakeRefused, no engine"
    FAILED = "ReplicaFailed"
    GIVEN_UP = "ReplicaFailed, final"
    SUSPECTED = "ReplicaSuspect"
    RELEASED = "LeaseReleased"


@dataclass(frozen=True, slots=True)
class State:
    """One row of `STATES`."""

    meaning: str
    holds: Holding
    deadline_settings: tuple[str, ...] = ()
    """Of `NodeAgentSettings`, in seconds; their sum is how long it may stay. Empty: it rests here, or waits for
    others, whose steps have deadlines of their own."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One row of `TRANSITIONS`; `source` or `target` None: there is no lease."""

    source: Residency | None
    cause: Cause
    target: Residency | None


_R = Residency
_C = Cause

STATES: Final[dict[Residency, State]] = {
    _R.GRANTED: State("leased, without a process", Holding.NOTHING),
    _R.STARTING: State(
        "its engine starts behind a gate, loads and gives a first token",
        Holding.SHARE,
        ("start_deadline_s", "wake_deadline_s"),
    ),
    _R.RESIDENT: State("it serves", Holding.SHARE),
    _R.DRAINING: State(
        "it ends its requests, parks, and its bytes are proven free",
        Holding.SHARE,
        ("drain_s", "wake_deadline_s"),
    ),
    _R.PARKED: State("its engine lives, its weights are in host memory", Holding.RESIDUE),
    _R.WAITING: State("its wake is accepted; its victims give their bytes first", Holding.RESIDUE),
    _R.WAKING: State(
        "its weights come back and it gives a token",
        Holding.SHARE,
        ("wake_deadline_s", "wake_deadline_s"),
    ),
    _R.RELEASING: State(
        "it ends its requests, its engine is stopped, its bytes are proven free",
        Holding.KEPT,
        ("drain_s", "stop_grace_s"),
    ),
    _R.SUSPECT: State(
        "what runs is not what should, or a step has not ended in its time; it gets no request and is looked at",
        Holding.KEPT,
    ),
    _R.FAILED: State("its engine is gone and will not be tried again", Holding.NOTHING),
}
"""In the order of a replica's life."""


def _from(sources: Iterable[Residency], cause: Cause, target: Residency | None) -> tuple[Transition, ...]:
    return tuple(Transition(source, cause, target) for source in sources)


_ENGINES = (_R.STARTING, _R.RESIDENT, _R.DRAINING, _R.PARKED, _R.WAITING, _R.WAKING, _R.SUSPECT)
"""Where a replica has, or may have, an engine that is not being stopped."""
_IN_DOUBT = (_R.STARTING, _R.RESIDENT, _R.DRAINING, _R.PARKED, _R.WAKING, _R.RELEASING, _R.SUSPECT)

TRANSITIONS: Final[tuple[Transition, ...]] = (
    Transition(None, _C.LEASE_GRANTED, _R.GRANTED),
    *_from((_R.GRANTED, _R.WAITING), _C.START_BEGUN, _R.STARTING),
    *_from((_R.STARTING, _R.SUSPECT), _C.READY, _R.RESIDENT),
    Transition(_R.RESIDENT, _C.PARK_BEGUN, _R.DRAINING),
    *_from((_R.DRAINING, _R.SUSPECT), _C.PARKED, _R.PARKED),
    Transition(_R.DRAINING, _C.PARKED_NOWHERE, _R.GRANTED),
    Transition(_R.DRAINING, _C.PARK_ABANDONED, _R.RESIDENT),
    *_from((_R.GRANTED, _R.PARKED), _C.WAKE_ACCEPTED, _R.WAITING),
    Transition(_R.WAITING, _C.WAKE_BEGUN, _R.WAKING),
    *_from((_R.WAKING, _R.SUSPECT), _C.RESIDENT, _R.RESIDENT),
    *_from((_R.PARKED, _R.WAITING, _R.WAKING), _C.WAKE_REFUSED, _R.PARKED),
    *_from((_R.GRANTED, _R.WAITING), _C.START_REFUSED, _R.GRANTED),
    *_from(_IN_DOUBT, _C.SUSPECTED, _R.SUSPECT),
    *_from(_ENGINES, _C.FAILED, _R.GRANTED),
    *_from(_ENGINES, _C.GIVEN_UP, _R.FAILED),
    *_from(_ENGINES, _C.RELEASE_BEGUN, _R.RELEASING),
    *_from((_R.GRANTED, _R.WAITING, _R.RELEASING, _R.SUSPECT, _R.FAILED), _C.RELEASED, None),
)
"""All there are. Ordered as in a replica's life."""

_TARGETS: Final = {(row.source, row.cause): row.target for row in TRANSITIONS}
assert len(_TARGETS) == len(TRANSITIONS), "one fact leads from one state to one other"


def allowed_s(residency: Residency, settings: Struct) -> float:
    """How long a replica may stay there before it is suspect; 0 where it may rest."""
    return float(sum(getattr(settings, name) for name in STATES[residency].deadline_settings))


def target_of(source: Residency | None, cause: Cause) -> Residency | None:
    """Where the fact leads from here; an `AssertionError` where it leads nowhere."""
    assert (source, cause) in _TARGETS, f"{cause} cannot follow on {source or 'no lease'}"
    return _TARGETS[source, cause]

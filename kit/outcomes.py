"""What a handler may answer with. Decisions return these values; the shell carries them out."""

from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from schemas.inbox import CommandAnswered
from schemas.messages import Fact, Order, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Slow work of this service. Its result comes back as an input. Idempotent by `lease_epoch` or `wake_epoch`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An input that never leaves the process: a timer that came due, or the result of an effect."""


class Timer(Struct, frozen=True, kw_only=True):
    """Give me this input later. Timers cannot be cancelled: handlers check whether the input still matters."""

    due_s: float
    """Stream time."""
    input: Input


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a command, sent when its fact is acknowledged."""

    tenant: str
    answer: CommandAnswered


@dataclass(frozen=True, slots=True, kw_only=True)
class Under:
    """This outcome continues another trace than that of the input that led to it."""

    traceparent: str
    outcome: "Fact | Order | Signal | Effect | Timer"


Outcome = Fact | Order | Signal | Effect | Timer | Reply | Under


class Context(Struct, frozen=True, kw_only=True):
    """What a handler may know besides state and input."""

    now_s: float
    """Stream time for facts, due time for a timer's input, arrival stamp for all else. It never goes back."""
    writer_epoch: int
    """Carried by every order; 0 only before this writer has taken over."""
    cause_seq: int = 0
    """Sequence of the fact or inbox message at hand; 0 for all else."""
    tenant: str = ""
    """Who sent the command at hand."""
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableCommand(Input):
    """An inbox message that is no command of ours. It gets a rejection that its publisher can read."""

    command_id: str
    """Taken from the bytes if they hold one, else made from the inbox sequence."""
    reason: str


Handled = Any
"""Anything a handler may be registered for: a message class or an `Input` class."""

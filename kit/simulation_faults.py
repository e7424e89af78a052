"""What may go wrong in a simulation: chances for each message, points where a service may die, and what was counted."""

from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What may go wrong, as chances per event and as times."""

    latency_s: float = 0.0004
    """Mean of every message's way; each one is drawn between half and three times this."""
    fleeting_lost_fraction: float = 0.0
    fleeting_twice_fraction: float = 0.0
    fleeting_late_fraction: float = 0.0
    """Of fleeting messages that come up to `late_s` late, and so also after younger ones."""
    late_s: float = 5.0
    ack_lost_fraction: float = 0.0
    """Of appends that are stored although their writer hears nothing."""
    resend_s: float = 1.0
    rebuild_s: float = 0.1
    """Until a writer whose append was refused has stopped and reads history anew."""


class Point(StrEnum):
    """Where in its work a service may be told to die."""

    BEFORE_HANDLE = "before-handle"
    AFTER_HANDLE = "after-handle"
    """Decided, nothing written. For a journal also: written in part, and cut off at the next start."""
    AFTER_AHEAD = "after-ahead"
    """An order that goes ahead of its fact has left, the fact is not written."""
    AFTER_SEND = "after-send"
    """The facts are on their way to the stream, or in the journal; no answer was heard."""
    AFTER_COMMIT = "after-commit"
    """The facts are durable, nothing that follows from them has left."""
    MID_RELEASE = "mid-release"
    """The first of several outcomes has left."""


@dataclass(slots=True)
class Counters:
    """What happened in one run."""

    delivered_count: int = 0
    appended_count: int = 0
    crashed_count: int = 0
    refused_count: int = 0
    """Appends that named an older sequence than the stream held."""
    superseded_count: int = 0
    """Lives that ended because another instance of the same writer had written."""
    unknown_count: int = 0
    """Appends of which their writer heard nothing."""
    lost_count: int = 0
    doubled_count: int = 0
    late_count: int = 0
    tripped: dict[str, int] = field(default_factory=dict)
    """{point: how often a service died there}"""

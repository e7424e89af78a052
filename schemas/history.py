"""Facts that every writer has, about its own part of history."""

from schemas.messages import Fact
from schemas.units import UnixSeconds


class WriterStarted(Fact, frozen=True, tag="history.writer_started.v1"):
    """A writer read to the end of history and takes over; this fact's sequence is its `writer_epoch`."""

    instance: str
    at_s: UnixSeconds
    machine_id: str = ""
    """Where a node's agent runs: a prefix is continued on no other machine. Empty: a writer that may run anywhere."""


class Progressed(Fact, frozen=True, tag="history.progressed.v1"):
    """The writer handled inputs that led to no fact; moves its cursor on."""

    at_s: UnixSeconds

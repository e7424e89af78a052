"""Who takes part in a simulation: readers of history, and the service instances among them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kit.bus import Entry, Stored
from kit.outcomes import Effect, Input
from kit.processor import Batch, Delivery, Processor
from kit.service import Service
from kit.simulation_faults import Point

Action = Callable[[Any, Any], None]
"""Done at a time: called with the party that it is about and a payload."""


class World(Protocol):
    """What effects act upon: the hosts, GPUs and engines outside of the services."""

    def perform(self, effect: Effect, done: Callable[[float, Input], None]) -> None:
        """Begin the effect; call `done(after_s, result)` for what comes back. Goes on when its service dies."""
        ...


@dataclass(slots=True, eq=False)
class Party:
    """Whoever reads history over a link of its own: a service instance, or a gateway."""

    name: str
    filters: tuple[str, ...]
    receive: Callable[[Any, Stored], None]
    """Called with the party and one stored fact, in stream order."""
    life: int = 0
    """Raised at each crash: whatever was scheduled for an earlier life is void."""
    is_paused: bool = False
    """Stopped by a signal: nothing is lost, nothing is done; what comes meanwhile is in `frozen`."""
    frozen: list[tuple[Action, Any]] = field(default_factory=list)
    cut_in_until_s: float = 0.0
    """Until then nothing of the bus reaches it."""
    cut_out_until_s: float = 0.0
    """Until then nothing of it reaches the bus."""
    extra_latency_s: float = 0.0
    is_reading: bool = False
    position: int = 0
    """While it does not read: messages of the stream that were handed to it."""
    next_arrival_s: float = 0.0
    own_mark: str = "\0"
    """Begins the ids of entries that this very instance made."""


@dataclass(slots=True, eq=False)
class Member(Party):
    """One instance of a service."""

    service: Service[Any] = None  # type: ignore[assignment]  # Always given; fields of the base have defaults.
    settings: Any = None
    writer: str = ""
    world: World | None = None
    is_journaled: bool = False
    processor: Processor[Any] | None = None
    is_alive: bool = False
    is_active: bool = False
    """Has taken over: history was read and its start is acknowledged."""
    is_standby: bool = False
    """Waits until the other instance's lease has ended."""
    is_waiting_for_bus: bool = False
    """Would start, and cannot read history now."""
    is_born_standby: bool = False
    has_power: bool = True
    inbox_position: int = 0
    waiting: deque[Delivery | Stored] = field(default_factory=deque)
    in_flight: Batch | None = None
    journal: list[Entry] = field(default_factory=list)
    uploaded_count: int = 0
    is_uploading: bool = False
    skew_s: float = 0.0
    """Its host's clock less stream time."""
    offset_s: float = 0.0
    """Added to its clock, so that it is never behind what it has read (`Runner.now_s`)."""
    trap: Point | None = None
    trap_down_s: float = 0.0

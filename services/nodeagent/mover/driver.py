"""What every swap driver offers, what it is given, and how it says that something did not work."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from schemas.deployments import SwapDriver
from schemas.holders import EngineView
from schemas.nodes import ParkTier
from schemas.placement import ReplicaProposal


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapTarget:
    """One running engine and what the work may take."""

    replica: ReplicaProposal
    lease_epoch: int
    engine: EngineView
    endpoint: str
    timeout_s: float
    """For one direction, from its first call."""

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        """By shard."""
        return tuple(share.gpu_uuid for share in self.replica.shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Whether this node can use the driver on a GPU; `reason` says why not."""

    is_supported: bool
    reason: str = ""


YES = Support(is_supported=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """The engine holds what it keeps while parked and no more; whoever asked proves that with the guard."""

    copied_bytes: int
    host_bytes: int
    """What its images take in host memory."""
    tier: ParkTier = ParkTier.HOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """Everything is back where it was. The parts of the time overlap; 0 where they cannot be told apart."""

    copied_bytes: int = 0
    map_s: float = 0.0
    copy_s: float = 0.0


class Standing(StrEnum):
    """Where an engine's memory is, as found out now."""

    RESIDENT = "resident"
    PARKED = "parked"
    BETWEEN = "between"
    """A step was interrupted; parking or waking again finishes it."""
    UNTOLD = "untold"
    """The engine answers and does not say; what it uses of its GPUs has to tell."""


class StillResident(Exception):
    """It could not be parked and is as before: it may serve on."""


class StillParked(Exception):
    """It could not be woken and is parked as before."""

    def __init__(self, reason: str, *, short_by_bytes: int = 0) -> None:
        super().__init__(reason)
        self.short_by_bytes = short_by_bytes


class Broken(Exception):
    """Nobody knows what it is now; it must be ended."""


class Driver(Protocol):
    """One way to park and wake engines. All calls may be repeated: what is done already is not done again.

    A replica over several GPUs moves as a whole: all its shards at the same time, or none.
    """

    @property
    def name(self) -> SwapDriver: ...

    @property
    def is_wake_repeatable(self) -> bool:
        """Whether a wake that raised `StillParked` may be tried once more at once."""

    @property
    def residue_bytes(self) -> int | None:
        """The most that a parked engine may keep on each GPU. None: what it says itself."""

    async def support(self, gpu_uuids: Collection[str]) -> dict[str, Support]:
        """By GPU: found out by asking what would be used, not by a version."""

    def estimate_s(self, size_bytes: int, *, link_bytes_per_s: float) -> float:
        """How long a wake of that many bytes takes on a link of that speed, about."""

    async def prepare(self, target: SwapTarget) -> None:
        """Once it serves for the first time: take host memory and seal what can be sealed. May take long."""

    async def park(self, target: SwapTarget) -> Parked:
        """Raises `StillResident`, or `Broken`. It has nothing in flight, and its route is closed."""

    async def wake(self, target: SwapTarget) -> Woken:
        """Raises `StillParked`, or `Broken`. Its bytes are reserved, its limit allows them."""

    async def standing(self, target: SwapTarget) -> Standing:
        """Raises `Broken` when it cannot be told."""

    async def forget(self, target: SwapTarget) -> None:
        """The engine has ended: give back what was kept for it. Idempotent."""

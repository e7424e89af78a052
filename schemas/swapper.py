"""Facts of the swapper: who shall be resident, who shall be parked, and why."""

from typing import ClassVar

from schemas.messages import Fact
from schemas.units import Epoch, Identifier, ModelName, Name, UnixSeconds


class SwapperFact(Fact, frozen=True):
    writer: ClassVar[str] = "swapper"

    at_s: UnixSeconds


class WakeDecided(SwapperFact, frozen=True, tag="swapper.wake_decided.v1"):
    """The order for this wake has left (before this fact); it is repeated until the node agent's fact answers it."""

    node: Name
    replica_id: Identifier
    model: ModelName
    wake_epoch: Epoch
    victim_ids: tuple[Identifier, ...]
    reason: str


class ParkDecided(SwapperFact, frozen=True, tag="swapper.park_decided.v1"):
    """The replica shall give its GPU back."""

    node: Name
    replica_id: Identifier
    model: ModelName
    wake_epoch: Epoch
    reason: str


class DecisionClosed(SwapperFact, frozen=True, tag="swapper.decision_closed.v1"):
    """A decided wake or park will not be pursued any more (refused, failed, released, or overtaken)."""

    replica_id: Identifier
    wake_epoch: Epoch
    reason: str

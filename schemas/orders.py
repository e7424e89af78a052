"""Orders to node agents. Fleeting, with a deadline as remaining milliseconds; facts say what became of them."""

from typing import ClassVar

from schemas.messages import Order
from schemas.units import Epoch, Identifier


class WakeOrdered(Order, frozen=True, tag="orders.wake_ordered.v1"):
    """Bring this replica onto its GPU; park the victims first. A replica that was never started is started."""

    writer: ClassVar[str] = "swapper"
    goes_ahead: ClassVar[bool] = True

    replica_id: Identifier
    wake_epoch: Epoch
    victim_ids: tuple[Identifier, ...] = ()
    reason: str = ""


class ParkOrdered(Order, frozen=True, tag="orders.park_ordered.v1"):
    """Park this replica: drain within the deadline, then give its bytes back."""

    writer: ClassVar[str] = "swapper"

    replica_id: Identifier
    wake_epoch: Epoch
    reason: str = ""

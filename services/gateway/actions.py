"""What the core asks its shell to do, and how the shell says that a replica did not do it."""

from dataclasses import dataclass
from enum import Enum, auto

from schemas.messages import Signal
from services.gateway.refusals import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Send the request to this replica now, then tell the core `first_byte`, and `finished` or `bounced`."""

    request_id: str
    replica_id: str
    endpoint: str
    held_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Answer the request with this error; it is over."""

    request_id: str
    refusal: Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Tell others; lost messages are made up for by the next ones."""

    signal: Signal
    request_id: str = ""
    """Whose trace it belongs to; empty for none."""


class Bounce(Enum):
    """Why a replica gave back a request of whose answer nothing was sent yet."""

    ASLEEP = auto()
    """It said so: parked a moment ago."""
    UNREACHABLE = auto()
    """It never got the request."""
    CUT = auto()
    """The connection broke after the request was sent."""


Action = Dispatch | Refuse | Publish

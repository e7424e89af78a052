"""How a running service is, as its health server tells it."""

from collections.abc import Callable
from dataclasses import dataclass, field

Hold = Callable[[str, str], None]
"""(what is written to, why it cannot be written now; '' as soon as it can)"""


def told_to_nobody(place: str, why: str) -> None:
    """A `Hold` for callers without a health server."""


@dataclass(slots=True)
class Status:
    """What `/healthz`, `/readyz` and `/metrics` tell about this runner."""

    is_ready: bool = False
    """History is read and this instance decides."""
    why_not: str = "reading history"
    handled_count: int = 0
    dropped_count: int = 0
    appended_count: int = 0
    rebuilt_count: int = 0
    skipped_count: int = 0
    refused_order_count: int = 0
    """Orders of superseded writers, and orders that waited longer than their deadline."""
    snapshot_count: int = 0
    replayed_count: int = 0
    """Messages of history that the newest start read."""
    holds: dict[str, str] = field(default_factory=dict)
    """{what is written to: why it cannot be now}; what was decided waits for it, and nothing is lost."""

    def hold(self, place: str, why: str) -> None:
        """See `Hold`."""
        if why:
            self.holds[place] = why
        else:
            self.holds.pop(place, None)

    @property
    def problem(self) -> str:
        """Why it does not serve now; '' when it does."""
        return "; ".join(self.holds.values()) or ("" if self.is_ready else self.why_not)

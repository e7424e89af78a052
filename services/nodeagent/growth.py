"""Whether an engine can live in another grant while it serves, and how often it is asked to, by what became of it.

Pure. What its table or its deployment says is believed until the engine itself says otherwise.
"""

from dataclasses import dataclass, replace
from typing import Final

from schemas.abilities import ABILITIES
from schemas.deployments import DeploymentSpec

REST_DOUBLINGS_MAX: Final = 6
"""Of `burst_rest_s`: whoever fails to grow time after time is tried every five minutes at last."""


def is_elastic(spec: DeploymentSpec) -> bool:
    """Whether its engine can live in another grant without a restart: as it says, else as its kind usually is."""
    said = spec.engine.is_elastic
    return ABILITIES[spec.engine.kind].is_elastic if said is None else said


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What one engine, since its start, has made of the grants that it was to grow into."""

    is_able: bool = True
    """False: it has said that it cannot; it is not asked again while it lives."""
    failed_count: int = 0
    """Of its last tries, in a row."""
    is_tried: bool = False
    """The last one was begun, and no failure of it was told."""

    def begun(self) -> "Growth":
        return replace(self, is_tried=True, failed_count=0 if self.is_tried else self.failed_count)

    def failed(self, *, is_able: bool) -> "Growth":
        return Growth(is_able=self.is_able and is_able, failed_count=self.failed_count + 1)

    def rest_s(self, least_s: float) -> float:
        """How long it is left alone after it gave back, or did not get what it was granted."""
        return least_s * 2.0 ** min(self.failed_count, REST_DOUBLINGS_MAX)

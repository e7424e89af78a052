"""Facts of the autoscaler: how many replicas a deployment has; zero is cold."""

from typing import ClassVar

from schemas.messages import Fact
from schemas.units import Count, Identifier, ModelName, UnixSeconds


class AutoscalerFact(Fact, frozen=True):
    writer: ClassVar[str] = "autoscaler"

    at_s: UnixSeconds


class ReplicasDecided(AutoscalerFact, frozen=True, tag="autoscaler.replicas_decided.v1"):
    """The deployment shall have this many replicas; placement finds them a place or releases them."""

    deployment_id: Identifier
    model: ModelName
    replica_count: Count
    reason: str

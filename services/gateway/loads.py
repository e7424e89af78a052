"""How busy each model and replica is at this gateway, and when others shall hear of it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from schemas.gateways import ModelLoad

SAMPLE_MODELS_MAX: Final = 1000
"""Models in one `LoadSampled`: about 170 kB of JSON, well under the 1 MB that NATS takes in one message."""


@dataclass(slots=True, kw_only=True)
class Load:
    """One model's load here. Each request is counted once when it arrives, and once while it runs."""

    deployment_id: str
    in_flight_count: int = 0
    arrived_count: int = 0
    """Since the last sample."""
    last_arrival_s: float = 0.0
    is_told_busy: bool = False
    told_s: float = 0.0


@dataclass(slots=True)
class Loads:
    """All loads. `by_replica` holds only replicas that have something in flight; its values sum to all in flight."""

    models: dict[str, Load] = field(default_factory=dict)
    by_replica: dict[str, int] = field(default_factory=dict)

    def of(self, deployment_id: str) -> Load:
        load = self.models.get(deployment_id)
        if load is None:
            load = self.models[deployment_id] = Load(deployment_id=deployment_id)
        return load

    def arrived(self, deployment_id: str, *, now_s: float) -> None:
        load = self.of(deployment_id)
        load.arrived_count += 1
        load.last_arrival_s = now_s

    def started(self, deployment_id: str, replica_id: str) -> None:
        self.of(deployment_id).in_flight_count += 1
        self.by_replica[replica_id] = self.by_replica.get(replica_id, 0) + 1

    def ended(self, deployment_id: str, replica_id: str) -> None:
        self.of(deployment_id).in_flight_count -= 1
        self.by_replica[replica_id] -= 1
        if not self.by_replica[replica_id]:
            del self.by_replica[replica_id]

    def has_turned(self, deployment_id: str, *, waiting_count: int) -> bool:
        """True when the model turned busy or idle since others last heard of it."""
        load = self.of(deployment_id)
        return (load.in_flight_count + waiting_count > 0) != load.is_told_busy

    def tell(self, deployment_id: str, *, waiting_count: int, now_s: float) -> ModelLoad:
        """The sample of one model; starts its next count of arrivals."""
        load = self.of(deployment_id)
        load.is_told_busy = load.in_flight_count + waiting_count > 0
        load.told_s = now_s
        arrived_count, load.arrived_count = load.arrived_count, 0
        return ModelLoad(
            deployment_id=deployment_id,
            in_flight_count=load.in_flight_count,
            waiting_count=waiting_count,
            arrived_count=arrived_count,
            last_arrival_s=load.last_arrival_s,
        )

    def tell_all(
        self, deployment_ids: Sequence[str], *, waiting: Mapping[str, int], now_s: float
    ) -> list[tuple[ModelLoad, ...]]:
        """The samples of all these models, in as many parts as fit one message each; one empty part for none."""
        samples = [self.tell(key, waiting_count=waiting.get(key, 0), now_s=now_s) for key in deployment_ids]
        starts = range(0, max(1, len(samples)), SAMPLE_MODELS_MAX)
        return [tuple(samples[start : start + SAMPLE_MODELS_MAX]) for start in starts]

    def forget(self, deployments: Mapping[str, object]) -> None:
        """Drop the loads of deployments that are gone and have nothing in flight any more."""
        gone = [key for key, load in self.models.items() if key not in deployments and not load.in_flight_count]
        for key in gone:
            del self.models[key]

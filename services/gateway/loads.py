"""How busy each model and replica is at this gateway, and what others are told of it. Pure."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from schemas.gateways import ModelLoad

SAMPLE_MODELS_MAX: Final = 4000
"""Models in one `LoadSampled`: about 700 kB of JSON, below the 1 MB that NATS takes in one message."""


@dataclass(slots=True, kw_only=True)
class Load:
    """One model's load here. Each request is counted once when it arrives, and once while it runs."""

    deployment_id: str
    in_flight_count: int = 0
    arrived_count: int = 0
    """Since the last sample."""
    last_arrival_s: float = 0.0
    is_told_busy: bool = False


@dataclass(slots=True)
class Loads:
    """All loads. `by_replica` holds only replicas that have something in flight; its values sum to all in flight.

    A sample is complete: readers take a model that is not in it for one without requests at this gateway.
    """

    models: dict[str, Load] = field(default_factory=dict)
    by_replica: dict[str, int] = field(default_factory=dict)
    told_s: float = 0.0
    """When the last sample was made."""
    _moving: set[str] = field(default_factory=set)
    """Models that no sample may leave out: with requests, with arrivals that were not told, or last told as busy."""

    def of(self, deployment_id: str) -> Load:
        load = self.models.get(deployment_id)
        if load is None:
            load = self.models[deployment_id] = Load(deployment_id=deployment_id)
        return load

    def arrived(self, deployment_id: str, *, now_s: float) -> None:
        load = self.of(deployment_id)
        load.arrived_count += 1
        load.last_arrival_s = now_s
        self._moving.add(deployment_id)

    def started(self, deployment_id: str, replica_id: str) -> None:
        self.of(deployment_id).in_flight_count += 1
        self._moving.add(deployment_id)
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

    def sample(self, idle_ids: Iterable[str], *, waiting: Mapping[str, int], now_s: float) -> tuple[ModelLoad, ...]:
        """All models with something to tell, and of `idle_ids` as many as there is room for."""
        self.told_s = now_s
        moving_ids = sorted(self._moving | waiting.keys())
        others = [key for key in idle_ids if key not in self._moving and key not in waiting]
        chosen = [*moving_ids, *others[: max(0, SAMPLE_MODELS_MAX - len(moving_ids))]]
        return tuple(self._tell(key, waiting.get(key, 0)) for key in chosen)

    def _tell(self, deployment_id: str, waiting_count: int) -> ModelLoad:
        load = self.of(deployment_id)
        load.is_told_busy = load.in_flight_count + waiting_count > 0
        arrived_count, load.arrived_count = load.arrived_count, 0
        if load.is_told_busy:
            self._moving.add(deployment_id)
        else:
            self._moving.discard(deployment_id)
        return ModelLoad(
            deployment_id=deployment_id,
            in_flight_count=load.in_flight_count,
            waiting_count=waiting_count,
            arrived_count=arrived_count,
            last_arrival_s=load.last_arrival_s,
        )

    def forget(self, deployment_ids: Container[str]) -> None:
        """Drop the loads of deployments that are not among these any more and have nothing to tell."""
        gone = [key for key in self.models if key not in deployment_ids and key not in self._moving]
        for key in gone:
            del self.models[key]

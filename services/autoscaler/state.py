"""What the autoscaler knows: each deployment's bounds, its present count, and when it was last used."""

from dataclasses import dataclass, field

from schemas.autoscaler import ReplicasDecided
from schemas.deployments import WorkloadKind
from schemas.gateways import LoadSampled, ModelLoad, ModelWanted
from schemas.nodes import (
    LeaseGranted,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
)
from schemas.placement import DeploymentAdmitted, DeploymentRetired
from services.autoscaler.settings import AutoscalerSettings


@dataclass(slots=True)
class Deployment:
    deployment_id: str
    model: str
    replica_count: int
    """As decided last; 0 is cold."""
    wished_count: int
    cold_after_s: float | None
    is_training: bool
    changed_at_s: float
    """When a fact last showed life: a decision, a start, a wake, a park.

    Never cold sooner than that plus the idle time.
    """


@dataclass(slots=True)
class GatewayLoad:
    heard_at_s: float
    models: dict[str, ModelLoad]


@dataclass(slots=True)
class Observed:
    """Not history: lost at a restart, and then unknown, never zero."""

    gateways: dict[str, GatewayLoad] = field(default_factory=dict)
    last_used_s: dict[str, float] = field(default_factory=dict)
    since_s: float = 0.0
    """When this instance began to listen: nothing is idle for longer than that."""


@dataclass(slots=True)
class ScalerState:
    settings: AutoscalerSettings
    deployments: dict[str, Deployment] = field(default_factory=dict)
    observed: Observed = field(default_factory=Observed)


def new_state(settings: AutoscalerSettings) -> ScalerState:
    return ScalerState(settings=settings)


def fold_admitted(state: ScalerState, fact: DeploymentAdmitted) -> None:
    spec = fact.deployment
    state.deployments[fact.deployment_id] = Deployment(
        deployment_id=fact.deployment_id,
        model=spec.name,
        replica_count=spec.replica_count,
        wished_count=spec.replica_count,
        cold_after_s=spec.swap.cold_after_s,
        is_training=spec.kind is WorkloadKind.TRAINING,
        changed_at_s=fact.at_s,
    )


def fold_retired(state: ScalerState, fact: DeploymentRetired) -> None:
    state.deployments.pop(fact.deployment_id, None)


def fold_decided(state: ScalerState, fact: ReplicasDecided) -> None:
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is not None:
        deployment.replica_count = fact.replica_count
        deployment.changed_at_s = fact.at_s


def fold_life(state: ScalerState, fact: ReplicaParked | ReplicaResident) -> None:
    _alive(state, fact.deployment_id, fact.at_s)


def fold_ready(state: ScalerState, fact: ReplicaReady) -> None:
    for ready in fact.replicas:
        _alive(state, ready.deployment_id, fact.at_s)


def fold_granted(state: ScalerState, fact: LeaseGranted) -> None:
    for replica in fact.replicas:
        _alive(state, replica.deployment_id, fact.at_s)


def _alive(state: ScalerState, deployment_id: str, at_s: float) -> None:
    deployment = state.deployments.get(deployment_id)
    if deployment is not None:
        deployment.changed_at_s = at_s


def observe_wanted(state: ScalerState, wanted: ModelWanted, now_s: float) -> None:
    state.observed.last_used_s[wanted.deployment_id] = now_s


def observe_load(state: ScalerState, sample: LoadSampled, now_s: float) -> None:
    models = {model.deployment_id: model for model in sample.models}
    state.observed.gateways[sample.gateway] = GatewayLoad(heard_at_s=now_s, models=models)
    last_used_s = state.observed.last_used_s
    for model in sample.models:
        used_s = now_s if model.in_flight_count + model.waiting_count > 0 else model.last_arrival_s
        last_used_s[model.deployment_id] = max(used_s, last_used_s.get(model.deployment_id, 0.0))

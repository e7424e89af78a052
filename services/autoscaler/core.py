"""The autoscaler's decisions: a deployment that nobody used for long goes cold; a wanted cold one comes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kit.outcomes import Context, Input, Outcome, Timer
from kit.service import Service
from schemas.autoscaler import ReplicasDecided
from schemas.gateways import LoadSampled, ModelWanted
from schemas.nodes import LeaseGranted, ReplicaParked, ReplicaReady, ReplicaResident
from schemas.placement import DeploymentAdmitted, DeploymentRetired, WakeAsked
from services.autoscaler import state as fold
from services.autoscaler.state import Deployment, ScalerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Input):
    """Look for deployments that were idle long enough."""


def reads(node: str) -> Sequence[str]:
    return ["sublet.fact.placement.>", "sublet.fact.node.>"]


def on_start(state: ScalerState, ctx: Context) -> Sequence[Outcome]:
    state.observed.since_s = ctx.now_s
    return [Timer(due_s=ctx.now_s + state.settings.tick_s, input=Tick())]


def check_invariants(state: ScalerState) -> None:
    for deployment in state.deployments.values():
        assert 0 <= deployment.replica_count <= max(1, deployment.wished_count), deployment.model


SERVICE: Service[ScalerState] = Service(
    name="autoscaler", new_state=fold.new_state, reads=reads, on_start=on_start, check_invariants=check_invariants
)
_FOLDS: tuple[tuple[type, Any], ...] = (
    (DeploymentAdmitted, fold.fold_admitted),
    (DeploymentRetired, fold.fold_retired),
    (ReplicasDecided, fold.fold_decided),
    (LeaseGranted, fold.fold_granted),
    (ReplicaReady, fold.fold_ready),
    (ReplicaResident, fold.fold_life),
    (ReplicaParked, fold.fold_life),
)
for _kind, _fold in _FOLDS:
    SERVICE.folding(_kind)(_fold)


@SERVICE.observing(ModelWanted)
def observe_wanted(state: ScalerState, wanted: ModelWanted, now_s: float) -> None:
    fold.observe_wanted(state, wanted, now_s)


@SERVICE.observing(LoadSampled)
def observe_load(state: ScalerState, sample: LoadSampled, now_s: float) -> None:
    fold.observe_load(state, sample, now_s)


@SERVICE.on(ModelWanted)
def model_wanted(state: ScalerState, wanted: ModelWanted, ctx: Context) -> Sequence[Outcome]:
    """A request waits for a cold deployment: bring it back, with as many replicas as were wished for."""
    deployment = state.deployments.get(wanted.deployment_id)
    if deployment is None or deployment.replica_count > 0:
        return []
    return [_decide(deployment, _wished(deployment), f"{wanted.waiting_count} waiting", ctx)]


@SERVICE.on(WakeAsked)
def wake_asked(state: ScalerState, fact: WakeAsked, ctx: Context) -> Sequence[Outcome]:
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is None or deployment.replica_count > 0:
        return []
    return [_decide(deployment, _wished(deployment), "asked for by an operator", ctx)]


@SERVICE.on(Tick)
def tick(state: ScalerState, tick: Tick, ctx: Context) -> Sequence[Outcome]:
    outcomes: list[Outcome] = [
        _decide(deployment, 0, f"idle for {deployment.cold_after_s:.0f} s", ctx)
        for deployment in state.deployments.values()
        if _is_cold(state, deployment, now_s=ctx.now_s)
    ]
    return [*outcomes, Timer(due_s=ctx.now_s + state.settings.tick_s, input=Tick())]


def _is_cold(state: ScalerState, deployment: Deployment, *, now_s: float) -> bool:
    """Idle long enough, and every gateway says so freshly: not knowing means hold."""
    if deployment.cold_after_s is None or deployment.replica_count == 0 or deployment.is_training:
        return False
    used_s = state.observed.last_used_s.get(deployment.deployment_id, 0.0)
    if now_s - max(used_s, deployment.changed_at_s, state.observed.since_s) < deployment.cold_after_s:
        return False
    ages_s = [now_s - load.heard_at_s for load in state.observed.gateways.values()]
    present_s = [age_s for age_s in ages_s if age_s <= state.settings.gateway_gone_s]
    return bool(present_s) and max(present_s) <= state.settings.load_fresh_s


def _wished(deployment: Deployment) -> int:
    """As many as it has when it is not cold; one that was admitted cold has one."""
    return max(1, deployment.wished_count)


def _decide(deployment: Deployment, count: int, reason: str, ctx: Context) -> ReplicasDecided:
    return ReplicasDecided(
        at_s=ctx.now_s,
        deployment_id=deployment.deployment_id,
        model=deployment.model,
        replica_count=count,
        reason=reason,
    )

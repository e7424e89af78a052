"""The swapper's decisions. A wake's order leaves before its fact; the node agent's own fact says what became of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kit.outcomes import Context, Input, Outcome, Timer, Under
from kit.service import Service
from schemas.gateways import LoadSampled, ModelWanted
from schemas.nodes import (
    GpuObserved,
    LeaseGranted,
    LeaseReleased,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaSuspect,
    ReplicaWaking,
    WakeRefused,
)
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import GangCommitted, ParkAsked, WakeAsked
from schemas.swapper import DecisionClosed, ParkDecided, WakeDecided
from services.swapper import policy
from services.swapper import state as fold
from services.swapper.policy import Plan
from services.swapper.state import Decision, FleetState, Replica, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Input):
    """Look at what time alone changes: warm windows, returns, unanswered orders."""


def reads(node: str) -> Sequence[str]:
    return ["sublet.fact.node.>", "sublet.fact.placement.>"]


def on_start(state: FleetState, ctx: Context) -> Sequence[Outcome]:
    """Repeat every order that no fact has answered; they are idempotent by wake epoch."""
    return [*(_order(state, d, ctx) for d in state.decisions.values()), _tick(state, ctx)]


def check_invariants(state: FleetState) -> None:
    for decision in state.decisions.values():
        assert decision.replica_id in state.replicas, decision.replica_id


SERVICE: Service[FleetState] = Service(
    name="swapper",
    new_state=fold.new_state,
    reads=reads,
    on_start=on_start,
    check_invariants=check_invariants,
    state_version=2,
)
_FOLDS: tuple[tuple[type, Any], ...] = (
    (NodeJoined, fold.fold_joined),
    (GpuObserved, fold.fold_observed),
    (LeaseGranted, fold.fold_granted),
    (LeaseReleased, fold.fold_released),
    (ReplicaStarting, fold.fold_starting),
    (ReplicaReady, fold.fold_ready),
    (ReplicaDraining, fold.fold_draining),
    (ParkAbandoned, fold.fold_abandoned),
    (ReplicaParked, fold.fold_parked),
    (ReplicaWaking, fold.fold_waking),
    (ReplicaResident, fold.fold_resident),
    (WakeRefused, fold.fold_wake_refused),
    (ReplicaSuspect, fold.fold_suspect),
    (ReplicaFailed, fold.fold_failed),
    (ParkAsked, fold.fold_park_asked),
    (WakeAsked, fold.fold_wake_asked),
    (WakeDecided, fold.fold_wake_decided),
    (ParkDecided, fold.fold_park_decided),
    (DecisionClosed, fold.fold_closed),
    (GangCommitted, fold.fold_committed),
)
for _kind, _fold in _FOLDS:
    SERVICE.folding(_kind)(_fold)


# --- Inputs -----------------------------------------------------------------------------------------------------------


@SERVICE.observing(ModelWanted)
def observe_wanted(state: FleetState, wanted: ModelWanted, now_s: float) -> None:
    fold.observe_wanted(state, wanted, now_s)


@SERVICE.observing(LoadSampled)
def observe_load(state: FleetState, sample: LoadSampled, now_s: float) -> None:
    fold.observe_load(state, sample.gateway, sample.models, now_s)


@SERVICE.on(ModelWanted)
def model_wanted(state: FleetState, wanted: ModelWanted, ctx: Context) -> Sequence[Outcome]:
    """The hot path: from a held request to the wake order, without waiting for anything."""
    replica = state.replicas.get(wanted.replica_id)
    if replica is None or replica.tier is Tier.RESIDENT:
        return []
    known = state.observed.wanted.get(wanted.replica_id)
    if known is not None and ctx.traceparent:
        known.traceparent = ctx.traceparent
    return _wakes(state, replica.share_bytes, ctx)


@SERVICE.on(ReplicaParked)
def replica_parked(state: FleetState, fact: ReplicaParked, ctx: Context) -> Sequence[Outcome]:
    return _wakes_beside(state, fact.replica_id, ctx)


@SERVICE.on(ReplicaResident)
def replica_resident(state: FleetState, fact: ReplicaResident, ctx: Context) -> Sequence[Outcome]:
    return _wakes_beside(state, fact.replica_id, ctx)


@SERVICE.on(LeaseGranted)
def lease_granted(state: FleetState, fact: LeaseGranted, ctx: Context) -> Sequence[Outcome]:
    return []  # The agent starts what fits by itself; the tick sees to the rest.


@SERVICE.on(ParkAsked)
def park_asked(state: FleetState, fact: ParkAsked, ctx: Context) -> Sequence[Outcome]:
    return _parks(state, ctx)


@SERVICE.on(WakeAsked)
def wake_asked(state: FleetState, fact: WakeAsked, ctx: Context) -> Sequence[Outcome]:
    return _wakes(state, _gpus_of(state, fact.deployment_id), ctx)


@SERVICE.on(Tick)
def tick(state: FleetState, tick: Tick, ctx: Context) -> Sequence[Outcome]:
    outcomes: list[Outcome] = [*_repeats(state, ctx), *_parks(state, ctx)]
    return [*outcomes, *_wakes(state, sorted(state.offered_bytes), ctx), _tick(state, ctx)]


# --- Decisions --------------------------------------------------------------------------------------------------------


def _wakes_beside(state: FleetState, replica_id: str, ctx: Context) -> list[Outcome]:
    replica = state.replicas.get(replica_id)
    return [] if replica is None else _wakes(state, replica.share_bytes, ctx)


def _gpus_of(state: FleetState, deployment_id: str) -> list[str]:
    replicas = [replica for replica in state.replicas.values() if replica.deployment_id == deployment_id]
    return sorted({gpu_uuid for replica in replicas for gpu_uuid in replica.share_bytes})


def _wakes(state: FleetState, gpu_uuids: Iterable[str], ctx: Context) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for group in state.groups(gpu_uuids):
        for plan in policy.wakes(state, group, now_s=ctx.now_s):
            outcomes += _decide_wake(state, plan, ctx)
    return outcomes


def _decide_wake(state: FleetState, plan: Plan, ctx: Context) -> list[Outcome]:
    replica = plan.replica
    victim_ids = tuple(victim.replica_id for victim in plan.victims)
    fact = WakeDecided(
        at_s=ctx.now_s,
        node=replica.node,
        replica_id=replica.replica_id,
        model=replica.spec.name,
        wake_epoch=replica.wake_epoch,
        victim_ids=victim_ids,
        reason=plan.reason,
    )
    order = WakeOrdered(
        node=replica.node,
        writer_epoch=ctx.writer_epoch,
        deadline_ms=round(state.settings.order_deadline_s * 1000),
        replica_id=replica.replica_id,
        wake_epoch=replica.wake_epoch,
        victim_ids=victim_ids,
        reason=plan.reason,
    )
    wanted = state.observed.wanted.get(replica.replica_id)
    if wanted is None or not wanted.traceparent or wanted.traceparent == ctx.traceparent:
        return [order, fact]
    return [Under(traceparent=wanted.traceparent, outcome=o) for o in (order, fact)]


def _parks(state: FleetState, ctx: Context) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for replica, reason in policy.expired(state, now_s=ctx.now_s):
        fact = ParkDecided(
            at_s=ctx.now_s,
            node=replica.node,
            replica_id=replica.replica_id,
            model=replica.spec.name,
            wake_epoch=replica.wake_epoch,
            reason=reason,
        )
        outcomes += [fact, _park_order(state, replica, reason, ctx)]
    return outcomes


def _park_order(state: FleetState, replica: Replica, reason: str, ctx: Context) -> ParkOrdered:
    return ParkOrdered(
        node=replica.node,
        writer_epoch=ctx.writer_epoch,
        deadline_ms=round(state.settings.order_deadline_s * 1000),
        replica_id=replica.replica_id,
        wake_epoch=replica.wake_epoch,
        reason=reason,
    )


def _repeats(state: FleetState, ctx: Context) -> list[Outcome]:
    """Orders that no fact has answered: again every `order_repeat_s`, and given up after `order_deadline_s`."""
    outcomes: list[Outcome] = []
    for decision in state.decisions.values():
        age_s = ctx.now_s - decision.decided_at_s
        replica = state.replicas[decision.replica_id]
        if age_s > state.settings.order_deadline_s and replica.tier not in (Tier.STARTING, Tier.WAKING, Tier.DRAINING):
            reason = f"no answer from {replica.node} in {state.settings.order_deadline_s:.0f} s"
            closed = DecisionClosed(
                at_s=ctx.now_s, replica_id=decision.replica_id, wake_epoch=decision.wake_epoch, reason=reason
            )
            outcomes.append(closed)
        elif _is_unheard(replica, decision) and _repeats_now(state, age_s):
            outcomes.append(_order(state, decision, ctx))
    return outcomes


def _is_unheard(replica: Replica, decision: Decision) -> bool:
    resting = (Tier.PARKED, Tier.GRANTED) if decision.is_wake else (Tier.RESIDENT,)
    return replica.tier in resting


def _repeats_now(state: FleetState, age_s: float) -> bool:
    """True once in each period of `order_repeat_s`, as seen by a tick of `tick_s`."""
    period_s = state.settings.order_repeat_s
    return age_s >= period_s and age_s % period_s < state.settings.tick_s


def _order(state: FleetState, decision: Decision, ctx: Context) -> WakeOrdered | ParkOrdered:
    replica = state.replicas[decision.replica_id]
    if not decision.is_wake:
        return _park_order(state, replica, decision.reason, ctx)
    return WakeOrdered(
        node=replica.node,
        writer_epoch=ctx.writer_epoch,
        deadline_ms=round(state.settings.order_deadline_s * 1000),
        replica_id=decision.replica_id,
        wake_epoch=decision.wake_epoch,
        victim_ids=decision.victim_ids,
        reason=decision.reason,
    )


def _tick(state: FleetState, ctx: Context) -> Timer:
    return Timer(due_s=ctx.now_s + state.settings.tick_s, input=Tick())

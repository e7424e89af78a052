"""Placement's decisions: one fact for every command, a proposal or an explanation for every replica."""

from collections.abc import Sequence
from typing import Any

from kit.outcomes import Context, Outcome, Timer
from kit.service import Service
from schemas.autoscaler import ReplicasDecided
from schemas.gateways import LoadSampled
from schemas.nodes import (
    GpuObserved,
    GpuQuarantined,
    GpuReinstated,
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    LeaseResized,
    NodeAlive,
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
from schemas.placement import (
    CommandDuplicated,
    CommandRejected,
    DeploymentAdmitted,
    DeploymentRetired,
    GangAbandoned,
    GangCommitted,
    GpuCloseAsked,
    GpuReinstateAsked,
    KeyAdded,
    KeyRevoked,
    MoveDecided,
    MoveEnded,
    NodeLost,
    NodeReturned,
    ParkAsked,
    PlacementFailed,
    PlacementProposed,
    PreemptionDecided,
    PreemptionEnded,
    QuotaSet,
    ReleaseProposed,
    RepackAsked,
    WakeAsked,
)
from services.placement import claims, gang_folds, gangs, gpu_folds, moves, observed, presence, repacking, tenants
from services.placement import folds as fold
from services.placement.claims import ClaimOverdue
from services.placement.gangs import GangDue, PlaceNext
from services.placement.placing import (
    ReleaseNext,
    next_turn,
    place_missing,
    place_soon,
    release,
    release_all,
    release_next,
    release_some,
    releases_begun,
)
from services.placement.presence import LookAround, QuarantineOver, SettleReturned, Trim
from services.placement.repacking import MoveOn, TidyUp
from services.placement.state import ClusterState, new_state


def reads(node: str) -> Sequence[str]:
    return ["sublet.fact.node.>", "sublet.fact.autoscaler.>"]


def on_start(state: ClusterState, ctx: Context) -> Sequence[Outcome]:
    owed = [*releases_begun(state, ctx), *gangs.begin(state, ctx), *claims.begin(state, ctx)]
    return [next_turn(ctx), *owed, *presence.begin(state, ctx), repacking.look_later(state, ctx)]


def check_invariants(state: ClusterState) -> None:
    """Who is not placed waits; gangs are held as a whole; nobody is counted twice."""
    for deployment_id, deployment in state.deployments.items():
        lacks = state.index.lacking_count(deployment) > 0
        assert lacks == (deployment_id in state.waiting), f"{deployment.spec.name} lacks replicas: {lacks}"
        is_told = bool(deployment.problem) or deployment_id in state.index.untold
        assert is_told or not lacks, f"{deployment.spec.name} is neither placed nor explained nor due"
    for gang in state.gangs.values():
        for ids in gang.replica_ids.values():
            held = [state.replicas[replica_id].is_held for replica_id in ids if replica_id in state.replicas]
            assert all(held), f"{gang.gang_id} is not complete, and a part of it may start"


SERVICE: Service[ClusterState] = Service(
    name="placement",
    new_state=new_state,
    reads=reads,
    on_start=on_start,
    check_invariants=check_invariants,
    state_version=5,
    inbox_cursor=lambda state: state.inbox_seq,
)
_FOLDS: tuple[tuple[type, Any], ...] = (
    (DeploymentAdmitted, fold.fold_admitted),
    (DeploymentRetired, fold.fold_retired),
    (CommandRejected, fold.fold_command),
    (CommandDuplicated, fold.fold_command),
    (ParkAsked, fold.fold_command),
    (WakeAsked, fold.fold_command),
    (KeyAdded, fold.fold_key_added),
    (KeyRevoked, fold.fold_key_revoked),
    (PlacementProposed, fold.fold_proposed),
    (PlacementFailed, fold.fold_failed_placement),
    (ReleaseProposed, fold.fold_release),
    (GangCommitted, gang_folds.fold_committed),
    (GangAbandoned, gang_folds.fold_abandoned),
    (NodeJoined, fold.fold_joined),
    (LeaseGranted, fold.fold_granted),
    (LeaseResized, fold.fold_resized),
    (LeaseRefused, fold.fold_refused),
    (LeaseReleased, fold.fold_released),
    (ReplicaStarting, fold.fold_replica_fact),
    (ReplicaDraining, fold.fold_replica_fact),
    (ReplicaSuspect, fold.fold_replica_fact),
    (ParkAbandoned, fold.fold_replica_fact),
    (ReplicaWaking, fold.fold_replica_fact),
    (ReplicaReady, fold.fold_ready),
    (ReplicaParked, fold.fold_parked),
    (ReplicaResident, fold.fold_resident),
    (WakeRefused, fold.fold_wake_refused),
    (ReplicaFailed, fold.fold_replica_failed),
    (ReplicasDecided, fold.fold_replicas_decided),
    (NodeLost, fold.fold_lost),
    (NodeReturned, fold.fold_returned),
    (RepackAsked, fold.fold_repack_asked),
    (MoveDecided, fold.fold_move_decided),
    (MoveEnded, fold.fold_move_ended),
    (PreemptionDecided, fold.fold_preemption_decided),
    (PreemptionEnded, fold.fold_preemption_ended),
    (QuotaSet, tenants.fold_quota),
    (GpuObserved, gpu_folds.fold_observed),
    (GpuQuarantined, gpu_folds.fold_quarantined),
    (GpuReinstated, gpu_folds.fold_reinstated),
    (GpuReinstateAsked, fold.fold_command),
    (GpuCloseAsked, gpu_folds.fold_close_asked),
)
for _kind, _fold in _FOLDS:
    SERVICE.folding(_kind)(_fold)


# --- Placing ----------------------------------------------------------------------------------------------------------


@SERVICE.on(PlaceNext)
def place_next(state: ClusterState, due: PlaceNext, ctx: Context) -> Sequence[Outcome]:
    return place_missing(state, ctx)


@SERVICE.on(NodeJoined)
def node_joined(state: ClusterState, fact: NodeJoined, ctx: Context) -> Sequence[Outcome]:
    return _back(state, fact.node, ctx) or place_soon(state, ctx)


@SERVICE.on(GpuObserved)
def gpu_observed(state: ClusterState, fact: GpuObserved, ctx: Context) -> Sequence[Outcome]:
    """Strangers left it; where more came, nothing that waits fits now either."""
    return place_soon(state, ctx)


@SERVICE.on(GpuReinstated)
def gpu_reinstated(state: ClusterState, fact: GpuReinstated, ctx: Context) -> Sequence[Outcome]:
    return place_soon(state, ctx)


@SERVICE.on(GpuQuarantined)
def gpu_quarantined(state: ClusterState, fact: GpuQuarantined, ctx: Context) -> Sequence[Outcome]:
    """Whoever made room there need not: its claim has lost its sense."""
    return [next_turn(ctx)] if state.index.unsettled else []


@SERVICE.on(LeaseGranted)
def lease_granted(state: ClusterState, fact: LeaseGranted, ctx: Context) -> Sequence[Outcome]:
    """A gang that is complete starts; a replica that nobody wants any more is released at once."""
    outcomes: list[Outcome] = gangs.settle(state, ctx) if fact.gang_id else []
    for replica_id in dict.fromkeys(lease.replica_id for lease in fact.leases):
        replica = state.replicas.get(replica_id)
        if replica is None or replica.is_releasing or replica.is_held or replica.deployment_id in state.deployments:
            continue
        outcomes.append(release(replica, "its deployment was retired meanwhile", ctx))
    return outcomes


@SERVICE.on(LeaseRefused)
def lease_refused(state: ClusterState, fact: LeaseRefused, ctx: Context) -> Sequence[Outcome]:
    return [*gangs.settle(state, ctx), *_move_on(state, ctx), next_turn(ctx)]


@SERVICE.on(LeaseReleased)
def lease_released(state: ClusterState, fact: LeaseReleased, ctx: Context) -> Sequence[Outcome]:
    return [*gangs.settle(state, ctx), *_move_on(state, ctx), *place_soon(state, ctx)]


@SERVICE.on(ReplicaReady)
def replica_ready(state: ClusterState, fact: ReplicaReady, ctx: Context) -> Sequence[Outcome]:
    """A replacement that is ready ends its move."""
    return _move_on(state, ctx)


@SERVICE.on(ReplicaFailed)
def replica_failed(state: ClusterState, fact: ReplicaFailed, ctx: Context) -> Sequence[Outcome]:
    """One that failed for good leaves its place to others."""
    return place_soon(state, ctx) if fact.is_final else []


@SERVICE.on(ClaimOverdue)
def claim_overdue(state: ClusterState, due: ClaimOverdue, ctx: Context) -> Sequence[Outcome]:
    ended = claims.overdue(state, due, ctx)
    return [*ended, next_turn(ctx)] if ended else []


@SERVICE.on(GangDue)
def gang_due(state: ClusterState, due: GangDue, ctx: Context) -> Sequence[Outcome]:
    if due.gang_id not in state.gangs:
        return []
    missing_count = len(state.gangs[due.gang_id].missing)
    reason = f"{missing_count} of its leases did not come in time"
    return [*gangs.give_up(state, due.gang_id, reason, ctx), next_turn(ctx)]


@SERVICE.on(ReplicasDecided)
def replicas_decided(state: ClusterState, fact: ReplicasDecided, ctx: Context) -> Sequence[Outcome]:
    """Zero is cold: every replica is released. Fewer: those that serve least. More: the missing ones are placed."""
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is None:
        return []
    if fact.replica_count == 0:
        return release_all(state, deployment, f"scaled to zero: {fact.reason}", ctx)
    reason = f"scaled to {fact.replica_count}: {fact.reason}"
    surplus = presence.surplus(state, fact.deployment_id)
    return [*release_some(state, fact.deployment_id, surplus, reason, ctx), *place_soon(state, ctx)]


@SERVICE.on(ReleaseNext)
def released_next(state: ClusterState, due: ReleaseNext, ctx: Context) -> Sequence[Outcome]:
    return release_next(state, due, ctx)


# --- Nodes that come and go -------------------------------------------------------------------------------------------


@SERVICE.observing(LoadSampled)
def observe_load(state: ClusterState, sample: LoadSampled, now_s: float) -> None:
    observed.observe_load(state.observed, sample, now_s)
    state.observed.uses.observe(sample, now_s, state.settings, state.deployments)


@SERVICE.observing(NodeAlive)
def observe_alive(state: ClusterState, alive: NodeAlive, now_s: float) -> None:
    observed.observe_alive(state.observed, alive, now_s, settings=state.settings)


@SERVICE.on(NodeAlive)
def node_alive(state: ClusterState, alive: NodeAlive, ctx: Context) -> Sequence[Outcome]:
    return _back(state, alive.node, ctx)


def _back(state: ClusterState, node: str, ctx: Context) -> list[Outcome]:
    """A lost node is there again: place what waits, now and when its quarantine ends; weigh what it brought."""
    back = presence.returned(state, node, ctx)
    if back is None:
        return []
    settle = presence.settle_later(state, node, returned_at_s=ctx.now_s, ctx=ctx)
    return [back, settle, Timer(due_s=ctx.now_s + back.quarantine_s, input=QuarantineOver())]


@SERVICE.on(QuarantineOver)
def quarantine_over(state: ClusterState, due: QuarantineOver, ctx: Context) -> Sequence[Outcome]:
    return [next_turn(ctx)]


@SERVICE.on(LookAround)
def look_around(state: ClusterState, due: LookAround, ctx: Context) -> Sequence[Outcome]:
    """Nodes that fell silent are lost, and their replicas are placed elsewhere at once."""
    lost = presence.lost(state, ctx)
    again = [next_turn(ctx)] if lost else place_missing(state, ctx, is_look=True)
    return [*lost, *again, *_move_on(state, ctx), presence.look_later(state, ctx)]


@SERVICE.on(SettleReturned)
def settle_returned(state: ClusterState, due: SettleReturned, ctx: Context) -> Sequence[Outcome]:
    return list(presence.settled(state, due.node, ctx))


@SERVICE.on(Trim)
def trim(state: ClusterState, due: Trim, ctx: Context) -> Sequence[Outcome]:
    """What an instance before this one left undone."""
    return list(presence.trimmed(state, state.deployments, "one too many", ctx))


# --- Replicas that are moved ------------------------------------------------------------------------------------------


def _move_on(state: ClusterState, ctx: Context) -> list[Outcome]:
    """Moves that can end do so; then others may begin."""
    facts = moves.advanced(state, ctx)
    ended = [state.moves[fact.move_id].deployment_id for fact in facts if isinstance(fact, MoveEnded)]
    return [*facts, Timer(due_s=ctx.now_s, input=MoveOn(deployment_ids=tuple(ended)))] if ended else []


@SERVICE.on(MoveOn)
def move_on(state: ClusterState, due: MoveOn, ctx: Context) -> Sequence[Outcome]:
    """A replacement counts now: another copy, of a node that came back meanwhile, may be one too many."""
    too_many = presence.trimmed(state, due.deployment_ids, "one too many since its move has ended", ctx)
    return [*too_many, *repacking.begun(state, ctx)]


@SERVICE.on(TidyUp)
def tidy_up(state: ClusterState, due: TidyUp, ctx: Context) -> Sequence[Outcome]:
    return [*repacking.begun(state, ctx), repacking.look_later(state, ctx)]

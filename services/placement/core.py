"""Placement's decisions: one fact for every command, a proposal or an explanation for every replica."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kit.outcomes import Context, Input, Outcome, Timer
from kit.service import Service
from schemas.autoscaler import ReplicasDecided
from schemas.gateways import LoadSampled
from schemas.nodes import (
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    NodeAlive,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaWaking,
    WakeRefused,
)
from schemas.placement import (
    CommandDuplicated,
    CommandRejected,
    DeploymentAdmitted,
    DeploymentRetired,
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
    ReplicaProposal,
    ShareProposal,
    WakeAsked,
)
from services.placement import folds as fold
from services.placement import moves, observed, presence, tenants
from services.placement.choosing import Choice, choose
from services.placement.presence import LookAround, QuarantineOver, SettleReturned
from services.placement.state import ClusterState, Deployment, Replica, new_state


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceNext(Input):
    """Go on with the deployments that came after the one that was proposed."""


def reads(node: str) -> Sequence[str]:
    return ["sublet.fact.node.>", "sublet.fact.autoscaler.>"]


def on_start(state: ClusterState, ctx: Context) -> Sequence[Outcome]:
    return [*place_missing(state, ctx), *presence.begin(state, ctx)]


def check_invariants(state: ClusterState) -> None:
    """Every admitted deployment is placed, or it is known why not, or it comes after one that was just proposed."""
    is_going_on = any(replica.state == "proposed" for replica in state.replicas.values())
    for deployment in state.deployments.values():
        placed = state.placed_count(deployment.deployment_id)
        explained = bool(deployment.problem) or placed >= deployment.replica_count or is_going_on
        assert explained, f"{deployment.spec.name} is neither placed nor explained"


SERVICE: Service[ClusterState] = Service(
    name="placement",
    new_state=new_state,
    reads=reads,
    on_start=on_start,
    check_invariants=check_invariants,
    state_version=2,
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
    (NodeJoined, fold.fold_joined),
    (LeaseGranted, fold.fold_granted),
    (LeaseRefused, fold.fold_refused),
    (LeaseReleased, fold.fold_released),
    (ReplicaStarting, fold.fold_replica_fact),
    (ReplicaDraining, fold.fold_replica_fact),
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
)
for _kind, _fold in _FOLDS:
    SERVICE.folding(_kind)(_fold)


# --- Placing ----------------------------------------------------------------------------------------------------------


def place_missing(state: ClusterState, ctx: Context) -> Iterator[Outcome]:
    """Try every deployment that lacks a replica, in the order of admission; each may take what the last one left.

    One proposal per input, because it changes the account that the next decision needs. The others follow at once, not
    when the node answers: it may be away for long.
    """
    wishes = [state.deployments[deployment_id] for deployment_id in state.waiting]
    missing = sorted(wishes, key=lambda d: (d.admitted_at_s, d.deployment_id))
    for deployment in missing:
        outcomes = place(state, deployment, ctx)
        yield from outcomes
        if any(isinstance(outcome, PlacementProposed) for outcome in outcomes):
            if deployment is not missing[-1]:
                yield Timer(due_s=ctx.now_s, input=PlaceNext())
            return


def place(state: ClusterState, deployment: Deployment, ctx: Context) -> list[Outcome]:
    """A proposal for its next replica, or the reason why there is none (once, not at each try)."""
    spec = deployment.spec
    number = deployment.created_count + 1
    replica_id = f"{_slug(spec.name)}-{deployment.deployment_id}-{number}"
    refused = deployment.refused_nodes
    if len(refused) < state.settings.refusal_count:
        refused = ()  # A refusal may be a matter of a stale view: ask again on a fresh one, a bounded number of times.
    choice = choose(state, spec, refused_nodes=refused, closed=presence.closed(state, ctx.now_s))
    if isinstance(choice, Choice):
        share = ShareProposal(
            replica_id=replica_id,
            shard_index=0,
            gpu_uuid=choice.gpu_uuid,
            request_bytes=choice.request_bytes,
            limit_bytes=choice.limit_bytes,
        )
        proposal = ReplicaProposal(
            replica_id=replica_id,
            deployment_id=deployment.deployment_id,
            tenant=deployment.tenant,
            deployment=spec,
            shares=(share,),
        )
        return [
            PlacementProposed(
                at_s=ctx.now_s,
                proposal_id=f"{replica_id}-{len(deployment.refused_nodes)}",
                node=choice.node,
                replicas=(proposal,),
                reason=choice.reason,
                alternatives=choice.alternatives,
            )
        ]
    if deployment.problem == choice.message:
        return []
    return [
        PlacementFailed(
            at_s=ctx.now_s,
            deployment_id=deployment.deployment_id,
            replica_id=replica_id,
            model=spec.name,
            reason=choice.reason,
            message=choice.message,
            missing_bytes=choice.missing_bytes,
            remedy=choice.remedy,
            alternatives=choice.alternatives,
        )
    ]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in name.lower())[:40].strip("-")


def release_all(state: ClusterState, deployment: Deployment, reason: str, ctx: Context) -> list[Outcome]:
    return [
        _release(replica, reason, ctx)
        for replica in state.replicas_of(deployment.deployment_id)
        if not replica.is_releasing
    ]


def _release(replica: Replica, reason: str, ctx: Context) -> ReleaseProposed:
    return ReleaseProposed(at_s=ctx.now_s, node=replica.node, replica_id=replica.replica_id, reason=reason)


@SERVICE.on(NodeJoined)
def node_joined(state: ClusterState, fact: NodeJoined, ctx: Context) -> Sequence[Outcome]:
    return _back(state, fact.node, ctx) or list(place_missing(state, ctx))


@SERVICE.on(PlaceNext)
def place_next(state: ClusterState, due: PlaceNext, ctx: Context) -> Sequence[Outcome]:
    return list(place_missing(state, ctx))


@SERVICE.on(LeaseGranted)
def lease_granted(state: ClusterState, fact: LeaseGranted, ctx: Context) -> Sequence[Outcome]:
    """Go on with the next deployment; a replica that nobody wants any more is released at once."""
    outcomes: list[Outcome] = []
    for lease in fact.leases:
        replica = state.replicas.get(lease.replica_id)
        if replica is not None and replica.deployment_id not in state.deployments and not replica.is_releasing:
            outcomes.append(_release(replica, "its deployment was retired meanwhile", ctx))
    return [*outcomes, *place_missing(state, ctx)]


@SERVICE.on(LeaseRefused)
def lease_refused(state: ClusterState, fact: LeaseRefused, ctx: Context) -> Sequence[Outcome]:
    return [*moves.advanced(state, ctx), *place_missing(state, ctx)]


@SERVICE.on(LeaseReleased)
def lease_released(state: ClusterState, fact: LeaseReleased, ctx: Context) -> Sequence[Outcome]:
    return [*moves.advanced(state, ctx), *place_missing(state, ctx)]


@SERVICE.on(ReplicaReady)
def replica_ready(state: ClusterState, fact: ReplicaReady, ctx: Context) -> Sequence[Outcome]:
    """A replacement that is ready ends its move."""
    return list(moves.advanced(state, ctx))


@SERVICE.on(ReplicasDecided)
def replicas_decided(state: ClusterState, fact: ReplicasDecided, ctx: Context) -> Sequence[Outcome]:
    """Zero is cold: every replica is released. More: the missing ones are placed."""
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is None:
        return []
    if fact.replica_count == 0:
        return release_all(state, deployment, f"scaled to zero: {fact.reason}", ctx)
    return list(place_missing(state, ctx))


# --- Nodes that come and go -------------------------------------------------------------------------------------------


@SERVICE.observing(LoadSampled)
def observe_load(state: ClusterState, sample: LoadSampled, now_s: float) -> None:
    observed.observe_load(state.observed, sample, now_s)


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
    return list(place_missing(state, ctx))


@SERVICE.on(LookAround)
def look_around(state: ClusterState, due: LookAround, ctx: Context) -> Sequence[Outcome]:
    """Nodes that fell silent are lost, and their replicas are placed elsewhere at once."""
    lost = presence.lost(state, ctx)
    again = [Timer(due_s=ctx.now_s, input=PlaceNext())] if lost else []
    return [*lost, *again, *moves.advanced(state, ctx), presence.look_later(state, ctx)]


@SERVICE.on(SettleReturned)
def settle_returned(state: ClusterState, due: SettleReturned, ctx: Context) -> Sequence[Outcome]:
    return list(presence.settled(state, due.node, ctx))

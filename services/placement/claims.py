"""Room that is being made: from the decision, while the victims leave, to the newcomer's proposal exactly there.

A claim keeps its room from everybody else (`rooms`, `occupancy`). It ends with the newcomer's proposal, or when it has
lost its sense: the newcomer is not wanted any more, its node is lost, room turned up elsewhere, or the victims did not
leave in time. All of it is in the state, so that a new instance goes on where the old one stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kit.outcomes import Context, Input, Outcome, Timer
from schemas.placement import PreemptionDecided, PreemptionEnded, ReasonCode, ReleaseProposed
from services.placement.choosing import Choice
from services.placement.demands import limit_bytes_on
from services.placement.gangs import PlaceNext
from services.placement.packing.fleet import Place
from services.placement.preemption import Preemption
from services.placement.state import Claim, ClusterState, Deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimOverdue(Input):
    """The victims must have left by now."""

    preemption_id: str


def decided(
    state: ClusterState, deployment: Deployment, preemption: Preemption, *, replica_id: str, ctx: Context
) -> list[Outcome]:
    """The room is claimed and its victims are asked to leave, in the order of their ids."""
    preemption_id = f"preempt-{replica_id}"
    settings = state.settings
    fact = PreemptionDecided(
        at_s=ctx.now_s,
        preemption_id=preemption_id,
        deployment_id=deployment.deployment_id,
        replica_id=replica_id,
        model=deployment.spec.name,
        node=preemption.node,
        gpu_uuids=preemption.gpu_uuids,
        request_bytes=preemption.request_bytes,
        victims=preemption.victims,
        reason=preemption.reason,
    )
    releases = [
        ReleaseProposed(
            at_s=ctx.now_s,
            node=state.replicas[victim.replica_id].node,
            replica_id=victim.replica_id,
            reason=f"room for {deployment.spec.name}: {victim.reason}",
            drain_s=settings.preemption_drain_s,
        )
        for victim in preemption.victims
    ]
    overdue = Timer(due_s=ctx.now_s + settings.claim_s_max, input=ClaimOverdue(preemption_id=preemption_id))
    rested = Timer(due_s=ctx.now_s + settings.displaced_rest_s, input=PlaceNext())
    return [fact, *releases, overdue, *([rested] if preemption.victims else [])]


def begin(state: ClusterState, ctx: Context) -> list[Timer]:
    """What a new instance has to look at again: claims that may become overdue, and displaced ones that rest."""
    limits = [
        Timer(
            due_s=max(ctx.now_s, claim.decided_at_s + state.settings.claim_s_max),
            input=ClaimOverdue(preemption_id=claim.preemption_id),
        )
        for claim in state.claims.values()
    ]
    rests = sorted({d.rests_until_s for d in state.deployments.values() if d.rests_until_s > ctx.now_s})
    return [*limits, *(Timer(due_s=until_s, input=PlaceNext()) for until_s in rests)]


def ended(claim: Claim, reason: str, ctx: Context) -> PreemptionEnded:
    return PreemptionEnded(at_s=ctx.now_s, preemption_id=claim.preemption_id, reason=reason)


def overdue(state: ClusterState, due: ClaimOverdue, ctx: Context) -> list[PreemptionEnded]:
    """Who waited so long asks anew, on a fresh view."""
    claim = state.claims.get(due.preemption_id)
    if claim is None or ctx.now_s < claim.decided_at_s + state.settings.claim_s_max:
        return []
    there = [victim.replica_id for victim in claim.victims if victim.replica_id in state.replicas]
    return [ended(claim, f"after {state.settings.claim_s_max:g} s not all have left: {', '.join(there)}", ctx)]


def settled(state: ClusterState, ctx: Context) -> Iterator[tuple[Claim, Choice | str]]:
    """Claims whose room is there, with it, and those that have lost their sense, with the reason; oldest first."""
    for preemption_id in sorted(state.index.unsettled, key=lambda key: (state.claims[key].decided_at_s, key)):
        claim = state.claims[preemption_id]
        deployment = state.deployments.get(claim.deployment_id)
        if deployment is None:
            yield claim, "its newcomer is not wanted any more"
            continue
        siblings = list(state.index.claims_of[claim.deployment_id].values())
        surplus_count = -state.index.lacking_count(deployment)
        if surplus_count > 0 and claim in siblings[-surplus_count:]:
            yield claim, "its newcomer is not wanted any more"
        elif not _has_place(state, claim, ctx.now_s):
            yield claim, f"{claim.node} is lost, in quarantine or has other GPUs or quarantined ones"
        elif not any(victim.replica_id in state.replicas for victim in claim.victims):
            yield claim, choice_of(state, claim, deployment)


def _has_place(state: ClusterState, claim: Claim, now_s: float) -> bool:
    node = state.nodes.get(claim.node)
    if node is None or not node.is_open(now_s):
        return False
    return all(uuid in node.gpus and not node.gpus[uuid].quarantine_reason for uuid in claim.gpu_uuids)


def choice_of(state: ClusterState, claim: Claim, deployment: Deployment) -> Choice:
    """The claimed room, as if it had been chosen."""
    positions = state.index.rooms.positions[claim.node]
    gpus = state.nodes[claim.node].gpus
    share = deployment.spec.share
    limits = [
        max(size_bytes, limit_bytes_on(gpus[uuid], share))
        for uuid, size_bytes in zip(claim.gpu_uuids, claim.request_bytes, strict=True)
    ]
    gone = ", ".join(_names(claim)) or "nobody"
    return Choice(
        place=Place(claim.node, tuple(positions[uuid] for uuid in claim.gpu_uuids), claim.request_bytes),
        gpu_uuids=claim.gpu_uuids,
        limit_bytes=tuple(limits),
        codes=(ReasonCode.ROOM_BY_PREEMPTION,),
        reason=f"room by preemption: {gone} gave way",
    )


def _names(claim: Claim) -> Sequence[str]:
    """The victims' models, each once."""
    return list(dict.fromkeys(victim.model for victim in claim.victims))

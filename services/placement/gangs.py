"""Gangs: every replica gets its lease, and then all start; or every lease goes back, and it is tried again later.

Between proposal and commit the nodes hold the leases, for `gang_hold_s`. Placement gives up before that: what it
commits in time is still held.
"""

from dataclasses import dataclass

from kit.outcomes import Context, Input, Outcome, Timer
from schemas.placement import FailureReason, GangAbandoned, GangCommitted, PlacementFailed, ReasonCode
from services.placement.choosing import NoChoice
from services.placement.gang_folds import gang_pause_s
from services.placement.state import ClusterState, Deployment, Gang
from services.placement.verdicts import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceNext(Input):
    """Place what is due, now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GangDue(Input):
    """The gang must be complete by now."""

    gang_id: str


def id_of(deployment: Deployment) -> str:
    """Of the gang that is proposed next."""
    return f"gang-{deployment.deployment_id}-{deployment.created_count + 1}"


def is_leaving(state: ClusterState, deployment: Deployment) -> bool:
    """Whether replicas of it are on their way out: they are not there any more, and still count as placed.

    On a lost node nobody waits for them: there they do not count.
    """
    here = state.replicas_of(deployment.deployment_id)
    return any(replica.is_releasing and not state.is_lost(replica) for replica in here)


def question(deployment: Deployment, missing_count: int) -> tuple[str, ...]:
    """What is asked when so many must fit at once, for `Rooms.verdict`."""
    return "", f"gang of {missing_count}", deployment.deployment_id


def incomplete(first: NoChoice, *, fit_count: int, wanted_count: int) -> Verdict:
    """Why the gang does not fit, from why the first replica that found no place did not."""
    return Verdict(
        reason=FailureReason.GANG_INCOMPLETE,
        nearest=f"needs {wanted_count} replicas at once and {fit_count} fit; the next one: {first.message}",
        missing_bytes=first.missing_bytes,
        remedy=first.remedy,
        alternatives=first.alternatives,
        codes=(ReasonCode.GANG_INCOMPLETE, *first.codes),
        constraints=first.constraints,
    )


def limit(state: ClusterState, gang_id: str, proposed_at_s: float) -> Timer:
    """When it is given up: half of the time that its leases are held, so that a commit always comes in time."""
    return Timer(due_s=proposed_at_s + state.settings.gang_hold_s / 2, input=GangDue(gang_id=gang_id))


def settle(state: ClusterState, ctx: Context) -> list[Outcome]:
    """Commit what is complete, give up what cannot become so."""
    outcomes: list[Outcome] = []
    for gang_id in sorted(state.gangs):
        gang = state.gangs[gang_id]
        if gang.problem:
            outcomes += give_up(state, gang_id, gang.problem, ctx)
        elif not gang.missing and _is_whole(state, gang):
            outcomes += _commit(gang, ctx)
    return outcomes


def _is_whole(state: ClusterState, gang: Gang) -> bool:
    """With it the deployment has all that it wishes for: also what was lost meanwhile, and is proposed by itself."""
    deployment = state.deployments.get(gang.deployment_id)
    others = [other for other in state.gangs.values() if other.deployment_id == gang.deployment_id]
    is_granted = not any(other.missing or other.problem for other in others)
    return is_granted and (deployment is None or state.index.lacking_count(deployment) <= 0)


def _commit(gang: Gang, ctx: Context) -> list[GangCommitted]:
    return [
        GangCommitted(at_s=ctx.now_s, node=node, gang_id=gang.gang_id, replica_ids=gang.replica_ids[node])
        for node in sorted(gang.replica_ids)
    ]


def abandon(state: ClusterState, gang_id: str, reason: str, ctx: Context) -> list[GangAbandoned]:
    """Every lease goes back, also those that are not granted yet: the node takes both in their order."""
    gang = state.gangs.get(gang_id)
    if gang is None:
        return []
    return [
        GangAbandoned(at_s=ctx.now_s, node=node, gang_id=gang_id, replica_ids=gang.replica_ids[node], reason=reason)
        for node in sorted(gang.replica_ids)
    ]


def give_up(state: ClusterState, gang_id: str, reason: str, ctx: Context) -> list[Outcome]:
    """And try again later; after so many times it is said that it failed, and the pause is a long one."""
    gang = state.gangs[gang_id]
    outcomes: list[Outcome] = list(abandon(state, gang_id, reason, ctx))
    deployment = state.deployments.get(gang.deployment_id)
    if deployment is None:
        return outcomes
    pause_s = gang_pause_s(state.settings, deployment.gang_attempt_count)
    if deployment.gang_attempt_count + 1 >= state.settings.gang_attempt_count:
        name = deployment.spec.name
        granted_count = gang.wanted_count - len(gang.missing)
        failed = PlacementFailed(
            at_s=ctx.now_s,
            deployment_id=gang.deployment_id,
            replica_id=next(iter(gang.missing), gang_id),
            model=name,
            reason=FailureReason.GANG_INCOMPLETE,
            message=f"{name} needs {gang.wanted_count} replicas at once and {granted_count} got a lease: {reason}",
            missing_bytes=0,
            remedy="see the nodes' reasons in the events; it is tried again",
            codes=(ReasonCode.GANG_INCOMPLETE,),
        )
        outcomes.append(failed)
        pause_s = state.settings.gang_pause_max_s
    return [*outcomes, Timer(due_s=ctx.now_s + pause_s, input=PlaceNext())]


def begin(state: ClusterState, ctx: Context) -> list[Outcome]:
    """What a new instance owes to gangs that are under way."""
    limits = [
        limit(state, gang.gang_id, max(gang.proposed_at_s, ctx.now_s - state.settings.gang_hold_s / 2))
        for gang in state.gangs.values()
        if gang.missing and not gang.problem
    ]
    pauses = sorted({d.gang_not_before_s for d in state.deployments.values() if d.gang_not_before_s > ctx.now_s})
    return [*settle(state, ctx), *limits, *(Timer(due_s=until_s, input=PlaceNext()) for until_s in pauses)]

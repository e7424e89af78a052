"""Suspects: steps that have not ended in their time, and engines that are not as their leases say.

A suspect keeps its bytes and gets no request. It is looked at until it is adopted or gone: nothing that can be adopted
is ended, and nothing that has had its time stays as it is.
"""

from collections.abc import Sequence

from kit.outcomes import Context, Outcome, Timer
from schemas.nodes import Ready, ReplicaParked, ReplicaReady, ReplicaResident
from services.nodeagent.core import SERVICE, current, names, stopping
from services.nodeagent.inputs import (
    EngineDoubtful,
    EngineFound,
    EngineInput,
    EngineUnexplained,
    GiveGrace,
    LookDue,
    StepHung,
    StepOverdue,
)
from services.nodeagent.ledger import Ledger
from services.nodeagent.residency import PAUSE_DOUBLINGS_MAX, next_wakes, suspected
from services.nodeagent.state import NodeState, Replica
from services.nodeagent.transitions import Residency


@SERVICE.on(StepOverdue)
def step_overdue(state: NodeState, overdue: StepOverdue, ctx: Context) -> Sequence[Outcome]:
    """Its step has not ended in its time. It has its grace; where it has ended by then, nothing was."""
    if _in_step(state, overdue, overdue.deadline_s) is None:
        return []
    return [
        GiveGrace(
            replica_id=overdue.replica_id,
            lease_epoch=overdue.lease_epoch,
            deadline_s=overdue.deadline_s,
            grace_s=state.settings.step_grace_s,
        )
    ]


@SERVICE.on(StepHung)
def step_hung(state: NodeState, hung: StepHung, ctx: Context) -> Sequence[Outcome]:
    replica = _in_step(state, hung, hung.deadline_s)
    return [] if replica is None else suspected(state, replica, f"it hangs while {replica.residency}", ctx)


def _in_step(state: NodeState, late: EngineInput, deadline_s: float) -> Replica | None:
    """The replica, if it is still in the step that had this deadline."""
    replica = current(state, late)
    return replica if replica is not None and 0 < replica.deadline_s == deadline_s else None


@SERVICE.on(EngineDoubtful)
def engine_doubtful(state: NodeState, doubtful: EngineDoubtful, ctx: Context) -> Sequence[Outcome]:
    replica = current(state, doubtful)
    if replica is None or replica.residency not in (Residency.RESIDENT, Residency.PARKED):
        return []
    return suspected(state, replica, doubtful.reason, ctx)


@SERVICE.on(EngineUnexplained)
def engine_unexplained(state: NodeState, unexplained: EngineUnexplained, ctx: Context) -> Sequence[Outcome]:
    """Look again after a pause."""
    replica = current(state, unexplained)
    return [_look_later(state, replica, ctx)] if replica is not None and replica.residency is Residency.SUSPECT else []


def _look_later(state: NodeState, replica: Replica, ctx: Context) -> Timer:
    factor = 2.0 ** min(PAUSE_DOUBLINGS_MAX, replica.look_count)
    due = LookDue(replica_id=replica.proposal.replica_id, lease_epoch=replica.lease_epoch)
    return Timer(due_s=ctx.now_s + factor * state.settings.look_pause_s, input=due)


@SERVICE.on(LookDue)
def look_due(state: NodeState, due: LookDue, ctx: Context) -> Sequence[Outcome]:
    replica = current(state, due)
    if replica is None or replica.residency is not Residency.SUSPECT:
        return []
    return suspected(state, replica, f"in doubt after {replica.look_count + 1} looks", ctx)


@SERVICE.on(EngineFound)
def engine_found(state: NodeState, found: EngineFound, ctx: Context) -> Sequence[Outcome]:
    """Adopted as it is: serving with its share, or parked with what it was measured to keep.

    One that was to be released is released. One that serves without holding its share is so only where there is room.
    """
    replica = current(state, found)
    if replica is None or replica.residency is not Residency.SUSPECT:
        return []
    if replica.suspect_from is Residency.RELEASING:
        return list(stopping(state, replica, "a suspect that was to be released", ctx, drain_s=0.0))
    can_be = replica.is_started if found.is_parked else Ledger(state).has_unclaimed(replica.wanted_bytes)
    if not can_be:
        return [_look_later(state, replica, ctx)]
    if found.is_parked:
        residues = dict(zip(replica.share_bytes, found.residues, strict=True))
        return [_parked(state, replica, found, ctx), *next_wakes(state, ctx, freed=replica, residues=residues)]
    return [_resident(state, replica, found, ctx)]


def _parked(state: NodeState, replica: Replica, found: EngineFound, ctx: Context) -> ReplicaParked:
    return ReplicaParked(
        **names(state, replica, ctx),
        wake_epoch=replica.wake_epoch + 1,
        residue_bytes=sum(found.residues),
        host_bytes=replica.proposal.deployment.engine.weights_bytes,
        copied_bytes=0,
        park_s=0.0,
        drain_s=0.0,
        reason="a suspect that was found parked",
        swap_driver=replica.swap_driver,
        shard_residue_bytes=found.residues,
    )


def _resident(state: NodeState, replica: Replica, found: EngineFound, ctx: Context) -> ReplicaReady | ReplicaResident:
    """One that had never been told ready is told so."""
    took_s = max(0.0, ctx.now_s - replica.since_s)
    if replica.is_started:
        return ReplicaResident(
            **names(state, replica, ctx),
            wake_epoch=replica.wake_epoch,
            endpoint=found.endpoint,
            copied_bytes=0,
            reserve_s=0.0,
            restore_s=0.0,
            verify_s=0.0,
            wake_s=took_s,
        )
    ready = Ready(
        replica_id=replica.proposal.replica_id,
        deployment_id=replica.proposal.deployment_id,
        model=replica.proposal.deployment.name,
        endpoint=found.endpoint,
        wake_epoch=replica.wake_epoch,
        lease_epoch=replica.lease_epoch,
        start_s=took_s,
        enforced_bytes=found.enforced_bytes,
        swap_driver=replica.swap_driver,
    )
    return ReplicaReady(node=state.settings.node, at_s=ctx.now_s, replicas=(ready,))

"""The timers that a state demands. A new life of the agent sets them again: those of the one before are lost. Pure.

Each is counted from the fact that set it first, so that a return neither forgets what was to come nor puts it off.
"""

from collections.abc import Iterator

from kit.outcomes import Context, Timer
from services.nodeagent.inputs import GangHoldOver, RestartDue, StepOverdue
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.state import NodeState, Replica
from services.nodeagent.transitions import Residency


def timers_of(state: NodeState, ctx: Context) -> Iterator[Timer]:
    """Of its replicas."""
    yield from _holds(state)
    yield from _steps(state, ctx)
    yield from _restarts(state, ctx)


def _holds(state: NodeState) -> Iterator[Timer]:
    """One for each gang whose leases are held here: when their hold ends, counted from the grant, not from now."""
    ends_s = {replica.held_for: replica.hold_ends_s for replica in state.replicas.values() if replica.held_for}
    for gang_id, due_s in ends_s.items():
        yield Timer(due_s=due_s, input=GangHoldOver(gang_id=gang_id))


def _steps(state: NodeState, ctx: Context) -> Iterator[Timer]:
    """For every step that an earlier life left; each gets a while at least, to be taken up by this one."""
    shortest_s = state.settings.wake_deadline_s
    for replica in state.replicas.values():
        if replica.deadline_s > 0:
            late = StepOverdue(
                replica_id=replica.proposal.replica_id,
                lease_epoch=replica.lease_epoch,
                deadline_s=replica.deadline_s,
            )
            yield Timer(due_s=max(replica.deadline_s, ctx.now_s + shortest_s), input=late)


def _restarts(state: NodeState, ctx: Context) -> Iterator[Timer]:
    """For every engine that is to be tried again; one whose pause is over is tried now."""
    for replica in state.replicas.values():
        if replica.residency is Residency.GRANTED and replica.attempt_count > 0:
            due_s = replica.since_s + restart_pause_s(state.settings, replica.attempt_count)
            yield restart(replica, lease_epoch=replica.lease_epoch, due_s=max(ctx.now_s, due_s))


def restart(replica: Replica, *, lease_epoch: int, due_s: float) -> Timer:
    due = RestartDue(replica_id=replica.proposal.replica_id, lease_epoch=lease_epoch)
    return Timer(due_s=due_s, input=due)


def restart_pause_s(settings: NodeAgentSettings, attempt_count: int) -> float:
    """After so many failed starts in a row, 1 at least."""
    pause_s: float = settings.restart_backoff_s * 2 ** (attempt_count - 1)
    return pause_s

"""Moves: a replacement first, then the old replica ends; and when to begin one (`defragment` says which).

The old replica is released only when its replacement stands in for it: it was ready, and its process lives. That holds
for a parked one too: it is guaranteed its return by a deadline, and a cold start would break that. Only a replica that
never started has nothing to lose: it goes as soon as its replacement has its lease. Whatever else happens, the old one
stays.
"""

from collections.abc import Iterator
from typing import Final

from kit.outcomes import Context
from schemas.placement import MoveEnded, PlacementFact, ReleaseProposed
from services.placement.state import ClusterState, Move, Replica

STANDS_IN: Final = frozenset({"resident", "parked", "waking", "draining"})
"""States in which a replica that was ready once has a process; `draining` only while it is not being released."""


def advanced(state: ClusterState, ctx: Context) -> list[PlacementFact]:
    """What the moves under way lead to now, in the order of their beginning. O(moves)."""
    return [fact for move in state.moves.values() for fact in _next(state, move, ctx)]


def _next(state: ClusterState, move: Move, ctx: Context) -> Iterator[PlacementFact]:
    old, new = state.replicas.get(move.replica_id), state.replicas.get(move.replacement_id)
    if move.deployment_id not in state.deployments:
        yield _ended(move, "its deployment was retired", ctx)
    elif new is None or new.is_releasing:
        yield _ended(move, "the replacement was refused or has ended", ctx)
    elif old is None or old.is_releasing:
        yield _ended(move, "the replica has ended by itself: the replacement takes its place", ctx)
    elif state.is_lost(old):
        yield _ended(move, f"{old.node} is lost: the replacement takes its place", ctx)
    elif problem := _problem(state, move, new, ctx):
        yield _released(new, f"the move is given up: {problem}", state.settings.move_drain_s, ctx)
        yield _ended(move, problem, ctx)
    elif stands_in(new, old):
        yield _released(old, f"moved to {new.node}", state.settings.move_drain_s, ctx)
        yield _ended(move, f"{new.replica_id} stands in", ctx, is_done=True)


def _problem(state: ClusterState, move: Move, new: Replica, ctx: Context) -> str:
    """Why the replacement will not do; '' as long as it may."""
    if state.is_lost(new):
        return f"{new.node} is lost"
    if new.state == "failed":
        return f"the replacement failed: {new.problem}"
    if ctx.now_s - move.decided_at_s >= state.settings.move_timeout_s and not stands_in_for_requests(new):
        return f"the replacement was not ready after {state.settings.move_timeout_s:.0f} s"
    return ""


def stands_in(new: Replica, old: Replica) -> bool:
    """Whether the old one may go without any request noticing it."""
    if old.state == "granted" and old.ready_at_s is None:
        return new.state != "proposed"
    return stands_in_for_requests(new)


def stands_in_for_requests(new: Replica) -> bool:
    return new.ready_at_s is not None and new.state in STANDS_IN


def _ended(move: Move, reason: str, ctx: Context, *, is_done: bool = False) -> MoveEnded:
    return MoveEnded(at_s=ctx.now_s, move_id=move.move_id, is_done=is_done, reason=reason)


def _released(replica: Replica, reason: str, drain_s: float, ctx: Context) -> ReleaseProposed:
    return ReleaseProposed(
        at_s=ctx.now_s, node=replica.node, replica_id=replica.replica_id, reason=reason, drain_s=drain_s
    )

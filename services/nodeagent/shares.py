"""Shares that grow and shrink: who bursts, who gives back, and what becomes of each change.

A growing grant is a fact before its engine may use it; a shrinking one is a fact after its use is proven. So at any
instant the account holds at least what engines can have.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from kit.outcomes import Context, Outcome, Timer
from schemas.nodes import BorrowAccounted, GaveBack, GiveBackAsked, LeaseResized, NodeFact, ResizeReason
from services.nodeagent import accounts, bursting, giving_back
from services.nodeagent import state as fold
from services.nodeagent.bursting import Burster
from services.nodeagent.core import SERVICE, current, names
from services.nodeagent.demand import Demand, heard
from services.nodeagent.inputs import BurstDue, EngineNotResized, EngineResized, GiveBackDue, LoadMeasured
from services.nodeagent.ledger import Ledger
from services.nodeagent.residency import come_back, wakes_from
from services.nodeagent.state import NodeState, Replica
from services.nodeagent.transitions import Residency


def _counted_before(folded: Callable[[NodeState, Any], None]) -> Callable[[NodeState, Any], None]:
    """Whatever a fact of ours changes, what was lent until then is counted as it was."""

    def count_and_fold(state: NodeState, fact: Any) -> None:
        accounts.count(state, fact.at_s)
        folded(state, fact)

    return count_and_fold


def _resized(state: NodeState, fact: LeaseResized) -> None:
    fold.fold_resized(state, fact)
    accounts.begin(state, fact.replica_id, fact.at_s)


SERVICE.folding(LeaseResized)(_resized)
SERVICE.folding(GiveBackAsked)(fold.fold_asked)
SERVICE.folding(GaveBack)(fold.fold_gave_back)

for _kind in [kind for kind in SERVICE.folds if issubclass(kind, NodeFact)]:
    SERVICE.folds[_kind] = _counted_before(SERVICE.folds[_kind])
SERVICE.folding(BorrowAccounted)(accounts.fold_accounted)

OVERDUE_S = 5.0
"""A step whose timer was lost is ended so long after its time."""


@SERVICE.on(BurstDue)
def burst_due(state: NodeState, due: BurstDue, ctx: Context) -> Sequence[Outcome]:
    """Share out what no lease claims, take from those who have more than their part, and look after the ladder."""
    outcomes: list[Outcome] = []
    if state.settings.burst_tick_s > 0:
        outcomes.append(Timer(due_s=ctx.now_s + state.settings.burst_tick_s, input=BurstDue()))
    for replica in state.replicas.values():
        if replica.giving_back is not None and due.is_first:
            outcomes += giving_back.resumed(state, replica, ctx)
    if due.is_first or state.settings.burst_tick_s <= 0:
        return outcomes
    outcomes += accounts.statements(state, now_s=ctx.now_s)
    here = bursting.bursters(state, now_s=ctx.now_s)
    if here or any(replica.is_due_back for replica in state.replicas.values()):
        ledger = Ledger(state)
        outcomes += come_back(state, ledger, ctx)
        outcomes += _shared_out(state, here, ledger, ctx)
    return [*outcomes, *_overdue(state, ctx)]


def _shared_out(state: NodeState, here: Sequence[Burster], ledger: Ledger, ctx: Context) -> Iterator[Outcome]:
    step_bytes = state.settings.burst_step_bytes
    extras = bursting.fair_extras(here, bursting.room_bytes(ledger, here), step_bytes=step_bytes)
    for burster, extra_bytes, other in bursting.surpluses(here, extras, step_bytes=step_bytes):
        replica = state.replicas[burster.replica_id]
        yield GiveBackAsked(
            **names(state, replica, ctx),
            for_replica_id=other.replica_id if other is not None else "",
            asked_bytes=burster.extra_bytes - extra_bytes,
            is_owed=False,
        )
        yield from giving_back.resized(
            replica,
            ResizeReason.GIVE_BACK,
            _granted(replica, extra_bytes),
            deadline_s=state.settings.give_back_deadline_s,
            ctx=ctx,
        )
    for burster, extra_bytes in bursting.growths(here, extras, ledger, step_bytes=step_bytes):
        replica = state.replicas[burster.replica_id]
        granted = _granted(replica, extra_bytes)
        yield _told(state, replica, granted, ResizeReason.BURST, 0.0, ctx)
        deadline_s = state.settings.grow_deadline_s
        grow, _ = giving_back.resized(replica, ResizeReason.BURST, granted, deadline_s=deadline_s, ctx=ctx)
        yield grow  # Nobody waits for it: it needs no timer.


@SERVICE.observing(LoadMeasured)
def observe_load(state: NodeState, measured: LoadMeasured, now_s: float) -> None:
    demands = state.observed.demands
    for gone in demands.keys() - state.replicas.keys():
        del demands[gone]
    if measured.replica_id in state.replicas:
        now = Demand(
            lease_epoch=measured.lease_epoch,
            kv_used_fraction=measured.kv_used_fraction,
            waiting_count=measured.waiting_count,
            at_s=now_s,
        )
        demands[measured.replica_id] = heard(demands.get(measured.replica_id), now)


@SERVICE.on(LoadMeasured)
def load_measured(state: NodeState, measured: LoadMeasured, ctx: Context) -> Sequence[Outcome]:
    """The next look at shares decides by it."""
    return []


def _overdue(state: NodeState, ctx: Context) -> Iterator[Outcome]:
    """Steps that nobody has ended, because their timer came while their replica was not resident."""
    longest_s = max(state.settings.give_back_deadline_s, state.settings.drain_s + state.settings.wake_deadline_s)
    for replica in state.replicas.values():
        giving = replica.giving_back
        if giving is not None and ctx.now_s > giving.step_at_s + longest_s + OVERDUE_S:
            yield from giving_back.resumed(state, replica, ctx)


def _granted(replica: Replica, extra_bytes: int) -> tuple[int, ...]:
    return tuple(size + extra_bytes for size in replica.request_bytes.values())


def _told(
    state: NodeState,
    replica: Replica,
    granted: tuple[int, ...],
    reason: ResizeReason,
    resize_s: float,
    ctx: Context,
    failed: EngineNotResized | None = None,
) -> LeaseResized:
    return LeaseResized(
        **names(state, replica, ctx),
        granted_bytes=granted,
        reason=reason,
        resize_s=resize_s,
        problem=failed.problem if failed is not None else "",
        is_able=failed is None or failed.is_able,
    )


@SERVICE.on(EngineResized)
def engine_resized(state: NodeState, resized: EngineResized, ctx: Context) -> Sequence[Outcome]:
    replica = _resizing(state, resized)
    if replica is None or resized.reason is ResizeReason.BURST:
        return []
    return _settled(state, replica, resized, "", ctx)


@SERVICE.on(EngineNotResized)
def engine_not_resized(state: NodeState, failed: EngineNotResized, ctx: Context) -> Sequence[Outcome]:
    """A borrower that has not given all still has given what is proven; one that could not grow has what it had."""
    replica = _resizing(state, failed)
    return [] if replica is None else _settled(state, replica, failed, failed.problem, ctx)


@SERVICE.on(GiveBackDue)
def give_back_due(state: NodeState, due: GiveBackDue, ctx: Context) -> Sequence[Outcome]:
    """Nothing came back of a step in its time: the next one, with nothing proven."""
    replica = current(state, due)
    if replica is None or replica.giving_back is None or replica.resize_epoch != due.resize_epoch:
        return []
    problem = "no answer in its time"
    if replica.residency is Residency.DRAINING:
        end = giving_back.StepEnd(freed_bytes=0, problem=problem)
        return giving_back.onward(state, replica, end, debt_bytes=0, ctx=ctx)
    if replica.residency is not Residency.RESIDENT:
        return []
    ledger = Ledger(state)
    outcomes, changed = giving_back.settled(state, replica, replica.granted_bytes, ledger, problem, ctx)
    return [*outcomes, *wakes_from(state, ledger, ctx, changed=changed)]


def _resizing(state: NodeState, result: EngineResized | EngineNotResized) -> Replica | None:
    """The replica, if this is the end of its latest resize."""
    replica = current(state, result)
    if replica is None or replica.residency is not Residency.RESIDENT or replica.resize_epoch != result.resize_epoch:
        return None
    return replica


def _settled(
    state: NodeState, replica: Replica, result: EngineResized | EngineNotResized, problem: str, ctx: Context
) -> Sequence[Outcome]:
    """The grant is what is proven, between its request and what it was; then whoever waits for the bytes."""
    proven = max(now - least for now, least in zip(result.granted_bytes, replica.request_bytes.values(), strict=True))
    granted = _granted(replica, max(0, min(proven, *replica.borrowed_bytes.values())))
    outcomes: list[Outcome] = []
    ledger = Ledger(state)
    is_growth = result.reason is ResizeReason.BURST
    if granted != replica.granted_bytes or is_growth:
        reason = ResizeReason.GIVE_BACK if is_growth else result.reason
        failed = result if is_growth and isinstance(result, EngineNotResized) else None
        outcomes.append(_told(state, replica, granted, reason, result.resize_s, ctx, failed))
        freed = {
            gpu_uuid: before - after
            for (gpu_uuid, before), after in zip(replica.share_bytes.items(), granted, strict=True)
        }
        ledger.hold({gpu_uuid: -size for gpu_uuid, size in freed.items()})
        ledger.settle_loan(freed)
    elif replica.giving_back is None:
        return []
    changed = replace(replica, share_bytes=dict(zip(replica.share_bytes, granted, strict=True)))
    if replica.giving_back is not None:
        more, changed = giving_back.settled(state, replica, granted, ledger, problem, ctx)
        outcomes += more
    return [*outcomes, *wakes_from(state, ledger, ctx, changed=changed)]

"""Who gives borrowed bytes back when an owner wants them, and by which step; least harm first.

freeze (at what it uses) -> shrink (to what it is asked for) -> park (by itself) -> checkpoint (by the driver) -> stop.
A step that has not brought what was asked for is followed by the next. The last always brings it, so that nobody waits
for ever.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kit.outcomes import Context, Outcome, Timer
from schemas.nodes import GaveBack, GiveBackAsked, GiveBackStep, ReplicaDraining, ResizeReason
from services.nodeagent.core import effect, names, overdue
from services.nodeagent.core import step as begins
from services.nodeagent.inputs import EvictEngine, GiveBackDue, ParkEngine, ResizeEngine
from services.nodeagent.ledger import Ledger
from services.nodeagent.state import PARKS, GivingBack, NodeState, Replica, next_step
from services.nodeagent.transitions import Residency

LATE_S = 0.5
"""So long an effect may be late with the answer that its own deadline has ended."""
AWAY = "the agent was away"
DRAINED_S = 1.0
"""Whoever has had his time to end his requests, for a park, has so long once more for a checkpoint."""


def borrowers(state: NodeState, gpu_uuids: Collection[str], *, changed: Replica | None = None) -> list[Replica]:
    """Who has more than its request on one of these, in the order in which they give.

    `changed`: one of them, as it is after the decision at hand.
    """
    found = []
    for known in state.replicas.values():
        is_changed = changed is not None and known.proposal.replica_id == changed.proposal.replica_id
        replica = changed if changed is not None and is_changed else known
        borrows = any(replica.borrowed_bytes.get(gpu_uuid, 0) > 0 for gpu_uuid in gpu_uuids)
        if replica.residency is Residency.RESIDENT and borrows:
            found.append(replica)
    return sorted(found, key=victim_order)


def victim_order(replica: Replica) -> tuple[int, int, float, int, str]:
    """Lowest priority, most bytes over the request, most time to return, cheapest return; ties by id."""
    spec = replica.proposal.deployment
    return (
        spec.priority_number,
        -sum(replica.borrowed_bytes.values()),
        -spec.swap.return_deadline_s,
        spec.engine.weights_bytes,
        replica.proposal.replica_id,
    )


def owed(asked: Iterable[Replica], lacking: Mapping[str, int]) -> dict[str, int]:
    """{replica_id: what it owes on each of its GPUs}: those who give first give all that they can before the next."""
    left = dict(lacking)
    debts: dict[str, int] = {}
    for replica in sorted(asked, key=victim_order):
        borrowed = replica.borrowed_bytes
        most_bytes = max(borrowed.values(), default=0)
        debt = min(most_bytes, max((left.get(gpu_uuid, 0) for gpu_uuid in borrowed), default=0))
        debts[replica.proposal.replica_id] = max(0, debt)
        for gpu_uuid, size in borrowed.items():
            if gpu_uuid in left:
                left[gpu_uuid] -= min(size, max(0, debt))
    return debts


def lacking_bytes(ledger: Ledger, gpu_uuids: Iterable[str]) -> dict[str, int]:
    """By GPU: what waiting wakes want there that only borrowers can give; those that lack nothing are left out."""
    amounts = {gpu_uuid: ledger.lacking_bytes(gpu_uuid) for gpu_uuid in gpu_uuids}
    return {gpu_uuid: size for gpu_uuid, size in amounts.items() if size > 0}


def pursue(
    state: NodeState,
    ledger: Ledger,
    ctx: Context,
    *,
    for_replica_id: str = "",
    without: Collection[str] = (),
    changed: Replica | None = None,
) -> list[Outcome]:
    """Ask the borrowers of every GPU on which waiting wakes lack what those who are asked already cannot give.

    The ledger is as after this decision; `without`: replicas that it sends away; `changed`: one that it has changed.
    """
    lacking = lacking_bytes(ledger, state.gpus)
    if not lacking:
        return []
    here = [each for each in borrowers(state, lacking, changed=changed) if each.proposal.replica_id not in without]
    asked = [each for each in here if each.giving_back is not None and each.giving_back.is_owed]
    for replica in asked:
        for gpu_uuid, size in replica.borrowed_bytes.items():
            if gpu_uuid in lacking:
                lacking[gpu_uuid] -= size
    short = {gpu_uuid: size for gpu_uuid, size in lacking.items() if size > 0}
    wanted_bytes = max(short.values(), default=0)
    owner = for_replica_id or _oldest_waiting(state)
    return [
        outcome
        for replica in here
        if replica not in asked and any(replica.borrowed_bytes.get(gpu_uuid, 0) > 0 for gpu_uuid in short)
        for outcome in ask(state, replica, for_replica_id=owner, asked_bytes=wanted_bytes, ctx=ctx)
    ]


def _oldest_waiting(state: NodeState) -> str:
    waiting = [each for each in state.replicas.values() if each.residency is Residency.WAITING]
    first = min(waiting, key=lambda each: (each.ordered_at_s, each.proposal.replica_id), default=None)
    return first.proposal.replica_id if first is not None else ""


def ask(state: NodeState, replica: Replica, *, for_replica_id: str, asked_bytes: int, ctx: Context) -> list[Outcome]:
    """The first step: it is held at what it uses."""
    asked = GiveBackAsked(**names(state, replica, ctx), for_replica_id=for_replica_id, asked_bytes=asked_bytes)
    return [asked, *frozen(state, replica, ctx)]


def frozen(state: NodeState, replica: Replica, ctx: Context) -> list[Outcome]:
    least = tuple(replica.request_bytes.values())
    deadline_s = state.settings.freeze_deadline_s
    return resized(replica, ResizeReason.FREEZE, least, deadline_s=deadline_s, ctx=ctx)


def shrunk(state: NodeState, replica: Replica, *, debt_bytes: int, asked_at_s: float, ctx: Context) -> list[Outcome]:
    """To its grant less its debt, at least by a step, never below its request; the same on each of its GPUs."""
    least_s = state.settings.freeze_deadline_s
    deadline_s = max(least_s, asked_at_s + state.settings.give_back_deadline_s - ctx.now_s)
    extra_bytes = max(0, min(replica.borrowed_bytes.values()) - max(debt_bytes, state.settings.burst_step_bytes))
    target = tuple(share.request_bytes + extra_bytes for share in replica.proposal.shares)
    return resized(replica, ResizeReason.GIVE_BACK, target, deadline_s=deadline_s, ctx=ctx)


def resized(
    replica: Replica, reason: ResizeReason, granted: tuple[int, ...], *, deadline_s: float, ctx: Context
) -> list[Outcome]:
    """The effect and when it is late; goes with a fact that raises its resize epoch."""
    resize_epoch = replica.resize_epoch + 1
    resize = effect(
        ResizeEngine,
        replica,
        reason=reason,
        granted_bytes=granted,
        before_bytes=replica.granted_bytes,
        resize_epoch=resize_epoch,
        deadline_s=deadline_s,
    )
    return [resize, due(replica, resize_epoch, at_s=ctx.now_s + deadline_s + LATE_S)]


def due(replica: Replica, resize_epoch: int, *, at_s: float) -> Timer:
    late = GiveBackDue(
        replica_id=replica.proposal.replica_id, lease_epoch=replica.lease_epoch, resize_epoch=resize_epoch
    )
    return Timer(due_s=at_s, input=late)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """How a step of the ladder ended."""

    freed_bytes: int
    problem: str = ""
    """Empty: it did what it was asked for."""


def gave_back(
    state: NodeState, replica: Replica, end: StepEnd, *, is_enough: bool, ctx: Context, step: GiveBackStep | None = None
) -> GaveBack:
    giving = replica.giving_back
    assert giving is not None, replica.proposal.replica_id
    return GaveBack(
        **names(state, replica, ctx),
        step=step or giving.step,
        for_replica_id=giving.for_replica_id,
        asked_bytes=giving.asked_bytes,
        freed_bytes=end.freed_bytes,
        step_s=max(0.0, ctx.now_s - giving.step_at_s),
        is_enough=is_enough,
        reason=end.problem,
    )


def onward(state: NodeState, replica: Replica, end: StepEnd, *, debt_bytes: int, ctx: Context) -> Sequence[Outcome]:
    """It owes more than this step brought: the fact that says so, and the next step."""
    giving = replica.giving_back
    assert giving is not None, replica.proposal.replica_id
    assert giving.is_owed, replica.proposal.replica_id
    told = gave_back(state, replica, end, is_enough=False, ctx=ctx)
    step = next_step(state, replica, giving.step)
    return [told, *_taken(state, replica, giving, step, debt_bytes=debt_bytes, ctx=ctx)]


def ended(
    state: NodeState, replica: Replica, freed: Mapping[str, int], ctx: Context, *, problem: str = ""
) -> list[Outcome]:
    """Its park or its end has brought all that it borrowed: the ladder ends, if it was on it."""
    if replica.giving_back is None:
        return []
    end = StepEnd(freed_bytes=max(freed.values(), default=0), problem=problem)
    return [gave_back(state, replica, end, is_enough=True, ctx=ctx)]


def after_stay(state: NodeState, replica: Replica, ledger: Ledger, reason: str, ctx: Context) -> list[Outcome]:
    """It did not park. What waits and lacks bytes asks it, or asks it more harshly if the park was its step."""
    giving = replica.giving_back
    staying = replace(replica, residency=Residency.RESIDENT, giving_back=None)
    if giving is None or giving.step not in PARKS:
        return pursue(state, ledger, ctx, changed=staying)
    end = StepEnd(freed_bytes=0, problem=reason)
    asked = [each for each in borrowers(state, state.gpus) if each.giving_back is not None]
    debts = owed([*asked, staying], lacking_bytes(ledger, state.gpus))
    debt_bytes = debts[replica.proposal.replica_id]
    if debt_bytes <= 0:
        return [gave_back(state, replica, end, is_enough=True, ctx=ctx)]
    return list(onward(state, replace(staying, giving_back=giving), end, debt_bytes=debt_bytes, ctx=ctx))


def comes_back(replica: Replica, *, wake_epoch: int, residues: Mapping[str, int], ctx: Context) -> Replica | None:
    """As it waits for its own request, if it was checkpointed and is never to be away; None: it comes when wanted."""
    giving = replica.giving_back
    if giving is None or giving.step is not GiveBackStep.CHECKPOINT or replica.proposal.deployment.swap.is_parkable:
        return None
    return replace(
        replica,
        residency=Residency.WAITING,
        share_bytes=replica.request_bytes,
        residue_bytes=dict(residues),
        swap_driver=replica.parks_by,
        giving_back=None,
        wake_epoch=wake_epoch,
        ordered_at_s=ctx.now_s,
    )


def settled(
    state: NodeState, replica: Replica, granted: tuple[int, ...], ledger: Ledger, problem: str, ctx: Context
) -> tuple[list[Outcome], Replica]:
    """The end of a step of a resident borrower that lives in this grant now, what follows, and how it is after that.

    The ledger has the new grant already.
    """
    giving = replica.giving_back
    assert giving is not None, replica.proposal.replica_id
    before = replica.granted_bytes
    fresh = replace(replica, share_bytes=dict(zip(replica.share_bytes, granted, strict=True)))
    freed_bytes = max(old - new for old, new in zip(before, granted, strict=True))
    end = StepEnd(freed_bytes=freed_bytes, problem=problem)
    asked = [each for each in borrowers(state, state.gpus, changed=fresh) if each.giving_back is not None]
    debt_bytes = owed(asked, lacking_bytes(ledger, state.gpus)).get(replica.proposal.replica_id, 0)
    has_obeyed = giving.step is GiveBackStep.SHRINK and not problem
    if not giving.is_owed or has_obeyed or debt_bytes <= 0:
        told = gave_back(state, replica, end, is_enough=not problem or debt_bytes <= 0, ctx=ctx)
        return [told], replace(fresh, giving_back=None, resize_epoch=replica.resize_epoch + 1)
    return list(onward(state, fresh, end, debt_bytes=debt_bytes, ctx=ctx)), fresh


def _taken(
    state: NodeState, replica: Replica, giving: GivingBack, step: GiveBackStep, *, debt_bytes: int, ctx: Context
) -> list[Outcome]:
    name = _wanting(giving)
    match step:
        case GiveBackStep.SHRINK:
            return shrunk(state, replica, debt_bytes=debt_bytes, asked_at_s=giving.asked_at_s, ctx=ctx)
        case GiveBackStep.PARK | GiveBackStep.CHECKPOINT:
            reason = f"did not give back for {name}"
            draining = ReplicaDraining(**begins(state, replica, Residency.DRAINING, ctx), reason=reason)
            leaving = replace(replica, residency=Residency.DRAINING, giving_back=replace(giving, step=step))
            drain_s = DRAINED_S if giving.step is GiveBackStep.PARK else state.settings.drain_s
            return [
                draining,
                effect(ParkEngine, leaving, drain_s=drain_s, reason=reason),
                overdue(draining),
                parking_due(state, replica, replica.resize_epoch + 2, ctx),
            ]
        case _:
            return [effect(EvictEngine, replica, reason=f"it did not give back for {name}")]


def _wanting(giving: GivingBack) -> str:
    return giving.for_replica_id or "strangers on its GPU"


def parking_due(state: NodeState, replica: Replica, resize_epoch: int, ctx: Context) -> Timer:
    lasts_s = state.settings.drain_s + state.settings.wake_deadline_s
    return due(replica, resize_epoch, at_s=ctx.now_s + lasts_s + LATE_S)


def resumed(state: NodeState, replica: Replica, ctx: Context) -> list[Outcome]:
    """The ladder of an earlier life of this agent goes on.

    A resize that was on its way is asked for anew, from the first step: nobody is harmed because the agent was away.
    """
    giving = replica.giving_back
    assert giving is not None, replica.proposal.replica_id
    if not giving.is_owed:
        return [gave_back(state, replica, StepEnd(freed_bytes=0, problem=AWAY), is_enough=True, ctx=ctx)]
    match giving.step:
        case GiveBackStep.FREEZE | GiveBackStep.SHRINK:
            asked_bytes = giving.asked_bytes
            return ask(state, replica, for_replica_id=giving.for_replica_id, asked_bytes=asked_bytes, ctx=ctx)
        case GiveBackStep.PARK | GiveBackStep.CHECKPOINT:
            return [parking_due(state, replica, replica.resize_epoch, ctx)]
        case _:
            return [effect(EvictEngine, replica, reason=f"it did not give back for {_wanting(giving)}")]

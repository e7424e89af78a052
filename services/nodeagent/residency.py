"""The residency machine: starts, parks and wakes, and in which order bytes change hands."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kit.outcomes import Context, Outcome
from schemas.nodes import (
    ParkAbandoned,
    Ready,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaSuspect,
    ReplicaWaking,
)
from schemas.orders import ParkOrdered, WakeOrdered
from services.nodeagent import giving_back
from services.nodeagent.core import SERVICE, current, effect, look, names, overdue, released, starts, step, wake_refused
from services.nodeagent.inputs import (
    EngineLost,
    EngineNotWoken,
    EngineParked,
    EngineStarted,
    EngineStayed,
    EngineWoken,
    ParkEngine,
    RestartDue,
    WakeEngine,
)
from services.nodeagent.ledger import Ledger
from services.nodeagent.quarantines import bad_start, barred
from services.nodeagent.state import NodeState, Replica
from services.nodeagent.timers import restart, restart_pause_s
from services.nodeagent.transitions import Residency

PAUSE_DOUBLINGS_MAX: Final = 3
"""Of `look_pause_s`: an engine that nobody can explain is looked at that rarely at last, and for ever."""

# --- Starts -----------------------------------------------------------------------------------------------------------


@SERVICE.on(EngineStarted)
def engine_started(state: NodeState, started: EngineStarted, ctx: Context) -> Sequence[Outcome]:
    replica = current(state, started)
    if replica is None or replica.residency is not Residency.STARTING:
        return []
    ready = Ready(
        replica_id=started.replica_id,
        deployment_id=replica.proposal.deployment_id,
        model=replica.proposal.deployment.name,
        endpoint=started.endpoint,
        wake_epoch=replica.wake_epoch,
        lease_epoch=replica.lease_epoch,
        start_s=started.start_s,
        enforced_bytes=started.enforced_bytes,
        swap_driver=started.swap_driver or replica.swap_driver,
        grade=started.grade,
    )
    return [ReplicaReady(node=state.settings.node, at_s=ctx.now_s, replicas=(ready,))]


@SERVICE.on(EngineLost)
def engine_lost(state: NodeState, lost: EngineLost, ctx: Context) -> Sequence[Outcome]:
    """Its process is gone: try again with back-off, a bounded number of times; waiting wakes may use its bytes."""
    replica = current(state, lost)
    if replica is None or not replica.has_process:
        return []
    if Residency.RELEASING in (replica.residency, replica.suspect_from):
        return [released(state, replica, lost.reason, ctx), *next_wakes(state, ctx, freed=replica)]
    attempt_count = replica.attempt_count + 1
    is_final = attempt_count >= state.settings.start_attempt_count
    backoff_s = 0.0 if is_final else restart_pause_s(state.settings, attempt_count)
    failed = ReplicaFailed(
        **names(state, replica, ctx),
        reason=lost.reason,
        attempt_count=attempt_count,
        is_final=is_final,
        wake_epoch=replica.wake_epoch + 1,
        retry_s=backoff_s,
    )
    outcomes: list[Outcome] = [failed]
    if not is_final:
        outcomes.append(restart(replica, lease_epoch=replica.lease_epoch + 1, due_s=ctx.now_s + backoff_s))
    if Residency.STARTING in (replica.residency, replica.suspect_from):
        outcomes += bad_start(state, replica, ctx)
    shaken = [state.replicas[name] for name in lost.shaken_ids if name in state.replicas]
    for neighbour in shaken:
        if neighbour is not replica and neighbour.residency in (Residency.RESIDENT, Residency.PARKED):
            outcomes += suspected(state, neighbour, f"not well since {replica.proposal.replica_id} was ended", ctx)
    brought = giving_back.ended(state, replica, replica.held_bytes, ctx, problem=lost.reason)
    return [*brought, *outcomes, *next_wakes(state, ctx, freed=replica)]


@SERVICE.on(RestartDue)
def restart_due(state: NodeState, due: RestartDue, ctx: Context) -> Sequence[Outcome]:
    """Start again if there is room now; else the next wake starts it. Not on a GPU that is quarantined."""
    replica = current(state, due)
    if replica is None or replica.residency is not Residency.GRANTED:
        return []
    if why := barred(state, replica.share_bytes):
        return [released(state, replica, why, ctx)]
    ledger = Ledger(state)
    if ledger.has_unclaimed(replica.wanted_bytes):
        return list(_start(state, replica, ctx))
    if not ledger.is_lent(replica.wanted_bytes):
        return []
    waits = ReplicaWaking(**names(state, replica, ctx), wake_epoch=replica.wake_epoch)
    ledger.claim(replica.wanted_bytes)
    return [waits, *giving_back.pursue(state, ledger, ctx, for_replica_id=due.replica_id)]


# --- Parking ----------------------------------------------------------------------------------------------------------


@SERVICE.on(ParkOrdered)
def park_ordered(state: NodeState, order: ParkOrdered, ctx: Context) -> Sequence[Outcome]:
    replica = state.replicas.get(order.replica_id)
    if replica is None:
        return []
    if replica.residency is not Residency.RESIDENT or replica.wake_epoch != order.wake_epoch:
        return []
    return _park(state, replica, order.reason, ctx)


def _park(state: NodeState, replica: Replica, reason: str, ctx: Context) -> list[Outcome]:
    draining = ReplicaDraining(**step(state, replica, Residency.DRAINING, ctx), reason=reason)
    park = effect(ParkEngine, replica, drain_s=state.settings.drain_s, reason=reason)
    return [draining, park, overdue(draining)]


@SERVICE.on(EngineParked)
def engine_parked(state: NodeState, parked: EngineParked, ctx: Context) -> Sequence[Outcome]:
    replica = current(state, parked)
    if replica is None or replica.residency is not Residency.DRAINING:
        return []
    fact = ReplicaParked(
        **names(state, replica, ctx),
        wake_epoch=replica.wake_epoch + 1,
        residue_bytes=sum(parked.residues),
        host_bytes=parked.host_bytes,
        copied_bytes=parked.copied_bytes,
        park_s=parked.park_s,
        drain_s=parked.drain_s,
        reason=parked.reason,
        shard_residue_bytes=parked.residues,
        swap_driver=parked.swap_driver or replica.parks_by,
        tier=parked.tier,
    )
    residues = dict(zip(replica.share_bytes, parked.residues, strict=True))
    freed = {uuid: size - residues[uuid] for uuid, size in replica.held_bytes.items()}
    brought = giving_back.ended(state, replica, freed, ctx)
    waits: list[Outcome] = []
    back = giving_back.comes_back(replica, wake_epoch=fact.wake_epoch, residues=residues, ctx=ctx)
    if back is not None:
        waits.append(ReplicaWaking(**names(state, replica, ctx), wake_epoch=fact.wake_epoch))
    return [*brought, fact, *waits, *next_wakes(state, ctx, freed=replica, residues=residues, joins=back)]


@SERVICE.on(EngineStayed)
def engine_stayed(state: NodeState, stayed: EngineStayed, ctx: Context) -> Sequence[Outcome]:
    """A victim kept its bytes: wakes that counted on them are refused, so that the swapper can choose again."""
    replica = current(state, stayed)
    if replica is None or replica.residency is not Residency.DRAINING:
        return []
    stays = ParkAbandoned(**names(state, replica, ctx), wake_epoch=replica.wake_epoch, reason=stayed.reason)
    ledger = Ledger(state, settled=replica)
    ledger.lend(replica.borrowed_bytes)
    reason = f"{replica.proposal.deployment.name} did not park: {stayed.reason}"
    refused = refuse_uncovered(state, ledger, waiting(state), reason, ctx)
    onward = giving_back.after_stay(state, replica, ledger, stayed.reason, ctx)
    return [stays, *refused, *onward]


# --- Doubts -----------------------------------------------------------------------------------------------------------


def suspected(state: NodeState, replica: Replica, reason: str, ctx: Context) -> list[Outcome]:
    """Nobody is sure what its engine does: it keeps its bytes, gets no request, and is looked at (`suspicion`).

    Wakes that counted on its park are refused, so that the swapper can choose again.
    """
    look_count = 0 if replica.suspect_from is None else replica.look_count + 1
    fact = ReplicaSuspect(
        **names(state, replica, ctx), wake_epoch=replica.wake_epoch, reason=reason, look_count=look_count
    )
    may_end = look_count >= _patience_count(state, replica)
    outcomes: list[Outcome] = [fact, look(state, replica, may_end=may_end)]
    if replica.residency is Residency.DRAINING:
        why = f"{replica.proposal.deployment.name} did not park: {reason}"
        outcomes += refuse_uncovered(state, Ledger(state, settled=replica), waiting(state), why, ctx)
    return outcomes


def _patience_count(state: NodeState, replica: Replica) -> int:
    """So many looks must have been in doubt before it may be ended; one that is loading has all its time once more."""
    settings = state.settings
    is_loading = Residency.STARTING in (replica.residency, replica.suspect_from)
    loading_s = settings.start_deadline_s if is_loading else 0.0
    return settings.look_count_max + int(loading_s / settings.look_pause_s / 2**PAUSE_DOUBLINGS_MAX)


# --- Waking -----------------------------------------------------------------------------------------------------------


@SERVICE.on(WakeOrdered)
def wake_ordered(state: NodeState, order: WakeOrdered, ctx: Context) -> Sequence[Outcome]:
    """Accept a wake whose bytes are free or will be freed by the named victims; else refuse with what is missing.

    What others borrow counts as good as free: they are asked to give it back. On all of its GPUs: a victim on any of
    them may be named, and one that spans several gives on all of these. A repeat finds the replica on its way already
    and changes nothing: the standing plan goes on.
    """
    replica = state.replicas.get(order.replica_id)
    if replica is None:
        return []
    if replica.residency not in (Residency.PARKED, Residency.GRANTED) or replica.wake_epoch != order.wake_epoch:
        return []
    if replica.held_for:
        return [wake_refused(state, replica, f"its gang {replica.held_for} is not committed", 0, ctx)]
    if not replica.is_started and (why := barred(state, replica.share_bytes)):
        return [wake_refused(state, replica, why, 0, ctx)]
    ledger = Ledger(state)
    wanted = replica.wanted_bytes
    if ledger.has_unclaimed(wanted):
        return _begin(state, replica, ctx)
    victims = [
        victim
        for victim_id in order.victim_ids
        if (victim := state.replicas.get(victim_id)) is not None
        and victim.share_bytes.keys() & wanted.keys()
        and victim.proposal.deployment.swap.is_parkable
    ]
    parkable = [victim for victim in victims if victim.residency is Residency.RESIDENT]
    yields = {uuid: sum(victim.guaranteed_yield_bytes.get(uuid, 0) for victim in parkable) for uuid in wanted}
    short_bytes = ledger.short_of({uuid: size - yields[uuid] for uuid, size in wanted.items()}).short_bytes
    if short_bytes > 0:
        return [wake_refused(state, replica, "the named victims do not free enough", short_bytes, ctx)]
    giving = [victim for victim in victims if victim.residency in (Residency.RESIDENT, Residency.DRAINING)]
    waking = ReplicaWaking(
        **names(state, replica, ctx),
        wake_epoch=replica.wake_epoch,
        victim_ids=tuple(victim.proposal.replica_id for victim in giving),
    )
    outcomes: list[Outcome] = [waking]
    for victim in parkable:
        outcomes += _park(state, victim, f"room for {replica.proposal.deployment.name}", ctx)
        ledger.drain(victim)
    ledger.claim(wanted)
    sent_away = {victim.proposal.replica_id for victim in parkable}
    asked = giving_back.pursue(state, ledger, ctx, for_replica_id=order.replica_id, without=sent_away)
    return [*outcomes, *asked]


def _begin(state: NodeState, replica: Replica, ctx: Context) -> list[Outcome]:
    """Hold the share, then restore; a replica that was never started is started."""
    if not replica.is_started:
        return list(_start(state, replica, ctx))
    about = step(state, replica, Residency.WAKING, ctx)
    waking = ReplicaWaking(**about, wake_epoch=replica.wake_epoch, is_reserved=True)
    wake: list[Outcome] = [waking, effect(WakeEngine, replica), overdue(waking)]
    if replica.residency is Residency.WAITING:
        return wake
    return [ReplicaWaking(**names(state, replica, ctx), wake_epoch=replica.wake_epoch), *wake]


def come_back(state: NodeState, ledger: Ledger, ctx: Context) -> Iterator[Outcome]:
    """Those that are never to be away and had to be checkpointed, whose first return did not succeed. Books them."""
    for replica in state.replicas.values():
        wanted = replica.wanted_bytes
        if not replica.is_due_back or replica.residency is not Residency.PARKED:
            continue
        if ledger.has_unclaimed(wanted):
            ledger.hold(wanted)
            yield from _begin(state, replica, ctx)
        elif ledger.is_lent(wanted):
            ledger.claim(wanted)
            yield ReplicaWaking(**names(state, replica, ctx), wake_epoch=replica.wake_epoch)
            yield from giving_back.pursue(state, ledger, ctx, for_replica_id=replica.proposal.replica_id)


def _start(state: NodeState, replica: Replica, ctx: Context) -> Iterator[Outcome]:
    return starts(state, replica.proposal, lease_epoch=replica.lease_epoch, wake_epoch=replica.wake_epoch, ctx=ctx)


def next_wakes(
    state: NodeState,
    ctx: Context,
    *,
    freed: Replica,
    residues: Mapping[str, int] | None = None,
    joins: Replica | None = None,
) -> list[Outcome]:
    """Begin waiting wakes, oldest first, with the bytes that `freed` gives back in the fact that precedes this.

    `residues`: what it keeps on each GPU; nothing by default. `joins`: as it waits with the others from now on.

    A wake begins when all its GPUs have what it wants beyond what older ones still wait for there: the oldest of all
    waits for nobody but its victims, so none waits for ever.
    Wakes for which too little is promised now are refused, so that none waits for bytes that nobody will give.
    """
    ledger = Ledger(state, settled=freed)
    kept = residues or {}
    ledger.hold({uuid: kept.get(uuid, 0) - size for uuid, size in freed.held_bytes.items()})
    if freed.residency is Residency.WAITING:
        ledger.drop_claim(freed.wanted_bytes)
    if joins is not None:
        ledger.claim(joins.wanted_bytes)
    return wakes_from(state, ledger, ctx, without=freed, joins=joins)


def wakes_from(
    state: NodeState,
    ledger: Ledger,
    ctx: Context,
    *,
    without: Replica | None = None,
    changed: Replica | None = None,
    joins: Replica | None = None,
) -> list[Outcome]:
    """Begin, refuse and pursue as `next_wakes` says, with what this account has.

    `without`: it has ended; `changed`: a borrower as it is after this decision.
    """
    outcomes: list[Outcome] = []
    queue: list[Replica] = []
    ahead: Counter[str] = Counter()
    for replica in [*waiting(state), *([joins] if joins is not None else [])]:
        wanted = replica.wanted_bytes
        if replica is without:
            continue
        if all(ledger.free_bytes(uuid) - ahead[uuid] >= size for uuid, size in wanted.items()):
            ledger.hold(wanted)
            ledger.drop_claim(wanted)
            outcomes += _begin(state, replica, ctx)
        else:
            queue.append(replica)
            ahead.update(wanted)
    outcomes += refuse_uncovered(state, ledger, queue, "its victims freed too little", ctx)
    gone = {without.proposal.replica_id} if without is not None else set()
    return [*outcomes, *giving_back.pursue(state, ledger, ctx, without=gone, changed=changed)]


def refuse_uncovered(
    state: NodeState, ledger: Ledger, queue: list[Replica], reason: str, ctx: Context
) -> list[Outcome]:
    """Refuse the newest waiting wakes until what is promised covers the rest, on every GPU."""
    outcomes: list[Outcome] = []
    for replica in reversed(queue):
        short_bytes = max(-ledger.promised_free_bytes(gpu_uuid) for gpu_uuid in replica.share_bytes)
        if short_bytes > 0:
            ledger.drop_claim(replica.wanted_bytes)
            outcomes.append(wake_refused(state, replica, reason, short_bytes, ctx))
    return outcomes


def waiting(state: NodeState) -> list[Replica]:
    """Accepted wakes that wait for bytes, in the order of their orders; ties by replica id."""
    found = [replica for replica in state.replicas.values() if replica.residency is Residency.WAITING]
    return sorted(found, key=lambda replica: (replica.ordered_at_s, replica.proposal.replica_id))


@SERVICE.on(EngineWoken)
def engine_woken(state: NodeState, woken: EngineWoken, ctx: Context) -> Sequence[Outcome]:
    replica = current(state, woken)
    if replica is None or replica.residency is not Residency.WAKING:
        return []
    return [
        ReplicaResident(
            **names(state, replica, ctx),
            wake_epoch=replica.wake_epoch,
            endpoint=woken.endpoint,
            copied_bytes=woken.copied_bytes,
            reserve_s=max(0.0, replica.reserved_at_s - replica.ordered_at_s),
            restore_s=woken.restore_s,
            verify_s=woken.verify_s,
            wake_s=max(0.0, ctx.now_s - replica.ordered_at_s),
            swap_driver=woken.swap_driver or replica.swap_driver,
            map_s=woken.map_s,
            copy_s=woken.copy_s,
        )
    ]


@SERVICE.on(EngineNotWoken)
def engine_not_woken(state: NodeState, failed: EngineNotWoken, ctx: Context) -> Sequence[Outcome]:
    """Rolled back: parked as before, its bytes are free for the next in line."""
    replica = current(state, failed)
    if replica is None or replica.residency is not Residency.WAKING:
        return []
    refused = wake_refused(state, replica, failed.reason, failed.short_by_bytes, ctx)
    return [refused, *next_wakes(state, ctx, freed=replica, residues=replica.residue_bytes)]

"""The residency machine: starts, parks and wakes, and in which order bytes change hands."""

from collections import Counter
from collections.abc import Mapping, Sequence

from kit.outcomes import Context, Outcome, Timer
from schemas.nodes import (
    ParkAbandoned,
    Ready,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaWaking,
)
from schemas.orders import ParkOrdered, WakeOrdered
from services.nodeagent.core import SERVICE, current, effect, names, released, starting, wake_refused
from services.nodeagent.inputs import (
    EngineLost,
    EngineNotWoken,
    EngineParked,
    EngineStarted,
    EngineStayed,
    EngineWoken,
    ParkEngine,
    RestartDue,
    StartEngine,
    WakeEngine,
)
from services.nodeagent.ledger import Ledger
from services.nodeagent.quarantines import bad_start, barred
from services.nodeagent.state import NodeState, Replica, Residency

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
        start_s=started.start_s,
        enforced_bytes=started.enforced_bytes,
        swap_driver=started.swap_driver or replica.swap_driver,
    )
    return [ReplicaReady(node=state.settings.node, at_s=ctx.now_s, replicas=(ready,))]


@SERVICE.on(EngineLost)
def engine_lost(state: NodeState, lost: EngineLost, ctx: Context) -> Sequence[Outcome]:
    """Its process is gone: try again with back-off, a bounded number of times; waiting wakes may use its bytes."""
    replica = current(state, lost)
    if replica is None or replica.residency in (Residency.GRANTED, Residency.FAILED):
        return []
    if replica.residency is Residency.RELEASING:
        return [released(state, replica, lost.reason, ctx), *next_wakes(state, ctx, freed=replica)]
    attempt_count = replica.attempt_count + 1
    is_final = attempt_count >= state.settings.start_attempt_count
    backoff_s = 0.0 if is_final else state.settings.restart_backoff_s * 2 ** (attempt_count - 1)
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
        due = RestartDue(replica_id=lost.replica_id, lease_epoch=replica.lease_epoch + 1)
        outcomes.append(Timer(due_s=ctx.now_s + backoff_s, input=due))
    if replica.residency is Residency.STARTING:
        outcomes += bad_start(state, replica, ctx)
    return [*outcomes, *next_wakes(state, ctx, freed=replica)]


@SERVICE.on(RestartDue)
def restart_due(state: NodeState, due: RestartDue, ctx: Context) -> Sequence[Outcome]:
    """Start again if there is room now; else the next wake starts it. Not on a GPU that is quarantined."""
    replica = current(state, due)
    if replica is None or replica.residency is not Residency.GRANTED:
        return []
    if why := barred(state, replica.share_bytes):
        return [released(state, replica, why, ctx)]
    if not Ledger(state).has_unclaimed(replica.wanted_bytes):
        return []
    return _start(state, replica, ctx)


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
    return [
        ReplicaDraining(**names(state, replica, ctx), reason=reason),
        effect(ParkEngine, replica, drain_s=state.settings.drain_s, reason=reason),
    ]


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
        swap_driver=parked.swap_driver or replica.swap_driver,
        tier=parked.tier,
    )
    residues = dict(zip(replica.share_bytes, parked.residues, strict=True))
    return [fact, *next_wakes(state, ctx, freed=replica, residues=residues)]


@SERVICE.on(EngineStayed)
def engine_stayed(state: NodeState, stayed: EngineStayed, ctx: Context) -> Sequence[Outcome]:
    """A victim kept its bytes: wakes that counted on them are refused, so that the swapper can choose again."""
    replica = current(state, stayed)
    if replica is None or replica.residency is not Residency.DRAINING:
        return []
    stays = ParkAbandoned(**names(state, replica, ctx), wake_epoch=replica.wake_epoch, reason=stayed.reason)
    ledger = Ledger(state, settled=replica)
    reason = f"{replica.proposal.deployment.name} did not park: {stayed.reason}"
    return [stays, *_refuse_uncovered(state, ledger, waiting(state), reason, ctx)]


# --- Waking -----------------------------------------------------------------------------------------------------------


@SERVICE.on(WakeOrdered)
def wake_ordered(state: NodeState, order: WakeOrdered, ctx: Context) -> Sequence[Outcome]:
    """Accept a wake whose bytes are free or will be freed by the named victims; else refuse with what is missing.

    On all of its GPUs: a victim on any of them may be named, and one that spans several gives on all of these. A repeat
    finds the replica on its way already and changes nothing: the standing plan goes on.
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
    yields = {uuid: sum(victim.yielding_bytes.get(uuid, 0) for victim in parkable) for uuid in wanted}
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
    return outcomes


def _begin(state: NodeState, replica: Replica, ctx: Context) -> list[Outcome]:
    """Hold the share, then restore; a replica that was never started is started."""
    if not replica.is_started:
        return _start(state, replica, ctx)
    waking = ReplicaWaking(**names(state, replica, ctx), wake_epoch=replica.wake_epoch, is_reserved=True)
    if replica.residency is Residency.WAITING:
        return [waking, effect(WakeEngine, replica)]
    asked = ReplicaWaking(**names(state, replica, ctx), wake_epoch=replica.wake_epoch)
    return [asked, waking, effect(WakeEngine, replica)]


def _start(state: NodeState, replica: Replica, ctx: Context) -> list[Outcome]:
    return [starting(state, replica.proposal, wake_epoch=replica.wake_epoch, ctx=ctx), effect(StartEngine, replica)]


def next_wakes(
    state: NodeState, ctx: Context, *, freed: Replica, residues: Mapping[str, int] | None = None
) -> list[Outcome]:
    """Begin waiting wakes, oldest first, with the bytes that `freed` gives back in the fact that precedes this.

    `residues`: what it keeps on each GPU; nothing by default. A wake begins when all its GPUs have what it wants beyond
    what older ones still wait for there: the oldest of all waits for nobody but its victims, so none waits for ever.
    Wakes for which too little is promised now are refused, so that none waits for bytes that nobody will give.
    """
    ledger = Ledger(state, settled=freed)
    kept = residues or {}
    ledger.hold({uuid: kept.get(uuid, 0) - size for uuid, size in freed.held_bytes.items()})
    if freed.residency is Residency.WAITING:
        ledger.drop_claim(freed.wanted_bytes)
    outcomes: list[Outcome] = []
    queue: list[Replica] = []
    ahead: Counter[str] = Counter()
    for replica in waiting(state):
        wanted = replica.wanted_bytes
        if replica is freed:
            continue
        if all(ledger.free_bytes(uuid) - ahead[uuid] >= size for uuid, size in wanted.items()):
            ledger.hold(wanted)
            ledger.drop_claim(wanted)
            outcomes += _begin(state, replica, ctx)
        else:
            queue.append(replica)
            ahead.update(wanted)
    return [*outcomes, *_refuse_uncovered(state, ledger, queue, "its victims freed too little", ctx)]


def _refuse_uncovered(
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

"""Grants and releases: a proposal is granted or refused as a whole; a lease ends when its bytes are proven free."""

from collections.abc import Iterable, Iterator, Sequence

from kit.outcomes import Context, Outcome, Timer
from schemas.abilities import NoSwapDriver, swap_driver_for
from schemas.nodes import Lease, LeaseGranted, LeaseRefused, LeaseReleased, RefusalReason, ReplicaWaking
from schemas.placement import GangAbandoned, GangCommitted, PlacementProposed, ReleaseProposed, ReplicaProposal
from services.nodeagent import giving_back
from services.nodeagent.core import SERVICE, current, released, starts, stopping
from services.nodeagent.grades import why_not_enforced
from services.nodeagent.inputs import EngineStopped, GangHoldOver
from services.nodeagent.ledger import Ledger
from services.nodeagent.residency import next_wakes
from services.nodeagent.state import NodeState, expected_residue, parked_host_bytes, swap_driver_of
from services.nodeagent.transitions import Residency


@SERVICE.on(PlacementProposed)
def placement_proposed(state: NodeState, proposed: PlacementProposed, ctx: Context) -> Sequence[Outcome]:
    """Grant the proposal as a whole or refuse it as a whole; start at once what fits without anybody giving way.

    Of a gang nothing starts: its leases are held until it is committed, or their time is over.
    """
    if proposed.node != state.settings.node:
        return []
    if all(replica.replica_id in state.replicas for replica in proposed.replicas):
        return []
    refused = _refusal(state, proposed, ctx)
    if refused is not None:
        return [refused]
    granted = LeaseGranted(
        node=state.settings.node,
        at_s=ctx.now_s,
        proposal_id=proposed.proposal_id,
        leases=tuple(lease for replica in proposed.replicas for lease in _leases(state, replica, ctx)),
        replicas=proposed.replicas,
        gang_id=proposed.gang_id,
        gang_hold_s=proposed.gang_hold_s,
    )
    if proposed.gang_id:
        over = GangHoldOver(gang_id=proposed.gang_id)
        return [granted, Timer(due_s=ctx.now_s + proposed.gang_hold_s, input=over)]
    return [granted, *_first_starts(state, [(replica, ctx.cause_seq) for replica in proposed.replicas], ctx)]


def _first_starts(state: NodeState, leased: Iterable[tuple[ReplicaProposal, int]], ctx: Context) -> Iterator[Outcome]:
    """Of those, with their lease epochs, that have room without anybody giving way; the others wait for a wake.

    Where the room is lent to those who have more than their request, they are asked for it and the start waits.
    """
    ledger = Ledger(state)
    waits_for = ""
    for replica, lease_epoch in leased:
        wanted = {share.gpu_uuid: share.request_bytes for share in replica.shares}
        if ledger.has_unclaimed(wanted):
            ledger.hold(wanted)
            yield from starts(state, replica, lease_epoch=lease_epoch, wake_epoch=1, ctx=ctx)
        elif ledger.is_lent(wanted):
            ledger.claim(wanted)
            waits_for = waits_for or replica.replica_id
            yield ReplicaWaking(
                node=state.settings.node,
                at_s=ctx.now_s,
                replica_id=replica.replica_id,
                deployment_id=replica.deployment_id,
                model=replica.deployment.name,
                wake_epoch=1,
            )
    yield from giving_back.pursue(state, ledger, ctx, for_replica_id=waits_for) if waits_for else ()


def _leases(state: NodeState, replica: ReplicaProposal, ctx: Context) -> list[Lease]:
    """One for each share."""
    return [
        Lease(
            replica_id=replica.replica_id,
            shard_index=share.shard_index,
            gpu_uuid=share.gpu_uuid,
            request_bytes=share.request_bytes,
            granted_bytes=share.request_bytes,
            limit_bytes=share.limit_bytes,
            residue_bytes=expected_residue(share, state.settings),
            lease_epoch=ctx.cause_seq,
        )
        for share in replica.shares
    ]


def _refusal(state: NodeState, proposed: PlacementProposed, ctx: Context) -> LeaseRefused | None:
    """The first reason why the whole proposal cannot be granted here, or None."""
    ledger = Ledger(state)
    host_bytes = state.host_bytes()
    for replica in proposed.replicas:
        refused = _refusal_of(state, ledger, replica)
        if refused is None and replica.deployment.swap.is_parkable:
            host_bytes += parked_host_bytes(state, replica, swap_driver_of(state, replica))
            if host_bytes > state.host_budget_bytes:
                over_bytes = host_bytes - state.host_budget_bytes
                refused = (RefusalReason.NO_HOST_MEMORY, f"host memory is short by {over_bytes} bytes", 0)
        if refused is not None:
            reason, message, free_bytes = refused
            return LeaseRefused(
                node=state.settings.node,
                at_s=ctx.now_s,
                proposal_id=proposed.proposal_id,
                replica_ids=tuple(r.replica_id for r in proposed.replicas),
                reason=reason,
                message=message,
                free_bytes=free_bytes,
            )
        ledger.lease(replica)
    return None


def _refusal_of(state: NodeState, ledger: Ledger, replica: ReplicaProposal) -> tuple[RefusalReason, str, int] | None:
    """Why one of its GPUs cannot take its shard, with the bytes that are free there."""
    for share in replica.shares:
        gpu = state.gpus.get(share.gpu_uuid)
        if gpu is None:
            return RefusalReason.UNKNOWN_GPU, f"no GPU {share.gpu_uuid} on this node", 0
        if gpu.is_mig and len(replica.shares) > 1:
            return RefusalReason.NO_ROOM, "a process can use one MIG instance only", 0
        if gpu.is_mig and any(share.gpu_uuid in r.share_bytes for r in state.replicas.values()):
            return RefusalReason.NO_ROOM, "a MIG instance takes one replica, and has one", 0
        if gpu.quarantine_reason:
            return RefusalReason.QUARANTINED, f"this GPU is quarantined: {gpu.quarantine_reason}", 0
        refused = why_not_enforced(gpu, replica.deployment)
        if refused is not None:
            return *refused, 0
    offered = tuple(state.gpus[share.gpu_uuid].swap_drivers for share in replica.shares)
    chosen = swap_driver_for(replica.deployment.engine, offered)
    if replica.deployment.swap.is_parkable and isinstance(chosen, NoSwapDriver):
        return RefusalReason.SWAP_NOT_AVAILABLE, chosen.reason, 0
    if len({share.gpu_uuid for share in replica.shares}) < len(replica.shares):
        return RefusalReason.NO_ROOM, "two of its shards are proposed for one GPU", 0
    short = ledger.short_for_lease(replica)
    if short.short_bytes > 0:
        free_bytes = ledger.free_bytes(short.gpu_uuid)
        return RefusalReason.NO_ROOM, f"short by {short.short_bytes} bytes", max(0, free_bytes)
    return None


# --- Gangs ------------------------------------------------------------------------------------------------------------


@SERVICE.on(GangCommitted)
def gang_committed(state: NodeState, committed: GangCommitted, ctx: Context) -> Sequence[Outcome]:
    """Start what of the gang is here. Of what is not, because its hold ended, say so again: nothing is started."""
    if committed.node != state.settings.node:
        return []
    here = [state.replicas[replica_id] for replica_id in committed.replica_ids if replica_id in state.replicas]
    fresh = [r for r in here if r.residency is Residency.GRANTED and r.wake_epoch == 1 and not r.held_for]
    reason = f"gang {committed.gang_id} was committed when this lease had ended: nothing is started"
    late = [
        LeaseReleased(node=committed.node, at_s=ctx.now_s, replica_id=replica_id, reason=reason)
        for replica_id in committed.replica_ids
        if replica_id not in state.replicas
    ]
    return [*late, *_first_starts(state, [(replica.proposal, replica.lease_epoch) for replica in fresh], ctx)]


@SERVICE.on(GangAbandoned)
def gang_abandoned(state: NodeState, abandoned: GangAbandoned, ctx: Context) -> Sequence[Outcome]:
    """Nothing of it has started, so that its leases end at once."""
    if abandoned.node != state.settings.node:
        return []
    return _end_held(state, abandoned.gang_id, f"its gang was given up: {abandoned.reason}", ctx)


@SERVICE.on(GangHoldOver)
def gang_hold_over(state: NodeState, over: GangHoldOver, ctx: Context) -> Sequence[Outcome]:
    """Nobody committed it in time: whoever holds room for those who do not come keeps it from all others."""
    held = [replica for replica in state.replicas.values() if replica.held_for == over.gang_id]
    if any(replica.hold_ends_s > ctx.now_s for replica in held):
        return []
    return _end_held(state, over.gang_id, "its gang was not committed in time", ctx)


def _end_held(state: NodeState, gang_id: str, reason: str, ctx: Context) -> list[Outcome]:
    held = [replica for replica in state.replicas.values() if replica.held_for == gang_id]
    return [released(state, replica, reason, ctx) for replica in held]


@SERVICE.on(ReleaseProposed)
def release_proposed(state: NodeState, release: ReleaseProposed, ctx: Context) -> Sequence[Outcome]:
    """Drain and stop; without a process the lease ends at once."""
    replica = state.replicas.get(release.replica_id)
    if release.node != state.settings.node or replica is None or replica.residency is Residency.RELEASING:
        return []
    if replica.has_process:
        return list(stopping(state, replica, release.reason, ctx, drain_s=release.drain_s))
    return [released(state, replica, release.reason, ctx), *next_wakes(state, ctx, freed=replica)]


@SERVICE.on(EngineStopped)
def engine_stopped(state: NodeState, stopped: EngineStopped, ctx: Context) -> Sequence[Outcome]:
    replica = current(state, stopped)
    if replica is None or Residency.RELEASING not in (replica.residency, replica.suspect_from):
        return []
    return [released(state, replica, "stopped", ctx), *next_wakes(state, ctx, freed=replica)]

"""Grants and releases: a proposal is granted or refused as a whole; a lease ends when its bytes are proven free."""

from collections.abc import Sequence

from kit.outcomes import Context, Outcome
from schemas.deployments import GRADE_ORDER
from schemas.nodes import Lease, LeaseGranted, LeaseRefused, RefusalReason, ReplicaDraining
from schemas.placement import PlacementProposed, ReleaseProposed, ReplicaProposal
from services.nodeagent.core import SERVICE, current, effect, names, released, starting
from services.nodeagent.inputs import EngineStopped, StartEngine, StopEngine
from services.nodeagent.ledger import Ledger
from services.nodeagent.residency import next_wakes
from services.nodeagent.state import NodeState, Residency


@SERVICE.on(PlacementProposed)
def placement_proposed(state: NodeState, proposed: PlacementProposed, ctx: Context) -> Sequence[Outcome]:
    """Grant the proposal as a whole or refuse it as a whole; start at once what fits without anybody giving way."""
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
        leases=tuple(_lease(state, replica, ctx) for replica in proposed.replicas),
        replicas=proposed.replicas,
    )
    ledger = Ledger(state)
    outcomes: list[Outcome] = [granted]
    for replica, lease in zip(proposed.replicas, granted.leases, strict=True):
        if ledger.unclaimed_bytes(lease.gpu_uuid) >= lease.granted_bytes:
            ledger.hold(lease.gpu_uuid, lease.granted_bytes)
            outcomes.append(starting(state, replica, wake_epoch=1, ctx=ctx))
            outcomes.append(StartEngine(replica=replica, lease_epoch=lease.lease_epoch, wake_epoch=1))
    return outcomes


def _lease(state: NodeState, replica: ReplicaProposal, ctx: Context) -> Lease:
    share = replica.shares[0]
    return Lease(
        replica_id=replica.replica_id,
        shard_index=share.shard_index,
        gpu_uuid=share.gpu_uuid,
        request_bytes=share.request_bytes,
        granted_bytes=share.request_bytes,
        limit_bytes=share.limit_bytes,
        residue_bytes=min(state.settings.residue_bytes, share.request_bytes),
        lease_epoch=ctx.cause_seq,
    )


def _refusal(state: NodeState, proposed: PlacementProposed, ctx: Context) -> LeaseRefused | None:
    """The first reason why the whole proposal cannot be granted here, or None."""
    ledger = Ledger(state)
    host_bytes = state.host_bytes()
    for replica in proposed.replicas:
        share = replica.shares[0]
        gpu = state.gpus.get(share.gpu_uuid)
        reason: tuple[RefusalReason, str, int] | None = None
        if gpu is None:
            reason = (RefusalReason.UNKNOWN_GPU, f"no GPU {share.gpu_uuid} on this node", 0)
        else:
            minimum = replica.deployment.share.minimum_grade
            short_bytes = ledger.short_for_lease(replica, state.settings.residue_bytes)
            if minimum is not None and GRADE_ORDER.index(gpu.grade) > GRADE_ORDER.index(minimum):
                reason = (RefusalReason.GRADE_NOT_AVAILABLE, f"this GPU gives '{gpu.grade}', not '{minimum}'", 0)
            elif short_bytes > 0:
                reason = (RefusalReason.NO_ROOM, f"short by {short_bytes} bytes", ledger.free_bytes(share.gpu_uuid))
        if reason is None and replica.deployment.swap.is_parkable:
            host_bytes += replica.deployment.engine.weights_bytes
            if host_bytes > state.host_budget_bytes:
                over_bytes = host_bytes - state.host_budget_bytes
                reason = (RefusalReason.NO_HOST_MEMORY, f"host memory is short by {over_bytes} bytes", 0)
        if reason is not None:
            return LeaseRefused(
                node=state.settings.node,
                at_s=ctx.now_s,
                proposal_id=proposed.proposal_id,
                replica_ids=tuple(r.replica_id for r in proposed.replicas),
                reason=reason[0],
                message=reason[1],
                free_bytes=reason[2],
            )
        ledger.lease(replica, state.settings.residue_bytes)
    return None


@SERVICE.on(ReleaseProposed)
def release_proposed(state: NodeState, release: ReleaseProposed, ctx: Context) -> Sequence[Outcome]:
    """Drain and stop; without a process the lease ends at once."""
    replica = state.replicas.get(release.replica_id)
    if release.node != state.settings.node or replica is None or replica.residency is Residency.RELEASING:
        return []
    if replica.has_process:
        draining = ReplicaDraining(**names(state, replica, ctx), reason=release.reason, is_release=True)
        return [draining, effect(StopEngine, replica, drain_s=release.drain_s)]
    return [released(state, replica, release.reason, ctx), *next_wakes(state, ctx, freed=replica)]


@SERVICE.on(EngineStopped)
def engine_stopped(state: NodeState, stopped: EngineStopped, ctx: Context) -> Sequence[Outcome]:
    replica = current(state, stopped)
    if replica is None or replica.residency is not Residency.RELEASING:
        return []
    return [released(state, replica, "stopped", ctx), *next_wakes(state, ctx, freed=replica)]

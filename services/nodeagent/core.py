"""The node agent's decisions: what it grants, whom it wakes and parks, and in which order bytes change hands.

Rule of every handler: bytes are held before an effect may use them, and given up only after an effect has proven them
free. Effects are idempotent, so a restarted agent simply issues them again (`resume`).
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, TypeVar

from kit.outcomes import Context, Outcome, Timer
from kit.service import Service
from schemas.messages import fact_filter, started_filter
from schemas.nodes import (
    LeaseGranted,
    LeaseReleased,
    NodeAlive,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFact,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaSuspect,
    ReplicaWaking,
    WakeRefused,
)
from schemas.placement import (
    GangAbandoned,
    GangCommitted,
    GpuCloseAsked,
    GpuReinstateAsked,
    PlacementProposed,
    ReleaseProposed,
    ReplicaProposal,
)
from services.nodeagent import bursting, quarantines
from services.nodeagent import state as fold
from services.nodeagent.inputs import (
    AdoptEngine,
    AliveDue,
    EngineEffect,
    EngineInput,
    LookAtEngine,
    NodeProbed,
    ParkEngine,
    ProbeNode,
    StartEngine,
    StepOverdue,
    StopEngine,
    WakeEngine,
)
from services.nodeagent.state import NodeState, Replica
from services.nodeagent.timers import timers_of
from services.nodeagent.transitions import STATES, Residency, allowed_s

T = TypeVar("T", bound=EngineEffect)

GPU_IS_GONE: Final = "its GPU is gone"


def reads(node: str) -> Sequence[str]:
    """Only what placement has for this node's shard, and who the swapper is: orders of an older one are refused."""
    kinds = (PlacementProposed, ReleaseProposed, GangCommitted, GangAbandoned, GpuReinstateAsked, GpuCloseAsked)
    return [*(fact_filter(kind, node) for kind in kinds), started_filter("swapper")]


def on_start(state: NodeState, ctx: Context) -> Sequence[Outcome]:
    """Look at the node before anything is taken up; what is begun meanwhile is not begun a second time."""
    state.observed.left = {replica_id: replica.step for replica_id, replica in state.replicas.items()}
    timers = (*timers_of(state, ctx), *quarantines.timers(state, ctx))
    return [ProbeNode(), *timers, *bursting.first_look(state, ctx), *_alive_later(state, ctx, after_s=0.0)]


def check_invariants(state: NodeState) -> None:
    for gpu_uuid, gpu in state.gpus.items():
        held_bytes = state.held_bytes(gpu_uuid)
        assert held_bytes + gpu.reserve_bytes <= gpu.capacity_bytes, (gpu_uuid, held_bytes, gpu.capacity_bytes)
    for replica in state.replicas.values():
        is_leaving = Residency.RELEASING in (replica.residency, replica.suspect_from)
        assert replica.share_bytes.keys() <= state.gpus.keys() or is_leaving, replica.share_bytes
        for share in replica.proposal.shares:
            granted_bytes = replica.share_bytes[share.gpu_uuid]
            assert share.request_bytes <= granted_bytes <= max(share.request_bytes, share.limit_bytes), share
        if replica.held_for:
            assert not replica.has_process, f"{replica.proposal.replica_id} runs before its gang is committed"
        if replica.residency in (Residency.PARKED, Residency.WAKING):
            assert replica.is_started, replica.proposal.replica_id
        has_deadline = bool(STATES[replica.residency].deadline_settings)
        assert has_deadline == (replica.deadline_s > 0), (
            f"{replica.proposal.replica_id} is {replica.residency} for ever"
        )
        is_suspect = replica.residency is Residency.SUSPECT
        assert is_suspect == (replica.suspect_from is not None), replica.proposal.replica_id


SERVICE: Service[NodeState] = Service(
    name="nodeagent",
    new_state=fold.new_state,
    reads=reads,
    on_start=on_start,
    check_invariants=check_invariants,
    state_version=2,
)
for _kind, _fold in (
    (NodeJoined, fold.fold_joined),
    (LeaseGranted, fold.fold_granted),
    (LeaseReleased, fold.fold_released),
    (ReplicaStarting, fold.fold_starting),
    (ReplicaReady, fold.fold_ready),
    (ReplicaDraining, fold.fold_draining),
    (ParkAbandoned, fold.fold_abandoned),
    (ReplicaParked, fold.fold_parked),
    (ReplicaWaking, fold.fold_waking),
    (ReplicaResident, fold.fold_resident),
    (WakeRefused, fold.fold_wake_refused),
    (ReplicaSuspect, fold.fold_suspect),
    (ReplicaFailed, fold.fold_failed),
    (GangCommitted, fold.fold_committed),
):
    SERVICE.folding(_kind)(_fold)  # type: ignore[arg-type]  # One table instead of as many decorators.


# --- The node and its return ------------------------------------------------------------------------------------------


@SERVICE.on(NodeProbed)
def node_probed(state: NodeState, probed: NodeProbed, ctx: Context) -> Sequence[Outcome]:
    """Offer what is here; give up what was on a GPU that is gone; take up every other replica where it was left."""
    joined = NodeJoined(
        node=state.settings.node,
        at_s=ctx.now_s,
        machine_id=probed.machine_id,
        gpus=quarantines.marked(state, probed.gpus),
        host_budget_bytes=probed.host_budget_bytes,
        holder_url=probed.holder_url,
        label=probed.label,
        cpu_millicores=probed.cpu_millicores,
        memory_bytes=probed.memory_bytes,
        labels=state.settings.labels,
    )
    here = {gpu.gpu_uuid for gpu in probed.gpus}
    gone = [replica for replica in state.replicas.values() if not replica.share_bytes.keys() <= here]
    return [joined, *given_up(state, gone, ctx), *resume(state, here)]


@SERVICE.on(AliveDue)
def alive_due(state: NodeState, due: AliveDue, ctx: Context) -> Sequence[Outcome]:
    """A signal, not a fact: nobody needs to know later that it was there."""
    alive = NodeAlive(node=state.settings.node, machine_id=state.machine_id, writer_epoch=ctx.writer_epoch)
    return [alive, *_alive_later(state, ctx, after_s=state.settings.alive_s)]


def _alive_later(state: NodeState, ctx: Context, *, after_s: float) -> list[Timer]:
    return [Timer(due_s=ctx.now_s + after_s, input=AliveDue())] if state.settings.alive_s > 0 else []


def given_up(state: NodeState, replicas: Sequence[Replica], ctx: Context) -> Iterator[Outcome]:
    """Releases, so that placement finds them another place; those that had begun are resumed."""
    for replica in replicas:
        if replica.residency is Residency.RELEASING:
            yield effect(StopEngine, replica, drain_s=0.0)
        elif replica.has_process:
            yield from stopping(state, replica, GPU_IS_GONE, ctx, drain_s=0.0)
        else:
            yield released(state, replica, GPU_IS_GONE, ctx)


def resume(state: NodeState, gpu_uuids: Collection[str]) -> Iterator[Outcome]:
    """The effect that each replica is waiting for; repeating one is adoption, not a restart.

    Only for replicas that are where an earlier life left them: the others' effects are on their way in this one.
    """
    for replica_id, replica in state.replicas.items():
        is_here = all(gpu_uuid in gpu_uuids for gpu_uuid in replica.share_bytes)
        if state.observed.left.get(replica_id) != replica.step or not is_here:
            continue
        match replica.residency:
            case Residency.STARTING:
                yield effect(StartEngine, replica)
            case Residency.DRAINING:
                yield effect(ParkEngine, replica, drain_s=state.settings.drain_s, reason="resumed after a restart")
            case Residency.WAKING:
                yield effect(WakeEngine, replica)
            case Residency.RELEASING:
                yield effect(StopEngine, replica, drain_s=state.settings.drain_s)
            case Residency.SUSPECT:
                yield look(state, replica, may_end=False)
            case Residency.RESIDENT | Residency.PARKED:
                yield effect(
                    AdoptEngine,
                    replica,
                    should_be_parked=replica.residency is Residency.PARKED,
                    granted_bytes=replica.granted_bytes if replica.residency is Residency.RESIDENT else (),
                    resize_epoch=replica.resize_epoch,
                )
            case _:
                continue


# --- Small parts ------------------------------------------------------------------------------------------------------


def current(state: NodeState, result: EngineInput) -> Replica | None:
    """The replica, if this result belongs to its present lease."""
    replica = state.replicas.get(result.replica_id)
    return replica if replica is not None and replica.lease_epoch == result.lease_epoch else None


def names(state: NodeState, replica: Replica, ctx: Context) -> dict[str, Any]:
    return {
        "node": state.settings.node,
        "at_s": ctx.now_s,
        "replica_id": replica.proposal.replica_id,
        "deployment_id": replica.proposal.deployment_id,
        "model": replica.proposal.deployment.name,
        "lease_epoch": replica.lease_epoch,
    }


def step(
    state: NodeState, replica: Replica, residency: Residency, ctx: Context, *, extra_s: float = 0.0
) -> dict[str, Any]:
    """What a fact that brings the replica there says first: its names, and how long that may take."""
    return {**names(state, replica, ctx), "ends_within_s": allowed_s(residency, state.settings) + extra_s}


def overdue(fact: ReplicaFact) -> Timer:
    """When the step that this fact begins has taken too long."""
    deadline_s = fact.at_s + fact.ends_within_s
    late = StepOverdue(replica_id=fact.replica_id, lease_epoch=fact.lease_epoch, deadline_s=deadline_s)
    return Timer(due_s=deadline_s, input=late)


def starts(
    state: NodeState, proposal: ReplicaProposal, *, lease_epoch: int, wake_epoch: int, ctx: Context
) -> Iterator[Outcome]:
    """Its share is held, its engine is started."""
    starting = ReplicaStarting(
        node=state.settings.node,
        at_s=ctx.now_s,
        replica_id=proposal.replica_id,
        deployment_id=proposal.deployment_id,
        model=proposal.deployment.name,
        lease_epoch=lease_epoch,
        ends_within_s=allowed_s(Residency.STARTING, state.settings),
        wake_epoch=wake_epoch,
    )
    yield starting
    driver = fold.swap_driver_of(state, proposal)
    yield StartEngine(replica=proposal, lease_epoch=lease_epoch, wake_epoch=wake_epoch, swap_driver=driver)
    yield overdue(starting)


def stopping(state: NodeState, replica: Replica, reason: str, ctx: Context, *, drain_s: float) -> Iterator[Outcome]:
    """Its lease ends when its engine is stopped."""
    extra_s = max(0.0, drain_s - state.settings.drain_s)
    about = step(state, replica, Residency.RELEASING, ctx, extra_s=extra_s)
    draining = ReplicaDraining(**about, reason=reason, is_release=True)
    yield draining
    yield effect(StopEngine, replica, drain_s=drain_s)
    yield overdue(draining)


def released(state: NodeState, replica: Replica, reason: str, ctx: Context) -> LeaseReleased:
    return LeaseReleased(
        node=state.settings.node,
        at_s=ctx.now_s,
        replica_id=replica.proposal.replica_id,
        reason=reason,
        lease_epoch=replica.lease_epoch,
    )


def wake_refused(state: NodeState, replica: Replica, reason: str, short_bytes: int, ctx: Context) -> WakeRefused:
    return WakeRefused(
        **names(state, replica, ctx),
        wake_epoch=replica.wake_epoch,
        reason=reason,
        short_by_bytes=max(0, short_bytes),
    )


def look(state: NodeState, replica: Replica, *, may_end: bool) -> LookAtEngine:
    """At a replica that is suspect, or is so from this decision on."""
    at_rest = (Residency.RESIDENT, Residency.PARKED)
    neighbours = tuple(
        other.proposal
        for other in state.replicas.values()
        if other is not replica and other.residency in at_rest and other.share_bytes.keys() & replica.share_bytes.keys()
    )
    was = replica.suspect_from or replica.residency
    return effect(
        LookAtEngine, replica, was=was, granted_bytes=replica.granted_bytes, neighbours=neighbours, may_end=may_end
    )


def effect(kind: type[T], replica: Replica, **values: Any) -> T:
    return kind(
        replica=replica.proposal,
        lease_epoch=replica.lease_epoch,
        wake_epoch=replica.wake_epoch,
        swap_driver=replica.parks_by,
        **values,
    )

"""What watching GPUs leads to: foreign memory counts, faults are told, what misbehaves takes nothing new for a while.

Nothing here stops an engine: who is hit by a fault notices by itself, and what serves on a quarantined GPU goes on.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from kit.outcomes import Context, Outcome, Timer
from schemas.nodes import GpuFaulted, GpuFaultKind, GpuObserved, GpuQuarantined, GpuReinstated
from schemas.placement import GpuCloseAsked, GpuReinstateAsked
from services.nodeagent.core import SERVICE, given_up, released
from services.nodeagent.gpu_inputs import (
    GpuBack,
    GpuFaultSeen,
    GpuGone,
    GpuMeasured,
    GpuTried,
    QuarantineOver,
    TryGpu,
)
from services.nodeagent.inputs import OveruseSeen
from services.nodeagent.quarantines import (
    Watched,
    fold_quarantined,
    fold_reinstated,
    health_of,
    is_quarantined,
    marked,
    quarantine,
    rejoined,
)
from services.nodeagent.state import NodeState
from services.nodeagent.transitions import Residency
from services.nodeagent.xids import Blame, xid_of

FAULT_REPEAT_S: Final = 30.0
"""The same error of a GPU is told again after so long: a broken one can report hundreds in a second."""
TOLD_MAX: Final = 64
BLIND_COUNT: Final = 5
"""Looks in a row without the processes' bytes before it is told: a process that ends meanwhile can hide one."""

SERVICE.folding(GpuQuarantined)(fold_quarantined)
SERVICE.folding(GpuReinstated)(fold_reinstated)


@SERVICE.folding(GpuObserved)
def fold_observed(state: NodeState, fact: GpuObserved) -> None:
    gpu = state.gpus.get(fact.gpu_uuid)
    if gpu is not None:
        state.gpus[fact.gpu_uuid] = replace(gpu, foreign_bytes=fact.foreign_bytes)


# --- Measurements -----------------------------------------------------------------------------------------------------


@SERVICE.observing(GpuMeasured)
def observe_measured(state: NodeState, seen: GpuMeasured, now_s: float) -> None:
    """What must be remembered from look to look. A look that told nothing changes nothing but how long it is so."""
    watched = state.observed.gpus.setdefault(seen.gpu_uuid, Watched())
    if seen.problem:
        watched.silent_since_s = now_s if watched.silent_since_s is None else watched.silent_since_s
        return
    watched.silent_since_s = None
    watched.blind_count = watched.blind_count + 1 if seen.foreign_bytes is None else 0
    if seen.is_too_hot is not None:
        watched.hot_count = watched.hot_count + 1 if seen.is_too_hot else 0
    if seen.ecc_error_count is not None:
        before = watched.ecc_error_count
        watched.ecc_new_count = max(0, seen.ecc_error_count - before) if before is not None else 0
        watched.ecc_error_count = seen.ecc_error_count
    else:
        watched.ecc_new_count = 0
    gpu = state.gpus.get(seen.gpu_uuid)
    if gpu is None or seen.foreign_bytes is None:
        return
    step_bytes = state.settings.foreign_step_bytes
    is_less = seen.foreign_bytes <= gpu.foreign_bytes - step_bytes or seen.foreign_bytes == 0 < gpu.foreign_bytes
    if not is_less:
        watched.less_since_s = None
    elif watched.less_since_s is None:
        watched.less_since_s, watched.less_bytes = now_s, seen.foreign_bytes
    else:
        watched.less_bytes = max(watched.less_bytes, seen.foreign_bytes)


@SERVICE.on(GpuMeasured)
def gpu_measured(state: NodeState, seen: GpuMeasured, ctx: Context) -> Sequence[Outcome]:
    """More foreign memory counts at once, less only when it stays so; without an answer the last word holds."""
    gpu, watched = state.gpus.get(seen.gpu_uuid), state.observed.gpus[seen.gpu_uuid]
    if gpu is None:
        return []
    if seen.problem:
        silent_s = ctx.now_s - (watched.silent_since_s or ctx.now_s)
        if silent_s < state.settings.unanswered_s or is_quarantined(state, seen.gpu_uuid):
            return []
        message = f"the driver has not answered for {silent_s:.0f} s ({seen.problem}); what was measured before holds"
        fault = _fault(state, seen.gpu_uuid, GpuFaultKind.UNANSWERED, message, ctx)
        return [fault, *close(state, seen.gpu_uuid, message, ctx)]
    outcomes: list[Outcome] = []
    if watched.blind_count == BLIND_COUNT:
        message = f"the driver does not say what processes use; {gpu.foreign_bytes} bytes stay counted as foreign"
        outcomes.append(_fault(state, seen.gpu_uuid, GpuFaultKind.UNANSWERED, message, ctx))
    if watched.hot_count == 1:
        degrees = "" if seen.temperature_c is None else f" at {seen.temperature_c} degrees Celsius"
        message = f"the driver slows it down because of its temperature{degrees}"
        outcomes.append(_fault(state, seen.gpu_uuid, GpuFaultKind.THERMAL, message, ctx))
    if watched.ecc_new_count:
        message = f"{watched.ecc_new_count} memory errors that could not be corrected"
        outcomes.append(_fault(state, seen.gpu_uuid, GpuFaultKind.ECC, message, ctx))
        outcomes += close(state, seen.gpu_uuid, message, ctx)
    foreign_bytes = _foreign_news(state, seen, ctx)
    if foreign_bytes is not None:
        used_bytes = foreign_bytes if seen.used_bytes is None else seen.used_bytes
        outcomes.append(
            GpuObserved(
                node=state.settings.node,
                at_s=ctx.now_s,
                gpu_uuid=seen.gpu_uuid,
                foreign_bytes=foreign_bytes,
                used_fraction=min(1.0, used_bytes / gpu.capacity_bytes) if gpu.capacity_bytes else 0.0,
            )
        )
    return outcomes


def _foreign_news(state: NodeState, seen: GpuMeasured, ctx: Context) -> int | None:
    """What counts as foreign from now on; None: no change that matters."""
    gpu, watched = state.gpus[seen.gpu_uuid], state.observed.gpus[seen.gpu_uuid]
    if seen.foreign_bytes is None:
        return None
    if seen.foreign_bytes >= gpu.foreign_bytes + state.settings.foreign_step_bytes:
        return seen.foreign_bytes
    if watched.less_since_s is None or ctx.now_s - watched.less_since_s < state.settings.foreign_settle_s:
        return None
    return watched.less_bytes if watched.less_bytes < gpu.foreign_bytes else None


# --- Faults -----------------------------------------------------------------------------------------------------------


@SERVICE.observing(GpuFaultSeen)
def observe_fault(state: NodeState, seen: GpuFaultSeen, now_s: float) -> None:
    watched = state.observed.gpus.setdefault(seen.gpu_uuid, Watched())
    key = (seen.kind.value, seen.code)
    watched.is_news = now_s - watched.told_s.get(key, float("-inf")) >= FAULT_REPEAT_S
    if watched.is_news:
        watched.told_s.pop(key, None)
        watched.told_s[key] = now_s
        while len(watched.told_s) > TOLD_MAX:
            del watched.told_s[next(iter(watched.told_s))]


@SERVICE.on(GpuFaultSeen)
def fault_seen(state: NodeState, seen: GpuFaultSeen, ctx: Context) -> Sequence[Outcome]:
    """Tell it; only what is the hardware's fault closes the GPU."""
    if seen.gpu_uuid not in state.gpus or not state.observed.gpus[seen.gpu_uuid].is_news:
        return []
    message = seen.message
    if seen.kind is GpuFaultKind.XID and not message:
        message = f"XID {seen.code}: {xid_of(seen.code).meaning}"
    fault = _fault(state, seen.gpu_uuid, seen.kind, message, ctx, code=seen.code, replica_id=seen.replica_id)
    if seen.kind is GpuFaultKind.XID and xid_of(seen.code).blame is Blame.HARDWARE:
        return [fault, *close(state, seen.gpu_uuid, message, ctx)]
    return [fault]


@SERVICE.on(OveruseSeen)
def overuse_seen(state: NodeState, seen: OveruseSeen, ctx: Context) -> Sequence[Outcome]:
    """One workload's fault, not the GPU's."""
    ending = "; it is being stopped" if seen.is_stopped else ""
    message = f"{seen.replica_id} uses {seen.used_bytes} bytes of {seen.granted_bytes} that it is granted{ending}"
    return [_fault(state, seen.gpu_uuid, GpuFaultKind.OVERUSE, message, ctx, replica_id=seen.replica_id)]


def _fault(
    state: NodeState,
    gpu_uuid: str,
    kind: GpuFaultKind,
    message: str,
    ctx: Context,
    *,
    code: int = 0,
    replica_id: str = "",
) -> GpuFaulted:
    return GpuFaulted(
        node=state.settings.node,
        at_s=ctx.now_s,
        gpu_uuid=gpu_uuid,
        kind=kind,
        message=message,
        code=code,
        replica_id=replica_id,
    )


# --- A GPU goes and comes back ----------------------------------------------------------------------------------------


@SERVICE.on(GpuGone)
def gpu_gone(state: NodeState, gone: GpuGone, ctx: Context) -> Sequence[Outcome]:
    """Its memory is gone, so what was there is given up at once and finds another place."""
    if gone.gpu_uuid not in state.gpus:
        return []
    there = [replica for replica in state.replicas.values() if gone.gpu_uuid in replica.share_bytes]
    joined = rejoined(state, [gpu for gpu in state.gpus.values() if gpu.gpu_uuid != gone.gpu_uuid], ctx)
    outcomes: list[Outcome] = [
        _fault(state, gone.gpu_uuid, GpuFaultKind.LOST, "it does not answer any more: its memory is gone", ctx)
    ]
    if not is_quarantined(state, gone.gpu_uuid):
        outcomes += quarantine(state, gone.gpu_uuid, "it was lost", ctx)
    return [*outcomes, joined, *given_up(state, there, ctx)]


@SERVICE.on(GpuBack)
def gpu_back(state: NodeState, back: GpuBack, ctx: Context) -> Sequence[Outcome]:
    """Offered again; it takes new leases after it was tried, when its quarantine is over."""
    if state.joined is None or back.gpu.gpu_uuid in state.gpus:
        return []
    (offer,) = marked(state, [back.gpu])
    gpus = sorted([*state.gpus.values(), offer], key=lambda gpu: (gpu.index, gpu.gpu_uuid))
    return [rejoined(state, gpus, ctx), *_trial(state, offer.gpu_uuid, ctx)]


# --- Quarantine -------------------------------------------------------------------------------------------------------


def close(state: NodeState, gpu_uuid: str, reason: str, ctx: Context) -> list[Outcome]:
    """Quarantine it, and end the leases there that have no process: they need not wait for it to be well."""
    if is_quarantined(state, gpu_uuid):
        return []
    return [*quarantine(state, gpu_uuid, reason, ctx), *_unbound(state, gpu_uuid, reason, ctx)]


def _unbound(state: NodeState, gpu_uuid: str, reason: str, ctx: Context) -> Iterator[Outcome]:
    for replica in state.replicas.values():
        if replica.residency is Residency.GRANTED and gpu_uuid in replica.share_bytes:
            yield released(state, replica, f"its GPU is quarantined: {reason}", ctx)


@SERVICE.on(QuarantineOver)
def quarantine_over(state: NodeState, over: QuarantineOver, ctx: Context) -> Sequence[Outcome]:
    return _trial(state, over.gpu_uuid, ctx) if over.fault_count == health_of(state, over.gpu_uuid).fault_count else []


def _trial(state: NodeState, gpu_uuid: str, ctx: Context) -> list[Outcome]:
    """Try it, if its time is over. One that is away is tried when it is back."""
    health = health_of(state, gpu_uuid)
    is_due = health.is_quarantined and 0.0 < health.until_s <= ctx.now_s
    return [TryGpu(gpu_uuid=gpu_uuid, fault_count=health.fault_count)] if is_due else []


@SERVICE.on(GpuTried)
def gpu_tried(state: NodeState, tried: GpuTried, ctx: Context) -> Sequence[Outcome]:
    """Well again, or closed for longer."""
    health = health_of(state, tried.gpu_uuid)
    if tried.gpu_uuid not in state.gpus or not health.is_quarantined or health.fault_count != tried.fault_count:
        return []
    if not health.until_s:
        return []  # An operator has closed it meanwhile: only an operator opens it.
    if not tried.is_conclusive:
        over = QuarantineOver(gpu_uuid=tried.gpu_uuid, fault_count=tried.fault_count)
        return [Timer(due_s=ctx.now_s + state.settings.quarantine_s, input=over)]
    if tried.problem:
        return quarantine(state, tried.gpu_uuid, f"it was tried and is not well: {tried.problem}", ctx)
    return [_reinstated(state, tried.gpu_uuid, ctx)]


@SERVICE.on(GpuCloseAsked)
def close_asked(state: NodeState, asked: GpuCloseAsked, ctx: Context) -> Sequence[Outcome]:
    """An operator closes it: no fault, and no trial opens it. Also one that is away, or quarantined for a while."""
    health = health_of(state, asked.gpu_uuid)
    is_closed = health.is_quarantined and not health.until_s
    if asked.node != state.settings.node or is_closed:
        return []
    reason = "an operator closed it" + (f": {asked.reason}" if asked.reason else "")
    closed = GpuQuarantined(
        node=state.settings.node, at_s=ctx.now_s, gpu_uuid=asked.gpu_uuid, reason=reason,
        fault_count=health.fault_count, quarantine_s=0.0,
    )  # fmt: skip
    return [closed, *_unbound(state, asked.gpu_uuid, reason, ctx)]


@SERVICE.on(GpuReinstateAsked)
def reinstate_asked(state: NodeState, asked: GpuReinstateAsked, ctx: Context) -> Sequence[Outcome]:
    """An operator says that it is well: it is not tried first."""
    if asked.node != state.settings.node or not is_quarantined(state, asked.gpu_uuid):
        return []
    return [_reinstated(state, asked.gpu_uuid, ctx)]


def _reinstated(state: NodeState, gpu_uuid: str, ctx: Context) -> GpuReinstated:
    away_s = max(0.0, ctx.now_s - health_of(state, gpu_uuid).since_s)
    return GpuReinstated(node=state.settings.node, at_s=ctx.now_s, gpu_uuid=gpu_uuid, away_s=away_s)

"""Which GPUs take nothing new because they misbehaved, for how long, and what the node offers meanwhile. Pure."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from kit.outcomes import Context, Outcome, Timer
from schemas.nodes import GpuOffer, GpuQuarantined, GpuReinstated, NodeJoined
from services.nodeagent.gpu_inputs import QuarantineOver

if TYPE_CHECKING:
    from services.nodeagent.state import NodeState, Replica

FAILED_STARTS_KEPT: Final = 64
"""Deployments whose failed starts on one GPU are remembered: far more than what makes it suspicious."""


@dataclass(slots=True)
class GpuHealth:
    """What is remembered of a GPU that misbehaved, also while it is away."""

    fault_count: int = 0
    """Quarantines so far: each lasts longer."""
    is_quarantined: bool = False
    since_s: float = 0.0
    until_s: float = 0.0
    """When it is tried; 0: when an operator says so."""
    ended_s: float = 0.0
    reason: str = ""
    failed_starts: dict[str, float] = field(default_factory=dict)
    """{deployment_id: when a start of it failed here last}, since anything started here last."""


@dataclass(slots=True)
class Watched:
    """What is seen of one GPU in this life of the agent; no part of history."""

    less_since_s: float | None = None
    """Since when less foreign memory is measured than is offered as taken."""
    less_bytes: int = 0
    """The most of it since then."""
    hot_count: int = 0
    """Looks in a row that found it slowed down by heat."""
    ecc_error_count: int | None = None
    ecc_new_count: int = 0
    """Errors since the look before."""
    silent_since_s: float | None = None
    """Since when the driver does not answer."""
    blind_count: int = 0
    """Looks in a row in which the driver did not say how much foreign processes use."""
    told_s: dict[tuple[str, int], float] = field(default_factory=dict)
    """{(kind, code): when it was told last}"""
    is_news: bool = False
    """The fault at hand was not told lately."""


def health_of(state: "NodeState", gpu_uuid: str) -> GpuHealth:
    """A copy to look at; changes come by facts."""
    return state.health.get(gpu_uuid) or GpuHealth()


def is_quarantined(state: "NodeState", gpu_uuid: str) -> bool:
    health = state.health.get(gpu_uuid)
    return health is not None and health.is_quarantined


def barred(state: "NodeState", gpu_uuids: Iterable[str]) -> str:
    """Why nothing may be started there; empty: it may."""
    for gpu_uuid in gpu_uuids:
        if is_quarantined(state, gpu_uuid):
            return f"{gpu_uuid} is quarantined: {state.health[gpu_uuid].reason}"
    return ""


def marked(state: "NodeState", gpus: Iterable[GpuOffer]) -> tuple[GpuOffer, ...]:
    """The offers, with what is remembered of those that misbehaved."""
    return tuple(
        replace(gpu, quarantine_reason=state.health[gpu.gpu_uuid].reason)
        if is_quarantined(state, gpu.gpu_uuid)
        else gpu
        for gpu in gpus
    )


def quarantine(state: "NodeState", gpu_uuid: str, reason: str, ctx: Context) -> list[Outcome]:
    """Close it to new leases, for longer each time; after many times, until an operator opens it."""
    settings, health = state.settings, health_of(state, gpu_uuid)
    is_forgotten = not health.is_quarantined and ctx.now_s - health.ended_s > settings.quarantine_forget_s
    count = 1 if is_forgotten else health.fault_count + 1
    lasts_s = 0.0
    if count < settings.quarantine_final_count:
        lasts_s = min(settings.quarantine_max_s, settings.quarantine_s * 2.0 ** (count - 1))
    fact = GpuQuarantined(
        node=settings.node,
        at_s=ctx.now_s,
        gpu_uuid=gpu_uuid,
        reason=reason,
        fault_count=count,
        quarantine_s=lasts_s,
    )
    over = QuarantineOver(gpu_uuid=gpu_uuid, fault_count=count)
    return [fact, Timer(due_s=ctx.now_s + lasts_s, input=over)] if lasts_s else [fact]


def timers(state: "NodeState", ctx: Context) -> Iterator[Timer]:
    """Of all quarantines that end by themselves, after a start of the agent."""
    for gpu_uuid, health in state.health.items():
        if health.is_quarantined and health.until_s:
            over = QuarantineOver(gpu_uuid=gpu_uuid, fault_count=health.fault_count)
            yield Timer(due_s=max(ctx.now_s, health.until_s), input=over)


def bad_start(state: "NodeState", replica: "Replica", ctx: Context) -> list[Outcome]:
    """Its start failed. Where starts of different deployments failed and none succeeded, the GPU is to blame."""
    outcomes: list[Outcome] = []
    for gpu_uuid in replica.share_bytes:
        if is_quarantined(state, gpu_uuid) or gpu_uuid not in state.gpus:
            continue
        known = health_of(state, gpu_uuid).failed_starts
        lately = {name for name, at_s in known.items() if ctx.now_s - at_s <= state.settings.bad_start_window_s}
        count = len(lately | {replica.proposal.deployment_id})
        if count >= state.settings.bad_start_count:
            reason = f"starts of {count} different deployments failed on it, and none succeeded since"
            outcomes += quarantine(state, gpu_uuid, reason, ctx)
    return outcomes


def rejoined(state: "NodeState", gpus: Collection[GpuOffer], ctx: Context) -> NodeJoined:
    """What the node offers changed: the same otherwise."""
    assert state.joined is not None, "a GPU is watched before the node was looked at"
    return replace(state.joined, at_s=ctx.now_s, gpus=tuple(gpus))


# --- Folds ------------------------------------------------------------------------------------------------------------


def fold_quarantined(state: "NodeState", fact: GpuQuarantined) -> None:
    health = state.health.setdefault(fact.gpu_uuid, GpuHealth())
    if not health.is_quarantined:
        health.since_s = fact.at_s
    health.is_quarantined, health.reason, health.fault_count = True, fact.reason, fact.fault_count
    health.until_s = fact.at_s + fact.quarantine_s if fact.quarantine_s else 0.0
    _mark(state, fact.gpu_uuid, fact.reason)


def fold_reinstated(state: "NodeState", fact: GpuReinstated) -> None:
    health = state.health.setdefault(fact.gpu_uuid, GpuHealth())
    health.is_quarantined, health.reason, health.until_s, health.ended_s = False, "", 0.0, fact.at_s
    health.failed_starts = {}
    _mark(state, fact.gpu_uuid, "")


def start_failed(state: "NodeState", replica: "Replica", at_s: float) -> None:
    for gpu_uuid in replica.share_bytes:
        starts = state.health.setdefault(gpu_uuid, GpuHealth()).failed_starts
        starts.pop(replica.proposal.deployment_id, None)
        starts[replica.proposal.deployment_id] = at_s
        while len(starts) > FAILED_STARTS_KEPT:
            del starts[next(iter(starts))]


def start_succeeded(state: "NodeState", replica: "Replica") -> None:
    for gpu_uuid in replica.share_bytes:
        health = state.health.get(gpu_uuid)
        if health is not None:
            health.failed_starts = {}


def _mark(state: "NodeState", gpu_uuid: str, reason: str) -> None:
    gpu = state.gpus.get(gpu_uuid)
    if gpu is not None:
        state.gpus[gpu_uuid] = replace(gpu, quarantine_reason=reason)

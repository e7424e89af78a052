"""Where a replica goes: the tightest GPU that has room, or the least promised one that it can share by taking turns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from schemas.deployments import GRADE_ORDER, DeploymentSpec, ShareSpec
from schemas.nodes import GpuOffer
from schemas.placement import Alternative, FailureReason
from schemas.units import GiB
from services.placement.state import ClusterState, Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A GPU for one replica, and why."""

    node: str
    gpu_uuid: str
    request_bytes: int
    limit_bytes: int
    reason: str
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoChoice:
    """Why no GPU will do, by how much, and what would help."""

    reason: FailureReason
    message: str
    missing_bytes: int
    remedy: str
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    gpu: GpuOffer
    node: str
    request_bytes: int
    left_bytes: int
    """Allocatable less all requests with this one: negative when replicas must take turns."""


def request_bytes_on(gpu: GpuOffer, share: ShareSpec) -> int:
    """The request in bytes on this GPU. A portion is of allocatable bytes, rounded down, so that 0.5 + 0.5 fits."""
    if share.request_bytes is not None:
        return share.request_bytes
    assert share.request_portion is not None
    return int(gpu.allocatable_bytes * share.request_portion)


def limit_bytes_on(gpu: GpuOffer, share: ShareSpec) -> int:
    """The limit in bytes, at least the request and at most the GPU's allocatable bytes."""
    wanted = request_bytes_on(gpu, share)
    if share.limit_bytes is not None:
        wanted = max(wanted, share.limit_bytes)
    elif share.limit_portion is not None:
        wanted = max(wanted, int(gpu.allocatable_bytes * share.limit_portion))
    return min(wanted, gpu.allocatable_bytes)


def choose(
    state: ClusterState, spec: DeploymentSpec, *, refused_nodes: Sequence[str] = (), closed: Mapping[str, str] = {}
) -> Choice | NoChoice:
    """The GPU for one more replica of this deployment.

    First choice: room for its request beside all other requests, on the GPU that is left with the least (best fit; ties
    to the smaller UUID). Second, for replicas that may be parked: a GPU whose replicas can take turns, where the
    smallest part is promised already. O(replicas + GPUs).
    """
    fits: list[_Fit] = []
    alternatives: list[Alternative] = []
    for node, gpu in _gpus(state):
        verdict = _fit(state, node, gpu, spec, refused_nodes, closed)
        if isinstance(verdict, _Fit):
            fits.append(verdict)
        else:
            alternatives.append(verdict)
    roomy = [fit for fit in fits if fit.left_bytes >= 0]
    if roomy:
        best = min(roomy, key=lambda fit: (fit.left_bytes, fit.gpu.gpu_uuid))
        reason = f"tightest fit: {_gib(best.left_bytes)} left to promise"
    elif fits:
        best = min(fits, key=lambda fit: (-fit.left_bytes / fit.gpu.allocatable_bytes, fit.gpu.gpu_uuid))
        reason = f"shares by taking turns: requests exceed the GPU by {_gib(-best.left_bytes)}"
    else:
        return _no_choice(state, spec, alternatives)
    others = [
        Alternative(node=f.node, gpu_uuid=f.gpu.gpu_uuid, reason=_why_not(f, best)) for f in fits if f is not best
    ]
    return Choice(
        node=best.node,
        gpu_uuid=best.gpu.gpu_uuid,
        request_bytes=best.request_bytes,
        limit_bytes=limit_bytes_on(best.gpu, spec.share),
        reason=reason,
        alternatives=(*others, *alternatives),
    )


def _why_not(fit: _Fit, best: _Fit) -> str:
    """Why a GPU that would do was not chosen."""
    if fit.left_bytes >= 0:
        return f"would do too, but {_gib(fit.left_bytes)} would be left to promise"
    over = f"requests would exceed it by {_gib(-fit.left_bytes)}"
    return f"would need to take turns: {over}" if best.left_bytes >= 0 else f"is promised more: {over}"


def _gpus(state: ClusterState) -> Iterator[tuple[Node, GpuOffer]]:
    for name in sorted(state.nodes):
        node = state.nodes[name]
        for uuid in sorted(node.gpus):
            yield node, node.gpus[uuid]


def _fit(
    state: ClusterState,
    node: Node,
    gpu: GpuOffer,
    spec: DeploymentSpec,
    refused_nodes: Sequence[str],
    closed: Mapping[str, str],
) -> _Fit | Alternative:
    """Whether and how it fits this GPU."""

    def no(reason: str, short_by_bytes: int = 0) -> Alternative:
        return Alternative(node=node.name, gpu_uuid=gpu.gpu_uuid, reason=reason, short_by_bytes=max(0, short_by_bytes))

    if node.name in closed:
        return no(closed[node.name])
    if node.name in refused_nodes:
        return no("the node refused it")
    minimum = spec.share.minimum_grade
    if minimum is not None and GRADE_ORDER.index(gpu.grade) > GRADE_ORDER.index(minimum):
        return no(f"grade '{gpu.grade}' is weaker than the demanded '{minimum}'")
    request_bytes = request_bytes_on(gpu, spec.share)
    if request_bytes > gpu.allocatable_bytes:
        return no("larger than the GPU", request_bytes - gpu.allocatable_bytes)
    if spec.swap.is_parkable:
        over_bytes = _host_bytes(state, node.name) + spec.engine.weights_bytes - node.host_budget_bytes
        if over_bytes > 0:
            return no("no host memory for its parked weights", over_bytes)
    fixed, resting, largest, promised = _account(state, gpu.gpu_uuid)
    residue_bytes = min(state.settings.residue_bytes, request_bytes)
    if spec.swap.is_parkable:
        resting, largest = resting + residue_bytes, max(largest, request_bytes - residue_bytes)
    else:
        fixed += request_bytes
    short_bytes = fixed + resting + largest - gpu.allocatable_bytes
    if short_bytes > 0:
        return no("no room", short_bytes)
    left_bytes = gpu.allocatable_bytes - promised - request_bytes
    return _Fit(gpu=gpu, node=node.name, request_bytes=request_bytes, left_bytes=left_bytes)


def _account(state: ClusterState, gpu_uuid: str) -> tuple[int, int, int, int]:
    """(always resident, residues of those that park, largest share above its residue among them, all requests)."""
    fixed = resting = largest = promised = 0
    for replica in state.on_gpu(gpu_uuid):
        request_bytes = replica.request_on(gpu_uuid)
        promised += request_bytes
        if replica.is_parkable:
            residue_bytes = replica.residue_on(gpu_uuid)
            resting += residue_bytes
            largest = max(largest, request_bytes - residue_bytes)
        else:
            fixed += request_bytes
    return fixed, resting, largest, promised


def _host_bytes(state: ClusterState, node: str) -> int:
    return sum(r.weights_bytes for r in state.on_node(node) if r.is_parkable)


def _no_choice(state: ClusterState, spec: DeploymentSpec, alternatives: list[Alternative]) -> NoChoice:
    """The reason that is nearest to a solution: what is short by least."""
    if not alternatives:
        return NoChoice(
            reason=FailureReason.NO_NODE,
            message="no node has joined yet",
            missing_bytes=0,
            remedy="start a node agent; the deployment is placed as soon as one joins",
            alternatives=(),
        )
    short = [a for a in alternatives if a.short_by_bytes]
    nearest = min(short, key=lambda a: (a.short_by_bytes, a.gpu_uuid)) if short else alternatives[0]
    missing = nearest.short_by_bytes
    where = f"{nearest.node}/{nearest.gpu_uuid[:12]}"
    reasons = {
        "larger than the GPU": (FailureReason.LARGER_THAN_ANY_GPU, f"use a share smaller by {_gib(missing)}"),
        "no host memory for its parked weights": (
            FailureReason.NO_HOST_MEMORY,
            f"raise the node's host budget by {_gib(missing)}, or retire a parked model",
        ),
        "no room": (FailureReason.NO_GPU_HAS_ROOM, f"retire a deployment, or use a share smaller by {_gib(missing)}"),
        "the node is lost": (FailureReason.NO_NODE, "see why its node agent is silent"),
        "the node is quarantined: it came and went": (FailureReason.NO_NODE, "it is tried when the quarantine ends"),
        "the node refused it": (FailureReason.REFUSED_BY_NODE, "see the node's reason in the events"),
    }
    reason, remedy = reasons.get(
        nearest.reason,
        (FailureReason.GRADE_NOT_AVAILABLE, "lower the minimum grade, or add a node that can enforce it"),
    )
    by = f" by {_gib(missing)}" if missing else ""
    return NoChoice(
        reason=reason,
        message=f"{spec.name} fits no GPU; nearest is {where}: {nearest.reason}{by}",
        missing_bytes=missing,
        remedy=remedy,
        alternatives=tuple(alternatives),
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GiB:.1f} GiB"

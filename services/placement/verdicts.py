"""Why nothing fits: every place that was ruled out is counted by its reason, the nearest ones are named."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from schemas.placement import Alternative, Constraint, FailureReason, ReasonCode
from schemas.units import GiB
from services.placement.demands import GRADE_RANKS, Demand
from services.placement.overcommit import over_use_bytes
from services.placement.packing.fleet import Ask, NodeRoom

if TYPE_CHECKING:
    from services.placement.state import ClusterState, Node

ALTERNATIVES_MAX: Final = 3
"""Named in a fact; `constraints` counts all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Holds for every deployment of equal demand until something grows."""

    reason: FailureReason
    nearest: str
    """The message without the deployment's name."""
    missing_bytes: int
    remedy: str
    alternatives: tuple[Alternative, ...] = ()
    codes: tuple[ReasonCode, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    def message_for(self, model: str) -> str:
        return f"{model} {self.nearest}" if self.alternatives else self.nearest


_REASONS: Final[dict[ReasonCode, tuple[FailureReason, str]]] = {
    ReasonCode.LARGER_THAN_GPU: (FailureReason.LARGER_THAN_ANY_GPU, "use a share smaller by {missing}"),
    ReasonCode.NO_PARK_MEMORY: (
        FailureReason.NO_HOST_MEMORY,
        "raise the node's host budget by {missing}, or retire a parked model",
    ),
    ReasonCode.NO_HOST_MEMORY: (FailureReason.NO_HOST_MEMORY, "ask for less host memory, by {missing}"),
    ReasonCode.NO_HOST_CPU: (FailureReason.NO_HOST_CPU, "ask for fewer CPU cores, or add a node that has them"),
    ReasonCode.NO_GPU_ROOM: (
        FailureReason.NO_GPU_HAS_ROOM,
        "retire a deployment, or use a share smaller by {missing}",
    ),
    ReasonCode.FOREIGN_MEMORY: (
        FailureReason.NO_GPU_HAS_ROOM,
        "end the processes that are not ours and use {missing} of it",
    ),
    ReasonCode.TURNS_TAKEN: (
        FailureReason.NO_GPU_HAS_ROOM,
        "retire a deployment, or wait until those that share the GPU are used less",
    ),
    ReasonCode.NODE_LOST: (FailureReason.NO_NODE, "see why its node agent is silent"),
    ReasonCode.NODE_QUARANTINED: (FailureReason.NO_NODE, "it is tried when the quarantine ends"),
    ReasonCode.GPU_QUARANTINED: (
        FailureReason.NO_GPU_HAS_ROOM,
        "it is tried when its quarantine ends; if it is well, `sublet gpu reinstate` opens it",
    ),
    ReasonCode.MIG_TAKEN: (
        FailureReason.NO_GPU_HAS_ROOM,
        "retire what has the MIG instance, or make more instances",
    ),
    ReasonCode.NODE_REFUSED: (FailureReason.REFUSED_BY_NODE, "see the node's reason in the events"),
    ReasonCode.GRADE_NOT_AVAILABLE: (
        FailureReason.GRADE_NOT_AVAILABLE,
        "lower the minimum grade, or add a node that can enforce it",
    ),
    ReasonCode.GPU_MODEL: (FailureReason.CONSTRAINTS, "name a GPU model that the fleet has, or add such a node"),
    ReasonCode.NODE_LABELS: (FailureReason.CONSTRAINTS, "ask for fewer labels, or label a node so"),
    ReasonCode.ANTI_AFFINITY: (FailureReason.CONSTRAINTS, "allow replicas nearer to each other, or add a node"),
    ReasonCode.TOO_FEW_GPUS: (FailureReason.CONSTRAINTS, "use fewer GPUs for each replica, or add a larger node"),
}


def verdict_of(
    state: "ClusterState",
    demand: Demand,
    *,
    now_s: float,
    refused_nodes: Collection[str] = (),
    near_nodes: Collection[str] = (),
    near_gpus: Collection[tuple[str, int]] = (),
) -> Verdict:
    """Of a demand that fits nowhere. O(nodes x GPUs); one counts for all equal demands until something grows."""
    against: list[Alternative] = []
    for room in state.index.rooms.fleet:
        against += _against(state, demand, room, now_s, refused_nodes, near_nodes, near_gpus)
    if not against:
        return Verdict(
            reason=FailureReason.NO_NODE,
            nearest="no node has joined yet",
            missing_bytes=0,
            remedy="start a node agent; the deployment is placed as soon as one joins",
            codes=(ReasonCode.NO_NODE,),
        )
    ranked = sorted(against, key=lambda other: (not other.short_by_bytes, other.short_by_bytes))
    first = ranked[0]
    missing = gib(first.short_by_bytes)
    reason, remedy = _REASONS[first.code]
    by = f" by {missing}" if first.short_by_bytes else ""
    index = state.nodes[first.node].gpus[first.gpu_uuid].index
    constraints = constraints_of(against)
    return Verdict(
        reason=reason,
        nearest=f"fits no GPU; nearest is {first.node}/gpu{index}: {first.reason}{by}",
        missing_bytes=first.short_by_bytes,
        remedy=remedy.format(missing=missing),
        alternatives=tuple(ranked[:ALTERNATIVES_MAX]),
        codes=(first.code, *(c.code for c in constraints if c.code is not first.code)),
        constraints=constraints,
    )


def objections(state: "ClusterState", demand: Demand, now_s: float) -> list[Alternative]:
    """Every GPU that would not do for one more such replica as things are now, the nearest one first. For questions."""
    against = [other for room in state.index.rooms.fleet for other in _against(state, demand, room, now_s, (), (), ())]
    return sorted(against, key=lambda other: (not other.short_by_bytes, other.short_by_bytes))


def constraints_of(against: Collection[Alternative]) -> tuple[Constraint, ...]:
    """Counted by reason; the one that rules out most GPUs first."""
    by_code: dict[ReasonCode, list[Alternative]] = {}
    for other in against:
        by_code.setdefault(other.code, []).append(other)
    constraints = [
        Constraint(
            code=code,
            gpu_count=len(others),
            node_count=len({other.node for other in others}),
            short_by_bytes=min((o.short_by_bytes for o in others if o.short_by_bytes), default=0),
        )
        for code, others in by_code.items()
    ]
    return tuple(sorted(constraints, key=lambda c: (-c.gpu_count, c.code)))


def _against(
    state: "ClusterState",
    demand: Demand,
    room: NodeRoom,
    now_s: float,
    refused_nodes: Collection[str],
    near_nodes: Collection[str],
    near_gpus: Collection[tuple[str, int]],
) -> Iterator[Alternative]:
    """For every GPU of this node why it will not do."""
    rooms, node = state.index.rooms, state.nodes[room.name]
    uuids = rooms.gpu_uuids[room.name]
    whole = _against_node(state, demand, room, node, now_s, refused_nodes, near_nodes)
    ask = rooms.ask_of(demand)
    fits: list[int] = []
    for gpu, uuid in enumerate(uuids):
        found = whole if whole is not None else _against_gpu(state, demand, ask, room, gpu, near_gpus, now_s)
        if found is None:
            fits.append(gpu)
            continue
        code, reason, short_by_bytes = found
        yield Alternative(node=room.name, gpu_uuid=uuid, reason=reason, short_by_bytes=short_by_bytes, code=code)
    for gpu in fits if len(fits) < demand.gpu_count else ():
        reason = f"only {len(fits)} of its GPUs would do, not {demand.gpu_count}"
        yield Alternative(node=room.name, gpu_uuid=uuids[gpu], reason=reason, code=ReasonCode.TOO_FEW_GPUS)


_Against = tuple[ReasonCode, str, int]


def _against_node(
    state: "ClusterState",
    demand: Demand,
    room: NodeRoom,
    node: "Node",
    now_s: float,
    refused_nodes: Collection[str],
    near_nodes: Collection[str],
) -> _Against | None:
    """Why no GPU of this node will do, and the missing bytes."""
    if node.lost_at_s is not None:
        return ReasonCode.NODE_LOST, "the node is lost", 0
    if not node.is_open(now_s):
        return ReasonCode.NODE_QUARANTINED, "the node is quarantined: it came and went", 0
    if node.name in refused_nodes:
        return ReasonCode.NODE_REFUSED, "the node refused it", 0
    if node.name in near_nodes:
        return ReasonCode.ANTI_AFFINITY, "another replica of it is there", 0
    missing = sorted(demand.labels - room.shape.labels)
    if missing:
        return ReasonCode.NODE_LABELS, f"the node has no label {', '.join(missing)}", 0
    if len(room.shape.gpus) < demand.gpu_count:
        return ReasonCode.TOO_FEW_GPUS, f"the node has {len(room.shape.gpus)} GPUs, not {demand.gpu_count}", 0
    if room.cpu_milli < demand.cpu_millicores:
        return ReasonCode.NO_HOST_CPU, f"{room.cpu_milli} millicores of CPU are left", 0
    if room.memory_bytes < demand.memory_bytes:
        return ReasonCode.NO_HOST_MEMORY, "no host memory", demand.memory_bytes - max(0, room.memory_bytes)
    short_bytes = demand.weights_bytes - state.index.rooms.park_left[node.name]
    if demand.weights_bytes and short_bytes > 0:
        return ReasonCode.NO_PARK_MEMORY, "no host memory for its parked weights", short_bytes
    return None


def _against_gpu(
    state: "ClusterState",
    demand: Demand,
    ask: Ask | None,
    room: NodeRoom,
    gpu: int,
    near_gpus: Collection[tuple[str, int]],
    now_s: float,
) -> _Against | None:
    shape, rooms = room.shape.gpus[gpu], state.index.rooms
    offer = state.nodes[room.name].gpus[rooms.gpu_uuids[room.name][gpu]]
    if offer.quarantine_reason:
        return ReasonCode.GPU_QUARANTINED, f"it is quarantined: {offer.quarantine_reason}", 0
    if ask is None or (ask.gpu_models and shape.model not in ask.gpu_models):
        return ReasonCode.GPU_MODEL, f"it is a {shape.model}", 0
    minimum = demand.minimum_grade
    if minimum is not None and shape.grade_rank > GRADE_RANKS[minimum]:
        return ReasonCode.GRADE_NOT_AVAILABLE, f"grade '{offer.grade}' is weaker than the demanded '{minimum}'", 0
    units = ask.units_on(shape)
    assert units is not None
    if (room.name, gpu) in near_gpus:
        return ReasonCode.ANTI_AFFINITY, "another replica of it is there", 0
    if units > shape.capacity_units:
        return ReasonCode.LARGER_THAN_GPU, "larger than the GPU", units - shape.capacity_units
    if rooms.is_taken(room.name, gpu):
        return ReasonCode.MIG_TAKEN, "a MIG instance takes one replica, and has one", 0
    account = rooms.accounts[room.name][gpu]
    residue_bytes = min(state.settings.residue_bytes, units) if demand.is_parkable else 0
    short_bytes = account.short_with(units, residue_bytes, is_parkable=demand.is_parkable)
    if 0 < short_bytes <= room.foreign_units[gpu]:
        return ReasonCode.FOREIGN_MEMORY, "no room beside what processes of others use", short_bytes
    if short_bytes > 0:
        return ReasonCode.NO_GPU_ROOM, "no room", short_bytes
    if account.left_bytes(units) < 0:
        over_bytes = over_use_bytes(state, room.name, gpu, units, is_parkable=demand.is_parkable, now_s=now_s)
        if over_bytes > 0:
            return ReasonCode.TURNS_TAKEN, "those that share it are expected to be in use at once", over_bytes
    return None


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GiB:.1f} GiB"

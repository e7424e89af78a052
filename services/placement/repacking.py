"""When moves begin, which ones, and how many: to tidy up, for a deployment that waits, or because an operator asks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from kit.outcomes import Context, Input, Outcome, Timer
from schemas.deployments import AntiAffinity, Strategy, WorkloadKind
from schemas.placement import MoveDecided, PlacementProposed, ReasonCode, ReplicaProposal, ShareProposal
from services.placement.defragment import Board, Gpu, Occupant, Plan, Step, empty_gpus, free_gpus, make_room
from services.placement.demands import limit_bytes_on
from services.placement.folds import HOUR_S
from services.placement.observed import is_idle
from services.placement.packing.fleet import Ask
from services.placement.placing import name_of
from services.placement.state import ClusterState, Deployment, Replica
from services.placement.verdicts import gib

WAITING_LOOKED_AT_MAX: Final = 4
"""So many waiting deployments are tried at each look, the most urgent first."""
AT_REST: Final = frozenset({"parked", "resident", "granted"})
"""States in which a replica may be moved: it is not starting, waking, draining, or about to be granted or refused."""
NOWHERE: Final = Ask(gpu_count=0)
"""What a replica asks for that is not moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TidyUp(Input):
    """Look whether moves would free GPUs or let a waiting deployment in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOn(Input):
    """Moves of these deployments have ended: the next ones may begin."""

    deployment_ids: tuple[str, ...] = ()


ASKED: Final = "an operator asked for whole GPUs"
EMPTIES: Final = "an operator closed the GPU and wants it empty"


def look_later(state: ClusterState, ctx: Context) -> Timer:
    return Timer(due_s=ctx.now_s + state.settings.defragment_every_s, input=TidyUp())


def begun(state: ClusterState, ctx: Context) -> list[Outcome]:
    """The moves to begin now: those that an operator asked for, off closed GPUs, for who waits, and to tidy up."""
    if len(state.moves) >= state.settings.moves_at_once_max:
        return []
    asked = state.repacking
    if asked is not None and asked.left_count > 0 and ctx.now_s <= asked.until_s:
        plan = planned(state, move_count_max=asked.left_count, now_s=ctx.now_s)
        if plan.steps:
            return begin(state, plan, ASKED, ctx)
    if state.draining:
        plan = emptied(state, now_s=ctx.now_s)
        if plan.steps:
            return begin(state, plan, EMPTIES, ctx)
    lately = sum(ctx.now_s - at_s < HOUR_S for at_s in state.move_times_s)
    budget = state.settings.moves_per_hour_max - lately
    if budget <= 0:
        return []
    if not any(free > 0 for room in state.index.rooms.fleet if room.is_open for free in room.free_units):
        return []  # Nothing could be moved anywhere.
    for deployment in _who_waits(state):
        room = _room_for(state, deployment, move_count_max=budget, now_s=ctx.now_s)
        if room is not None:
            return begin(state, room, f"makes room for {deployment.spec.name}", ctx)
    if not is_fragmented(state):
        return []
    plan = planned(state, move_count_max=budget, now_s=ctx.now_s, is_tidying=True)
    return begin(state, plan, "tidies up", ctx)


def planned(state: ClusterState, *, move_count_max: int, now_s: float, is_tidying: bool = False) -> Plan:
    """Whole GPUs that so many moves free. Tidying up touches only what is parked or idle and has been there a while."""
    board = _board(state, now_s=now_s, rests_s=state.settings.move_rest_s if is_tidying else 0.0)
    return free_gpus(board, move_count_max=move_count_max, may_move_serving=not is_tidying)


def emptied(state: ClusterState, *, now_s: float) -> Plan:
    """Off the GPUs that an operator wants empty, as far as there is room elsewhere now."""
    positions = state.index.rooms.positions
    gpus = [(node, positions[node][uuid]) for uuid, node in state.draining.items() if uuid in positions.get(node, {})]
    return empty_gpus(_board(state, now_s=now_s), gpus)


def leaving_and_staying(state: ClusterState, node: str, gpu_uuid: str) -> tuple[list[str], list[str]]:
    """Who holds a place on a GPU: the replicas that may be moved, and those that stay until they end."""
    movable: list[str] = []
    staying: list[str] = []
    for replica in state.replicas.values():
        if replica.node != node or gpu_uuid not in replica.gpu_uuids or not replica.holds_place:
            continue
        deployment = state.deployments.get(replica.deployment_id)
        may_leave = deployment is not None and _may_ever_move(deployment, replica)
        (movable if may_leave else staying).append(replica.replica_id)
    return movable, staying


def is_fragmented(state: ClusterState) -> bool:
    """Whether enough of what nobody is promised lies in pieces; whole idle GPUs are better used first."""
    pieces = whole = 0
    rooms = state.index.rooms
    for room in rooms.fleet:
        for index, free in enumerate(room.free_units if room.is_open else ()):
            if free > 0 and not room.foreign_units[index]:
                if free == room.shape.gpus[index].capacity_units:
                    whole += free
                else:
                    pieces += free
    return pieces > 0 and pieces >= state.settings.fragmented_fraction_min * (pieces + whole)


def _who_waits(state: ClusterState) -> list[Deployment]:
    """Those that moves could help, the most urgent first; gangs wait for more than one place and are left out."""
    wishes = [state.deployments[deployment_id] for deployment_id in state.waiting]
    helped = [d for d in wishes if d.problem and not d.spec.placement.is_gang and not set(d.codes) & _NOT_ROOM]
    helped.sort(key=lambda d: (-d.spec.priority_number, d.admitted_at_s, d.deployment_id))
    return helped[:WAITING_LOOKED_AT_MAX]


_NOT_ROOM: Final = frozenset({ReasonCode.OVER_QUOTA, ReasonCode.WAITS_FOR_VICTIMS})
"""Codes of deployments that do not wait for room, or whose room is being made."""


def _room_for(state: ClusterState, deployment: Deployment, *, move_count_max: int, now_s: float) -> Plan | None:
    rooms = state.index.rooms
    demand = state.index.demand_of(deployment.deployment_id, deployment.spec)
    ask = rooms.ask_of(demand)
    if ask is None:
        return None
    without = _far_from(state, deployment) | frozenset(rooms.without_park_memory(demand.weights_bytes))
    board = _board(state, now_s=now_s)
    return make_room(board, ask, move_count_max=move_count_max, without_nodes=without)


# --- The board --------------------------------------------------------------------------------------------------------


def _board(state: ClusterState, *, now_s: float, rests_s: float = 0.0) -> Board:
    """All that is promised a place, as the search sees it. O(replicas)."""
    rooms = state.index.rooms
    rooms.open_until(now_s, state.nodes)
    on_gpu: dict[Gpu, list[Occupant]] = {}
    leaving = {move.replica_id for move in state.moves.values()}
    busy = {move.deployment_id for move in state.moves.values()}
    for replica in state.replicas.values():
        positions = rooms.positions.get(replica.node, {})
        if not replica.holds_place or not all(uuid in positions for uuid in replica.gpu_uuids):
            continue
        occupant = Occupant(
            replica_id=replica.replica_id,
            node=replica.node,
            gpu_indices=tuple(positions[uuid] for uuid in replica.gpu_uuids),
            units=tuple(share.request_bytes for share in replica.shares),
            is_leaving=replica.is_releasing or replica.replica_id in leaving,
            **_wish(state, replica, now_s=now_s, rests_s=rests_s, is_busy=replica.deployment_id in busy),
        )
        for gpu in occupant.gpus:
            on_gpu.setdefault(gpu, []).append(occupant)
    return Board(packer=rooms.packer(spreads_nodes=False), on_gpu=on_gpu, park_room=rooms.park_left)


def _wish(state: ClusterState, replica: Replica, *, now_s: float, rests_s: float, is_busy: bool) -> dict[str, Any]:
    """Whether it may be moved, and what it would ask for elsewhere."""
    deployment = state.deployments.get(replica.deployment_id)
    demand = None if deployment is None else state.index.demand_of(deployment.deployment_id, deployment.spec)
    ask = None if demand is None else state.index.rooms.ask_of(demand)
    if deployment is None or demand is None or ask is None or is_busy or not is_movable(state, deployment, replica):
        return {"ask": NOWHERE, "is_movable": False}
    there_since_s = replica.since_s if replica.ready_at_s is None else replica.ready_at_s
    rested_s = now_s - max(there_since_s, replica.moved_at_s)  # A node's clock may be far behind this one.
    if ReasonCode.ROOM_BY_MOVING in replica.codes:
        rests_s = state.settings.move_rest_s  # Whatever moved a moment ago is where it shall be.
    is_rested = rested_s >= rests_s and now_s >= deployment.not_moved_before_s
    idle = is_idle(state.observed, replica.deployment_id, now_s=now_s, settings=state.settings)
    return {
        "ask": ask,
        "is_movable": is_rested,
        "is_serving": replica.state == "resident" and not idle,
        "moved_bytes": 0 if replica.ready_at_s is None else replica.weights_bytes,
        "park_bytes": demand.weights_bytes,
        "without_nodes": _far_from(state, deployment) | frozenset(deployment.refused_nodes),
    }


def is_movable(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    """Whether a copy elsewhere could take its place.

    Never: who must not be moved or must keep apart from others as far as may be, part of a gang, a training (two copies
    would both train, and a new one begins from its last checkpoint), and whoever is about to change.
    """
    return (
        _may_ever_move(deployment, replica)
        and replica.state in AT_REST
        and not replica.is_releasing
        and not state.is_lost(replica)
    )


def _may_ever_move(deployment: Deployment, replica: Replica) -> bool:
    wish = deployment.spec.placement
    return (
        wish.is_movable
        and not wish.is_gang
        and not replica.gang_id
        and Strategy.SPREAD not in (wish.node_strategy, wish.gpu_strategy)
        and deployment.spec.kind is WorkloadKind.INFERENCE
    )


def _far_from(state: ClusterState, deployment: Deployment) -> frozenset[str]:
    """Nodes that another replica of it may not share."""
    if deployment.spec.placement.anti_affinity is AntiAffinity.NONE:
        return frozenset()
    return frozenset(replica.node for replica in state.replicas_of(deployment.deployment_id))


# --- Beginning --------------------------------------------------------------------------------------------------------


def begin(state: ClusterState, plan: Plan, why: str, ctx: Context) -> list[Outcome]:
    """The first moves of a plan: each is decided and its replacement proposed. The others follow when these end."""
    slots = max(0, state.settings.moves_at_once_max - len(state.moves))
    return [fact for step in _one_per_deployment(state, plan.steps)[:slots] for fact in _decided(state, step, why, ctx)]


def _one_per_deployment(state: ClusterState, steps: Iterable[Step]) -> list[Step]:
    """So that replacements have names of their own, and no deployment has most of its replicas in motion."""
    first: dict[str, Step] = {}
    for step in steps:
        first.setdefault(state.replicas[step.occupant.replica_id].deployment_id, step)
    return list(first.values())


def _decided(state: ClusterState, step: Step, why: str, ctx: Context) -> Iterator[Outcome]:
    old = state.replicas[step.occupant.replica_id]
    deployment = state.deployments[old.deployment_id]
    place, rooms = step.place, state.index.rooms
    uuids = tuple(rooms.gpu_uuids[place.node][index] for index in place.gpu_indices)
    replacement_id = name_of(deployment, 1)
    reason = f"{why}: {gib(step.occupant.moved_bytes)} are loaded on {place.node}"
    yield MoveDecided(
        at_s=ctx.now_s,
        move_id=f"move-{replacement_id}",
        replica_id=old.replica_id,
        replacement_id=replacement_id,
        deployment_id=old.deployment_id,
        model=deployment.spec.name,
        from_node=old.node,
        from_gpu_uuids=old.gpu_uuids,
        to_node=place.node,
        to_gpu_uuids=uuids,
        reason=reason,
    )
    offers = state.nodes[place.node].gpus
    shares = tuple(
        ShareProposal(
            replica_id=replacement_id,
            shard_index=shard,
            gpu_uuid=uuid,
            request_bytes=units,
            limit_bytes=limit_bytes_on(offers[uuid], deployment.spec.share),
        )
        for shard, (uuid, units) in enumerate(zip(uuids, place.units, strict=True))
    )
    replica = ReplicaProposal(
        replica_id=replacement_id,
        deployment_id=old.deployment_id,
        tenant=deployment.tenant,
        deployment=deployment.spec,
        shares=shares,
    )
    yield PlacementProposed(
        at_s=ctx.now_s,
        proposal_id=f"{replacement_id}-0",
        node=place.node,
        replicas=(replica,),
        reason=f"takes the place of {old.replica_id}: {why}",
        codes=(ReasonCode.ROOM_BY_MOVING,),
        policy=rooms.packer(spreads_nodes=False).policy.name,
    )

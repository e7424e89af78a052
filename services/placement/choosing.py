"""Where a replica goes: room beside all requests by the packing policy, or a GPU that it can share by taking turns."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from schemas.deployments import AntiAffinity, DeploymentSpec
from schemas.placement import Alternative, Constraint, FailureReason, ReasonCode, ShareProposal
from services.placement.demands import Demand, limit_bytes_on
from services.placement.packing.fleet import Ask, Place
from services.placement.rooms import Rooms
from services.placement.state import Claim, ClusterState, Replica
from services.placement.turns import Search
from services.placement.verdicts import Verdict, gib, verdict_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A node and GPUs for one replica, and why."""

    place: Place
    gpu_uuids: tuple[str, ...]
    limit_bytes: tuple[int, ...]
    codes: tuple[ReasonCode, ...]
    reason: str
    policy: str = ""
    alternatives: tuple[Alternative, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    @property
    def node(self) -> str:
        return self.place.node

    @property
    def request_bytes(self) -> tuple[int, ...]:
        """By shard."""
        return self.place.units

    def shares(self, replica_id: str) -> tuple[ShareProposal, ...]:
        """For the replica of that name, one for each GPU."""
        return tuple(
            ShareProposal(
                replica_id=replica_id, shard_index=shard, gpu_uuid=uuid, request_bytes=request, limit_bytes=limit
            )
            for shard, (uuid, request, limit) in enumerate(
                zip(self.gpu_uuids, self.place.units, self.limit_bytes, strict=True)
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoChoice:
    """Why no GPU will do, by how much, and what would help."""

    reason: FailureReason
    message: str
    missing_bytes: int
    remedy: str
    alternatives: tuple[Alternative, ...] = ()
    codes: tuple[ReasonCode, ...] = ()
    constraints: tuple[Constraint, ...] = ()


def choose(
    state: ClusterState,
    spec: DeploymentSpec,
    *,
    now_s: float,
    deployment_id: str = "",
    refused_nodes: Collection[str] = (),
    besides: Sequence[Choice] = (),
) -> Choice | NoChoice:
    """The place for one more replica of this deployment, or why there is none. Changes nothing that lasts.

    First, room for its request beside all other requests, where the packing policy wants it. Second, GPUs whose
    replicas can take turns (`overcommit`), those of which the smallest part is promised. `besides`: what was chosen for
    the same deployment in the input at hand. Without room for any equal demand the answer costs nothing until
    something grows.
    """
    rooms = state.index.rooms
    rooms.open_until(now_s, state.nodes)
    demand = state.index.demand_of(deployment_id, spec)
    near = _Nearness(state, demand, deployment_id, besides)
    excluded = (*refused_nodes, *near.nodes)
    verdict = rooms.verdict(demand, now_s, excluded, near.gpus)
    if verdict is None:
        ask = rooms.ask_of(demand)
        found = None if ask is None else _place(state, demand, ask, excluded, near.gpus, now_s, deployment_id)
        if found is not None:
            return _choice(state, spec, *found)
        verdict = verdict_of(
            state, demand, now_s=now_s, refused_nodes=refused_nodes, near_nodes=near.nodes, near_gpus=near.gpus
        )
        rooms.remember(demand, now_s, verdict, excluded, near.gpus)
    return no_choice(spec, verdict)


def no_choice(spec: DeploymentSpec, verdict: Verdict) -> NoChoice:
    return NoChoice(
        reason=verdict.reason,
        message=verdict.message_for(spec.name),
        missing_bytes=verdict.missing_bytes,
        remedy=verdict.remedy,
        alternatives=verdict.alternatives,
        codes=verdict.codes,
        constraints=verdict.constraints,
    )


@dataclass(slots=True)
class _Nearness:
    """Where replicas of the same deployment are already, as far as they must keep apart."""

    nodes: tuple[str, ...] = ()
    gpus: frozenset[tuple[str, int]] = frozenset()
    """(node, position)"""

    def __init__(self, state: ClusterState, demand: Demand, deployment_id: str, besides: Sequence[Choice]) -> None:
        self.nodes, self.gpus = (), frozenset()
        if demand.anti_affinity is AntiAffinity.NONE:
            return
        siblings: list[Replica | Claim] = list(state.index.of_deployment.get(deployment_id, {}).values())
        siblings += state.index.claims_of.get(deployment_id, {}).values()
        if demand.anti_affinity is AntiAffinity.NODE:
            self.nodes = tuple(sorted({r.node for r in siblings} | {c.node for c in besides}))
            return
        positions = state.index.rooms.positions
        there = {
            (replica.node, positions[replica.node][uuid])
            for replica in siblings
            for uuid in replica.gpu_uuids
            if uuid in positions.get(replica.node, {})
        }
        self.gpus = frozenset(there | {(c.node, gpu) for c in besides for gpu in c.place.gpu_indices})


def _place(
    state: ClusterState,
    demand: Demand,
    ask: Ask,
    excluded: tuple[str, ...],
    left_out: frozenset[tuple[str, int]],
    now_s: float,
    deployment_id: str,
) -> tuple[Place, bool] | None:
    """The place, and whether it is shared by taking turns."""
    rooms = state.index.rooms
    without_memory = rooms.without_park_memory(demand.weights_bytes) if demand.weights_bytes else ()
    with _LeftOut(rooms, left_out):
        packer = rooms.packer(spreads_nodes=demand.spreads_nodes)
        without = (*excluded, *without_memory)
        place = packer.choose(ask, without_nodes=without, gpu_spread=demand.spreads_gpus)
    if place is not None:
        return place, False
    search = Search(
        state=state,
        demand=demand,
        ask=ask,
        now_s=now_s,
        deployment_id=deployment_id,
        without_nodes=frozenset(excluded),
        without_gpus=left_out,
    )
    place = search.place()
    return None if place is None else (place, True)


class _LeftOut:
    """While open, these GPUs have nothing left to give."""

    def __init__(self, rooms: Rooms, gpus: frozenset[tuple[str, int]]) -> None:
        self._rooms = rooms
        self._taken = [
            (node, gpu, left) for node, gpu in sorted(gpus) if (left := rooms.fleet.nodes[node].free_units[gpu]) > 0
        ]

    def __enter__(self) -> None:
        for node, gpu, left in self._taken:
            self._rooms.fleet.take(node, (gpu,), (left,))

    def __exit__(self, *_: object) -> None:
        for node, gpu, left in self._taken:
            self._rooms.fleet.give(node, (gpu,), (left,))


def _choice(state: ClusterState, spec: DeploymentSpec, place: Place, is_shared: bool) -> Choice:  # noqa: FBT001
    rooms = state.index.rooms
    accounts = rooms.accounts[place.node]
    uuids = tuple(rooms.gpu_uuids[place.node][gpu] for gpu in place.gpu_indices)
    offers = state.nodes[place.node].gpus
    left = min(accounts[gpu].left_bytes(units) for gpu, units in zip(place.gpu_indices, place.units, strict=True))
    takes_turns = is_shared and left < 0
    reason = (
        f"shares by taking turns: requests exceed the GPU by {gib(-left)}"
        if takes_turns
        else f"room beside all requests: {gib(left)} left to promise"
    )
    return Choice(
        place=place,
        gpu_uuids=uuids,
        limit_bytes=tuple(limit_bytes_on(offers[uuid], spec.share) for uuid in uuids),
        codes=(ReasonCode.TAKES_TURNS if takes_turns else ReasonCode.ROOM_BESIDE_ALL,),
        reason=reason,
        policy="" if is_shared else rooms.packer(spreads_nodes=False).policy.name,
    )

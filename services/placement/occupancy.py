"""Who could be displaced where, and for whom: for each class of newcomers the places in order of harm.

Derived from the state, as the index is, and no part of history. Folds only say what they touched; a question brings up
to date what was touched since the last one like it, so that its cost does not grow with the fleet. What it answers is a
function of the state alone: nothing depends on which questions were asked before.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

from schemas.deployments import GRADE_ORDER, DeploymentSpec, ShareSpec
from schemas.nodes import GpuOffer
from services.placement.demands import base_bytes, request_bytes_on
from services.placement.harm import Candidate, GpuRoom, Relief, Stand, Wanted, relief_of
from services.placement.packing.fleet import PARTS
from services.placement.ranking import LEAST_BOUND, MINUS_BYTES, Bound, Bounding, Ranking, Taken, bound_beside

if TYPE_CHECKING:
    from services.placement.state import Claim, ClusterState, Node, Replica

WANTED_MAX: Final = 4096
"""Answers that are kept; all are forgotten when there are more."""
RANKINGS_MAX: Final = 16
"""Classes of newcomers whose rankings are kept; the one that was asked for longest ago makes room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Whom a newcomer may displace."""

    priority: int
    tenant: str
    is_within: bool = True
    """Its tenant stays within its part with it."""
    over: tuple[str, ...] = ()
    """Tenants that have more than their part, the one that is over most first."""
    has_quotas: bool = False

    def allow(self, *, tenant: str, priority: int) -> bool:
        """Whether a preemptible workload of that tenant and priority may go. Rules: `preemption`."""
        is_stranger = self.has_quotas and tenant != self.tenant
        if priority < self.priority:
            return self.is_within or not is_stranger or tenant in self.over
        return priority == self.priority and is_stranger and self.is_within and tenant in self.over

    def needs_over(self, *, tenant: str, priority: int) -> bool:
        """Whether that is allowed only as far as the tenant is over its part."""
        return self.has_quotas and tenant != self.tenant and (priority == self.priority or not self.is_within)

    def rank(self, tenant: str) -> int:
        return self.over.index(tenant) if tenant in self.over else len(self.over)


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer:
    """All newcomers that are alike in what they need and whom they may displace."""

    share: ShareSpec
    is_parkable: bool
    gpu_models: tuple[str, ...]
    node_labels: tuple[tuple[str, str], ...]
    terms: Terms

    @classmethod
    def of(cls, spec: DeploymentSpec, terms: Terms) -> "Newcomer":
        return cls(
            share=spec.share,
            is_parkable=spec.swap.is_parkable,
            gpu_models=spec.placement.gpu_models,
            node_labels=tuple(sorted(spec.placement.node_labels.items())),
            terms=terms,
        )


class Occupancy:
    """Changed by folds only, through `touch...`; read by everybody."""

    def __init__(self, state: "ClusterState") -> None:
        self._state = state
        self._rankings: dict[Newcomer, Ranking] = {}
        self._gangs: dict[str, dict[str, None]] = {}
        """{gang_id: ids of its replicas}"""
        self._wanted: dict[tuple[object, ...], Wanted | None] = {}
        """By share, and by all of a GPU that matters to it."""
        self._node_of: dict[str, str] = {}
        """{gpu_uuid: node}, of those that nodes offer"""
        self._gpus_of: dict[str, tuple[str, ...]] = {}
        self._counted: dict[str, tuple[str, int, bool]] = {}
        """{replica or preemption id: (tenant, parts, is preemptible)} as it is counted in `_used`"""
        self._uncounted: dict[str, None] = {}
        self._used: dict[str, list[int]] = {}
        """{tenant: [parts of GPUs that it holds, those of them that are never preempted]}"""
        self.claimed: dict[str, dict[str, int]] = {}
        """{gpu_uuid: {preemption_id: bytes}}"""
        for node in state.nodes.values():
            self.touch_node(node)
        for replica in state.replicas.values():
            self.touch(replica)
        for claim in state.claims.values():
            self.add_claim(claim)

    # --- Folds say what they touched ----------------------------------------------------------------------------------

    def touch(self, replica: "Replica") -> None:
        """It came, went, failed, began to leave, or something that counts here changed."""
        self._uncounted[replica.replica_id] = None
        together: Iterable[Replica] = (replica,)
        if replica.gang_id:
            members = self._gangs.setdefault(replica.gang_id, {})
            if replica.replica_id in self._state.replicas:
                members[replica.replica_id] = None
            else:
                members.pop(replica.replica_id, None)
            together = (replica, *(self._state.replicas[i] for i in members))
            if not members:
                del self._gangs[replica.gang_id]
        for ranking in self._rankings.values():
            for each in together:
                ranking.dirty[each.node] = None
                for share in each.shares:
                    ranking.dirty[share.gpu_uuid] = None

    def touch_node(self, node: "Node") -> None:
        """It joined, or what it offers changed."""
        gone = [uuid for uuid in self._gpus_of.get(node.name, ()) if uuid not in node.gpus]
        for gpu_uuid in gone:
            self._node_of.pop(gpu_uuid, None)
        for gpu_uuid in node.gpus:
            self._node_of[gpu_uuid] = node.name
        self._gpus_of[node.name] = tuple(node.gpus)
        for replica in self._state.on_node(node.name):
            self._uncounted[replica.replica_id] = None
        for ranking in self._rankings.values():
            ranking.dirty.update(dict.fromkeys((node.name, *node.gpus, *gone)))

    def add_claim(self, claim: "Claim") -> None:
        self._touch_claim(claim)
        for gpu_uuid, size_bytes in zip(claim.gpu_uuids, claim.request_bytes, strict=True):
            self.claimed.setdefault(gpu_uuid, {})[claim.preemption_id] = size_bytes

    def drop_claim(self, claim: "Claim") -> None:
        self._touch_claim(claim)
        for gpu_uuid in claim.gpu_uuids:
            self.claimed[gpu_uuid].pop(claim.preemption_id)
            if not self.claimed[gpu_uuid]:
                del self.claimed[gpu_uuid]

    def _touch_claim(self, claim: "Claim") -> None:
        self._uncounted[claim.preemption_id] = None
        for ranking in self._rankings.values():
            ranking.dirty.update(dict.fromkeys((claim.node, *claim.gpu_uuids)))

    # --- What tenants hold --------------------------------------------------------------------------------------------

    def used_parts(self, tenant: str) -> int:
        """Parts of GPUs (`PARTS` is one) that its replicas and claims request; those that leave do not count."""
        self._count()
        return self._used.get(tenant, [0, 0])[0]

    def fixed_parts(self, tenant: str) -> int:
        """Those of them that are never preempted."""
        self._count()
        return self._used.get(tenant, [0, 0])[1]

    def tenants(self) -> list[str]:
        """Who holds anything, in order of names."""
        self._count()
        return sorted(self._used)

    def parts_of(self, gpu_uuids: Sequence[str], request_bytes: Sequence[int]) -> int:
        """The parts that these bytes are of these GPUs; the whole where a GPU is not known."""
        return sum(
            PARTS if gpu is None or not base_bytes(gpu) else size_bytes * PARTS // base_bytes(gpu)
            for gpu, size_bytes in zip(map(self._gpu, gpu_uuids), request_bytes, strict=True)
        )

    def _count(self) -> None:
        for key in self._uncounted:
            old = self._counted.pop(key, None)
            if old is not None:
                self._add(old[0], -old[1], is_preemptible=old[2])
            new = self._count_of(key)
            if new is not None:
                self._counted[key] = new
                self._add(new[0], new[1], is_preemptible=new[2])
        self._uncounted.clear()

    def _count_of(self, key: str) -> tuple[str, int, bool] | None:
        state = self._state
        claim = state.claims.get(key)
        if claim is not None:
            return (claim.tenant, self.parts_of(claim.gpu_uuids, claim.request_bytes), claim.is_preemptible)
        replica = state.replicas.get(key)
        if replica is None or not replica.holds_place or replica.is_releasing:
            return None
        node = state.nodes.get(replica.node)
        if node is not None and node.lost_at_s is not None:
            return None
        parts = self.parts_of(replica.gpu_uuids, [share.request_bytes for share in replica.shares])
        return (replica.tenant, parts, replica.is_preemptible)

    def _add(self, tenant: str, parts: int, *, is_preemptible: bool) -> None:
        used = self._used.setdefault(tenant, [0, 0])
        used[0] += parts
        used[1] += 0 if is_preemptible else parts
        if not any(used):
            del self._used[tenant]

    # --- Places in order of harm --------------------------------------------------------------------------------------

    def least_harm(
        self, newcomer: Newcomer, *, now_s: float, accept: Callable[[str, Relief], bool], taken: Taken
    ) -> Relief | None:
        """The place where room costs least. `accept(place, relief)` rules out places for reasons of its own.

        A relief without victims: there the newcomer need only wait for those who leave already.
        """
        ranking = self._rankings.pop(newcomer, None)
        if ranking is None:
            places = self._node_of if newcomer.share.gpu_count == 1 else self._state.nodes
            ranking = Ranking(dirty=dict.fromkeys(places))
            while len(self._rankings) >= RANKINGS_MAX:
                del self._rankings[next(iter(self._rankings))]
        self._rankings[newcomer] = ranking
        while ranking.ripening and ranking.ripening[0][0] <= now_s:
            ranking.dirty[heappop(ranking.ripening)[1]] = None
        is_whole_node = newcomer.share.gpu_count > 1
        for place in ranking.dirty:
            if (place in self._state.nodes) == is_whole_node:
                ranking.put(place, self._bound(place, newcomer, ranking, now_s=now_s))
        ranking.dirty.clear()
        return ranking.least(lambda place: self._relief(place, newcomer, now_s=now_s), accept, taken)

    def _bound(self, place: str, newcomer: Newcomer, ranking: Ranking, *, now_s: float) -> Bound | None:
        """At most the harm of the place, quickly, and exact for one who stands alone; None where nobody helps."""
        node = self._state.nodes.get(self._node_of.get(place, place))
        if node is None:
            return None
        gpus = [place] if newcomer.share.gpu_count == 1 else list(node.gpus)
        allowed: list[Bounding] = []
        held_bytes = parkable_count = 0
        is_leaving = False
        best_rank = len(newcomer.terms.over)
        for gpu_uuid in gpus:
            for replica in self._state.on_gpu(gpu_uuid):
                if replica.is_releasing:
                    is_leaving = True
                    continue
                size_bytes = replica.request_on(gpu_uuid)
                held_bytes += size_bytes
                parkable_count += replica.is_parkable
                if not self._may_go(replica, newcomer.terms):
                    continue
                if replica.gang_id:
                    free_s = max(self._ripe_s(each) for each in self._together(replica))
                else:
                    free_s = self._ripe_s(replica)
                if free_s > now_s:
                    heappush(ranking.ripening, (free_s, place))
                    continue
                holder = replica.gang_id or replica.replica_id
                allowed.append((replica.priority, size_bytes, replica.is_parkable, _began_s(replica), holder))
                best_rank = min(best_rank, newcomer.terms.rank(replica.tenant))
        if is_leaving:
            return LEAST_BOUND
        if not allowed:
            return None
        loose = (min(allowed)[0], best_rank, 0, 1, MINUS_BYTES, -math.inf, ())
        gpu = node.gpus.get(place)
        wanted = self.wanted(gpu, newcomer) if gpu is not None else None
        if gpu is None or wanted is None:
            return loose if len(gpus) > 1 else None
        if newcomer.is_parkable or parkable_count > 1:
            return loose  # By turns less may do.
        claimed_bytes = sum(self.claimed.get(place, {}).values())
        missing_bytes = held_bytes + claimed_bytes + wanted.request_bytes - gpu.allocatable_bytes
        return bound_beside(allowed, missing_bytes, best_rank)

    @staticmethod
    def _may_go(replica: "Replica", terms: Terms) -> bool:
        return (
            replica.is_preemptible
            and not replica.is_releasing
            and terms.allow(tenant=replica.tenant, priority=replica.priority)
        )

    def _relief(self, place: str, newcomer: Newcomer, *, now_s: float) -> Relief | None:
        node = self._state.nodes.get(self._node_of.get(place, place))
        if node is None or any(node.labels.get(key) != value for key, value in newcomer.node_labels):
            return None
        gpus = sorted(node.gpus) if newcomer.share.gpu_count > 1 else [place]
        wanted = {uuid: self.wanted(node.gpus[uuid], newcomer) for uuid in gpus if uuid in node.gpus}
        will_do = {uuid: each for uuid, each in wanted.items() if each is not None}
        if len(will_do) < newcomer.share.gpu_count:
            return None
        candidates = self._candidates(list(will_do), newcomer.terms, now_s=now_s)
        rooms = [self.room(node.gpus[uuid]) for uuid in will_do]
        return relief_of(rooms, will_do, newcomer.share.gpu_count, candidates)

    def wanted(self, gpu: GpuOffer, newcomer: Newcomer) -> Wanted | None:
        """What it takes of the GPU; None where the GPU will not do."""
        if gpu.quarantine_reason:
            return None
        numbers = (gpu.name, gpu.grade, gpu.capacity_bytes, gpu.reserve_bytes, gpu.foreign_bytes, gpu.is_mig)
        key = (newcomer.share, newcomer.is_parkable, newcomer.gpu_models, *numbers)
        if key not in self._wanted:
            if len(self._wanted) >= WANTED_MAX:
                self._wanted.clear()
            self._wanted[key] = self._wanted_of(gpu, newcomer)
        return self._wanted[key]

    def _wanted_of(self, gpu: GpuOffer, newcomer: Newcomer) -> Wanted | None:
        share = newcomer.share
        names = newcomer.gpu_models
        if names and not any(name.lower() in gpu.name.lower() for name in names):
            return None
        grade = share.minimum_grade
        if grade is not None and GRADE_ORDER.index(gpu.grade) > GRADE_ORDER.index(grade):
            return None
        size_bytes = request_bytes_on(gpu, share)
        if size_bytes > gpu.allocatable_bytes:
            return None
        if gpu.is_mig:
            return Wanted(gpu.allocatable_bytes, None)  # All of it, whatever it uses of it.
        residue_bytes = min(self._state.settings.residue_bytes, size_bytes) if newcomer.is_parkable else None
        return Wanted(size_bytes, residue_bytes)

    def room(self, gpu: GpuOffer) -> GpuRoom:
        """The GPU as it will be when those who leave have left."""
        stands = []
        has_leaving = False
        for replica in self._state.on_gpu(gpu.gpu_uuid):
            if replica.is_releasing:
                has_leaving = True
                continue
            size_bytes = gpu.allocatable_bytes if gpu.is_mig else replica.request_on(gpu.gpu_uuid)
            is_parkable = replica.is_parkable and not gpu.is_mig
            residue_bytes = replica.residue_on(gpu.gpu_uuid) if is_parkable else size_bytes
            stands.append(Stand(replica.gang_id or replica.replica_id, size_bytes, residue_bytes))
        claimed_bytes = sum(self.claimed.get(gpu.gpu_uuid, {}).values())
        return GpuRoom(gpu.gpu_uuid, gpu.allocatable_bytes, claimed_bytes, tuple(stands), has_leaving)

    def _candidates(self, gpus: Sequence[str], terms: Terms, *, now_s: float) -> list[Candidate]:
        """Those who may be displaced there now."""
        found: dict[str, Candidate] = {}
        for gpu_uuid in gpus:
            for replica in self._state.on_gpu(gpu_uuid):
                holder = replica.gang_id or replica.replica_id
                if holder in found or not self._may_go(replica, terms):
                    continue
                ended = self._together(replica)
                if any(self._ripe_s(each) > now_s for each in ended):
                    continue
                found[holder] = Candidate(
                    holder=holder,
                    replica_ids=tuple(each.replica_id for each in ended),
                    tenant=replica.tenant,
                    priority=replica.priority,
                    rank=terms.rank(replica.tenant),
                    is_parkable=replica.is_parkable,
                    began_s=sum(_began_s(each) for each in ended),
                    freed_bytes=sum(each.request_bytes for each in ended),
                )
        return list(found.values())

    def _together(self, replica: "Replica") -> "list[Replica]":
        """All that ends with it."""
        if not replica.gang_id:
            return [replica]
        members = (self._state.replicas[i] for i in sorted(self._gangs[replica.gang_id]))
        return [each for each in members if each.holds_place and not each.is_releasing]

    def _ripe_s(self, replica: "Replica") -> float:
        """From when on it may be displaced: once it runs, it has its minimum runtime."""
        deployment = self._state.deployments.get(replica.deployment_id)
        if deployment is None or replica.ready_at_s is None:
            return 0.0
        return replica.ready_at_s + deployment.spec.placement.minimum_runtime_s

    def node_of(self, gpu_uuid: str) -> str:
        """The node that has it; its own name where none has."""
        return self._node_of.get(gpu_uuid, gpu_uuid)

    def _gpu(self, gpu_uuid: str) -> GpuOffer | None:
        node = self._state.nodes.get(self._node_of.get(gpu_uuid, ""))
        return node.gpus.get(gpu_uuid) if node is not None else None


def _began_s(replica: "Replica") -> float:
    """Since when work would be lost; what never ran has lost none."""
    return replica.ready_at_s if replica.ready_at_s is not None else replica.since_s

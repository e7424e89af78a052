"""What placement's state knows, laid out for its questions: answers cost what they hold, not what there is.

Derived: made anew from the state at any time, kept up by the folds, and no part of digest or snapshot (ADR 0015). Every
map keeps the order of proposals, so that one that was made anew equals one that was kept up.
"""

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from services.placement.demands import Demand, demand_of
from services.placement.occupancy import Occupancy
from services.placement.rooms import Rooms

if TYPE_CHECKING:
    from schemas.deployments import DeploymentSpec
    from schemas.nodes import GpuOffer
    from services.placement.state import Claim, ClusterState, Deployment, Node, Replica


class Index:
    """Changed by folds only, through its methods; read by everybody."""

    def __init__(self, state: "ClusterState") -> None:
        self._state = state
        self.named: dict[tuple[str, str], Deployment] = {}
        """{(tenant, model): deployment}"""
        self.of_deployment: dict[str, dict[str, Replica]] = {}
        """{deployment_id: {replica_id: replica}}"""
        self.on_gpu: dict[str, dict[str, Replica]] = {}
        """{gpu_uuid: {replica_id: replica}} of those that are promised a place there"""
        self.on_node: dict[str, dict[str, Replica]] = {}
        self.placed_counts: dict[str, int] = {}
        """{deployment_id: replicas that count as placed}, also of deployments that are gone"""
        self.waiting: dict[str, Deployment] = {}
        """{deployment_id: deployment that lacks replicas}"""
        self.refused: dict[str, Deployment] = {}
        """{deployment_id: deployment that some node refused}"""
        self.claims_of: dict[str, dict[str, Claim]] = {}
        """{deployment_id: {preemption_id: claim}}"""
        self.claim_of_victim: dict[str, Claim] = {}
        """{replica_id: the claim that it gives way to} of those that are still there"""
        self.unsettled: dict[str, Claim] = {}
        """{preemption_id: claim whose victims have left, or that has lost its sense}"""
        self._occupancy: Occupancy | None = None
        self.untold: dict[str, Deployment] = {}
        """{deployment_id: deployment that lacks replicas and was not told why}"""
        self.waiting_alike: dict[Demand, dict[str, Deployment]] = {}
        """{demand: those of the waiting that have it}"""
        self._resting: list[tuple[float, str]] = []
        """(until when, deployment_id) of the waiting that were displaced; not due before, sorted"""
        self._rests: dict[str, float] = {}
        self.rooms = Rooms(state.settings)
        self._demands: dict[str, Demand] = {}
        for node in state.nodes.values():
            self.rooms.set_node(node, (), ())
        for deployment in state.deployments.values():
            self.add_deployment(deployment)
        for replica in state.replicas.values():
            self.add_replica(replica)
        for claim in state.claims.values():
            self.add_claim(claim)

    @property
    def occupancy(self) -> Occupancy:
        """Who could be displaced where, and what tenants hold; made at the first question."""
        if self._occupancy is None:
            self._occupancy = Occupancy(self._state)
        return self._occupancy

    def touch(self, replica: "Replica") -> None:
        """Something about it changed that decides whether and for whom it can be displaced."""
        if self._occupancy is not None:
            self._occupancy.touch(replica)

    # --- Deployments --------------------------------------------------------------------------------------------------

    def add_deployment(self, deployment: "Deployment") -> None:
        self.named[deployment.tenant, deployment.spec.name] = deployment
        if deployment.refused_nodes:
            self.refused[deployment.deployment_id] = deployment
        self.count(deployment.deployment_id)

    def drop_deployment(self, deployment: "Deployment") -> None:
        """It is gone from the state already. A newer one may have its name."""
        if self.named.get((deployment.tenant, deployment.spec.name)) is deployment:
            del self.named[deployment.tenant, deployment.spec.name]
        self._satisfy(deployment)
        self.refused.pop(deployment.deployment_id, None)
        self._demands.pop(deployment.deployment_id, None)
        self.rooms.wish(deployment.deployment_id, None, 0)
        self._weigh(deployment.deployment_id)

    def count(self, deployment_id: str) -> None:
        """Its wish, its replicas or its problem changed: does it lack some, and does it know why?"""
        deployment = self._state.deployments.get(deployment_id)
        if deployment is None:
            return
        self._weigh(deployment_id)
        self.rooms.wish(deployment_id, self.demand_of(deployment_id, deployment.spec), deployment.replica_count)
        if self.lacking_count(deployment) <= 0:
            self._satisfy(deployment)
            return
        self.waiting[deployment_id] = deployment
        self._leave_queue(deployment)
        if deployment.rests_until_s:
            self._rests[deployment_id] = deployment.rests_until_s
            insort(self._resting, (deployment.rests_until_s, deployment_id))
            return
        demand = self.demand_of(deployment_id, deployment.spec)
        self.waiting_alike.setdefault(demand, {})[deployment_id] = deployment
        if not deployment.problem:
            self.untold[deployment_id] = deployment

    def lacking_count(self, deployment: "Deployment") -> int:
        """Replicas that are neither placed nor have room made for them; negative for surplus."""
        claimed_count = len(self.claims_of.get(deployment.deployment_id, {}))
        return deployment.replica_count - self.placed_counts.get(deployment.deployment_id, 0) - claimed_count

    def _satisfy(self, deployment: "Deployment") -> None:
        """It lacks nothing, or is gone."""
        if self.waiting.pop(deployment.deployment_id, None) is not None:
            self._leave_queue(deployment)

    def _leave_queue(self, deployment: "Deployment") -> None:
        deployment_id = deployment.deployment_id
        self.untold.pop(deployment_id, None)
        until_s = self._rests.pop(deployment_id, None)
        if until_s is not None:
            del self._resting[bisect_left(self._resting, (until_s, deployment_id))]
        demand = self.demand_of(deployment_id, deployment.spec)
        alike = self.waiting_alike.get(demand, {})
        if alike.pop(deployment_id, None) is not None and not alike:
            del self.waiting_alike[demand]

    def demand_of(self, deployment_id: str, spec: "DeploymentSpec") -> Demand:
        """What each of its replicas needs; of a deployment that is none (yet) too."""
        known = self._demands.get(deployment_id)
        if known is None:
            known = demand_of(spec)
            if deployment_id in self._state.deployments:
                self._demands[deployment_id] = known
        return known

    def due(self, now_s: float) -> "list[Deployment]":
        """Those of the waiting for which there may be room, or who were not told that there is none; unordered."""
        found = dict(self.untold)
        for until_s, deployment_id in self._resting:
            if until_s > now_s:
                break
            found[deployment_id] = self.waiting[deployment_id]
        for demand, alike in self.waiting_alike.items():
            if self.rooms.verdict(demand, now_s) is None:
                found.update(alike)
        return list(found.values())

    def awake(self, now_s: float) -> "list[Deployment]":
        """Those of the waiting that do not rest; unordered."""
        return [each for each in self.waiting.values() if each.rests_until_s <= now_s]

    def has_due(self, now_s: float) -> bool:
        if self.untold or self.unsettled or (self._resting and self._resting[0][0] <= now_s):
            return True
        return any(self.rooms.verdict(d, now_s) is None for d in self.waiting_alike)

    # --- Replicas -----------------------------------------------------------------------------------------------------

    def add_replica(self, replica: "Replica") -> None:
        self.of_deployment.setdefault(replica.deployment_id, {})[replica.replica_id] = replica
        self.on_node.setdefault(replica.node, {})[replica.replica_id] = replica
        if replica.holds_place:
            self.hold_place(replica)
        if replica.is_parkable:
            self.rooms.park(replica.node, replica.weights_bytes)
        if self._counts(replica.node):
            self._add_placed(replica.deployment_id, 1)

    def drop_replica(self, replica: "Replica") -> None:
        _drop(self.of_deployment, replica.deployment_id, replica.replica_id)
        _drop(self.on_node, replica.node, replica.replica_id)
        if replica.holds_place:
            self.leave_place(replica)
        if replica.is_parkable:
            self.rooms.park(replica.node, -replica.weights_bytes)
        self.touch(replica)
        if self._counts(replica.node):
            self._add_placed(replica.deployment_id, -1)
        claim = self.claim_of_victim.pop(replica.replica_id, None)
        if claim is not None:
            self._weigh(claim.deployment_id)

    def hold_place(self, replica: "Replica") -> None:
        self.rooms.hold(replica)
        for share in replica.shares:
            self.on_gpu.setdefault(share.gpu_uuid, {})[replica.replica_id] = replica
        self.touch(replica)

    def leave_place(self, replica: "Replica") -> None:
        """It failed for good, or is gone."""
        for share in replica.shares:
            _drop(self.on_gpu, share.gpu_uuid, replica.replica_id)
        self.rooms.leave(replica, self.on_gpu)
        self.touch(replica)

    def remeasured(self, replica: "Replica") -> None:
        """Its residue is known better."""
        for share in replica.shares:
            self.rooms.recount(replica.node, share.gpu_uuid, self.on_gpu)
        self.touch(replica)

    # --- Claims -------------------------------------------------------------------------------------------------------

    def add_claim(self, claim: "Claim") -> None:
        self.claims_of.setdefault(claim.deployment_id, {})[claim.preemption_id] = claim
        there = [v.replica_id for v in claim.victims if v.replica_id in self._state.replicas]
        self.claim_of_victim.update(dict.fromkeys(there, claim))
        self.rooms.claim(claim)
        self._weigh(claim.deployment_id)
        self.count(claim.deployment_id)
        if self._occupancy is not None:
            self._occupancy.add_claim(claim)

    def drop_claim(self, claim: "Claim") -> None:
        claims = self.claims_of[claim.deployment_id]
        del claims[claim.preemption_id]
        if not claims:
            del self.claims_of[claim.deployment_id]
        for victim in claim.victims:
            self.claim_of_victim.pop(victim.replica_id, None)
        self.unsettled.pop(claim.preemption_id, None)
        self.rooms.unclaim(claim)
        self.count(claim.deployment_id)
        if self._occupancy is not None:
            self._occupancy.drop_claim(claim)

    def _weigh(self, deployment_id: str) -> None:
        """For which of its claims is the room there, and which have lost their sense? Of a gang all come together."""
        claims = self.claims_of.get(deployment_id)
        if not claims:
            return
        deployment = self._state.deployments.get(deployment_id)
        wanted_count = len(claims) if deployment is None else len(claims) + min(0, self.lacking_count(deployment))
        held = {
            key for key, claim in claims.items() if any(v.replica_id in self.claim_of_victim for v in claim.victims)
        }
        if held and deployment is not None and deployment.spec.placement.is_gang:
            held = set(claims)
        for number, (preemption_id, claim) in enumerate(claims.items()):
            is_senseless = deployment is None or number >= wanted_count or self._has_lost_its_place(claim)
            if is_senseless or preemption_id not in held:
                self.unsettled[preemption_id] = claim
            else:
                self.unsettled.pop(preemption_id, None)

    def _has_lost_its_place(self, claim: "Claim") -> bool:
        node = self._state.nodes.get(claim.node)
        if node is None or node.lost_at_s is not None:
            return True
        there = [node.gpus.get(gpu_uuid) for gpu_uuid in claim.gpu_uuids]
        return any(gpu is None or gpu.quarantine_reason for gpu in there)

    # --- Nodes --------------------------------------------------------------------------------------------------------

    def set_node(self, node: "Node") -> None:
        """It joined, for the first time or again, or what it offers changed."""
        claims = [claim for claim in self._state.claims.values() if claim.node == node.name]
        self.rooms.set_node(node, tuple(self.on_node.get(node.name, {}).values()), claims)
        for deployment_id in {claim.deployment_id: None for claim in claims}:
            self._weigh(deployment_id)
        if self._occupancy is not None:
            self._occupancy.touch_node(node)

    def set_gpu(self, node: "Node", gpu: "GpuOffer") -> None:
        """Strangers on it, or its quarantine, changed; `node` has it already."""
        self.rooms.set_gpu(node.name, gpu)
        for claim in [c for c in self._state.claims.values() if gpu.gpu_uuid in c.gpu_uuids]:
            self._weigh(claim.deployment_id)
        if self._occupancy is not None:
            self._occupancy.touch_node(node)

    def lose_node(self, node: str) -> None:
        """Its replicas do not count as placed any more. Called before `lost_at_s` is set."""
        self._recount(node, -1)
        self.unsettled.update((key, claim) for key, claim in self._state.claims.items() if claim.node == node)

    def regain_node(self, node: str) -> None:
        """Its replicas count again. Called after `lost_at_s` is cleared."""
        self._recount(node, 1)

    def _recount(self, node: str, by: int) -> None:
        for replica in self.on_node.get(node, {}).values():
            self._add_placed(replica.deployment_id, by)
            self.touch(replica)

    def _counts(self, node: str) -> bool:
        known = self._state.nodes.get(node)
        return known is None or known.lost_at_s is None

    def _add_placed(self, deployment_id: str, by: int) -> None:
        placed = self.placed_counts.get(deployment_id, 0) + by
        if placed:
            self.placed_counts[deployment_id] = placed
        else:
            self.placed_counts.pop(deployment_id, None)
        self.count(deployment_id)


def _drop(maps: "dict[str, dict[str, Replica]]", key: str, replica_id: str) -> None:
    inner = maps.get(key)
    if inner is not None:
        inner.pop(replica_id, None)
        if not inner:
            del maps[key]

"""What placement's state knows, laid out for its questions: answers cost what they hold, not what there is.

Derived: made anew from the state at any time, kept up by the folds, and no part of digest or snapshot. Every
map keeps the order of proposals, so that one that was made anew equals one that was kept up.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.placement.state import ClusterState, Deployment, Replica


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
        for deployment in state.deployments.values():
            self.add_deployment(deployment)
        for replica in state.replicas.values():
            self.add_replica(replica)

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
        self.waiting.pop(deployment.deployment_id, None)
        self.refused.pop(deployment.deployment_id, None)

    def count(self, deployment_id: str) -> None:
        """Its wish or its replicas changed: does it lack some?"""
        deployment = self._state.deployments.get(deployment_id)
        if deployment is None:
            return
        if self.placed_counts.get(deployment_id, 0) < deployment.replica_count:
            self.waiting[deployment_id] = deployment
        else:
            self.waiting.pop(deployment_id, None)

    # --- Replicas -----------------------------------------------------------------------------------------------------

    def add_replica(self, replica: "Replica") -> None:
        self.of_deployment.setdefault(replica.deployment_id, {})[replica.replica_id] = replica
        self.on_node.setdefault(replica.node, {})[replica.replica_id] = replica
        if replica.holds_place:
            self.hold_place(replica)
        if self._counts(replica.node):
            self._add_placed(replica.deployment_id, 1)

    def drop_replica(self, replica: "Replica") -> None:
        _drop(self.of_deployment, replica.deployment_id, replica.replica_id)
        _drop(self.on_node, replica.node, replica.replica_id)
        if replica.holds_place:
            self.leave_place(replica)
        if self._counts(replica.node):
            self._add_placed(replica.deployment_id, -1)

    def hold_place(self, replica: "Replica") -> None:
        for share in replica.shares:
            self.on_gpu.setdefault(share.gpu_uuid, {})[replica.replica_id] = replica

    def leave_place(self, replica: "Replica") -> None:
        """It failed for good, or is gone."""
        for share in replica.shares:
            _drop(self.on_gpu, share.gpu_uuid, replica.replica_id)

    # --- Nodes --------------------------------------------------------------------------------------------------------

    def lose_node(self, node: str) -> None:
        """Its replicas do not count as placed any more. Called before `lost_at_s` is set."""
        self._recount(node, -1)

    def regain_node(self, node: str) -> None:
        """Its replicas count again. Called after `lost_at_s` is cleared."""
        self._recount(node, 1)

    def _recount(self, node: str, by: int) -> None:
        for replica in self.on_node.get(node, {}).values():
            self._add_placed(replica.deployment_id, by)

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

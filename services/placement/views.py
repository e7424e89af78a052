"""Answers to queries: what placement knows, in the words of the client."""

from schemas.queries import (
    DeploymentList,
    DeploymentView,
    Explain,
    Explanation,
    GpuView,
    KeyList,
    KeyView,
    ListDeployments,
    ListKeys,
    ListNodes,
    NodeList,
    NodeView,
    ReplicaView,
)
from services.placement.core import SERVICE
from services.placement.demands import demand_of
from services.placement.state import ClusterState, Deployment, Node, Replica
from services.placement.verdicts import alternatives_of

HOLDS_SHARE = frozenset({"starting", "resident", "draining", "waking"})


@SERVICE.answering(ListDeployments)
def list_deployments(state: ClusterState, query: ListDeployments, tenant: str) -> DeploymentList:
    mine = [d for d in state.deployments.values() if d.tenant == tenant]
    return DeploymentList(
        deployments=tuple(deployment_view(state, d) for d in sorted(mine, key=lambda d: d.spec.name)),
        labels=tuple(sorted({node.label for node in state.nodes.values()})),
        as_of_seq=state.inbox_seq,
    )


def deployment_view(state: ClusterState, deployment: Deployment) -> DeploymentView:
    replicas = state.replicas_of(deployment.deployment_id)
    return DeploymentView(
        deployment_id=deployment.deployment_id,
        tenant=deployment.tenant,
        deployment=deployment.spec,
        replicas=tuple(_replica_view(state, r) for r in replicas),
        admitted_at_s=deployment.admitted_at_s,
        problem="" if replicas else deployment.problem,
        remedy="" if replicas else deployment.remedy,
    )


def _replica_view(state: ClusterState, replica: Replica) -> ReplicaView:
    node = state.nodes.get(replica.node)
    gpu_uuid = replica.gpu_uuids[0]
    gpu = node.gpus.get(gpu_uuid) if node is not None else None
    return ReplicaView(
        replica_id=replica.replica_id,
        node=replica.node,
        gpu_uuid=gpu_uuid,
        gpu_index=gpu.index if gpu is not None else -1,
        state=replica.state,
        since_s=replica.since_s,
        request_bytes=replica.request_bytes,
        granted_bytes=sum(replica.granted_bytes),
        limit_bytes=replica.limit_bytes,
        residue_bytes=sum(replica.residue_bytes),
        wake_epoch=replica.wake_epoch,
        endpoint=replica.endpoint,
        last_wake_s=replica.last_wake_s,
        last_start_s=replica.last_start_s,
        problem=replica.problem,
    )


@SERVICE.answering(ListNodes)
def list_nodes(state: ClusterState, query: ListNodes, tenant: str) -> NodeList:
    return NodeList(nodes=tuple(_node_view(state, state.nodes[name]) for name in sorted(state.nodes)))


def _node_view(state: ClusterState, node: Node) -> NodeView:
    gpus = []
    for gpu in sorted(node.gpus.values(), key=lambda gpu: gpu.index):
        here = state.on_gpu(gpu.gpu_uuid)
        gpus.append(
            GpuView(
                gpu_uuid=gpu.gpu_uuid,
                index=gpu.index,
                name=gpu.name,
                capacity_bytes=gpu.capacity_bytes,
                reserve_bytes=gpu.reserve_bytes,
                allocatable_bytes=gpu.allocatable_bytes,
                promised_bytes=sum(r.request_on(gpu.gpu_uuid) for r in here),
                held_bytes=sum(_held_bytes(r, gpu.gpu_uuid) for r in here),
                grade=gpu.grade,
                grade_reason=gpu.grade_reason,
                resident_count=sum(r.state in HOLDS_SHARE for r in here),
                parked_count=sum(r.state == "parked" for r in here),
            )
        )
    parked_bytes = sum(r.weights_bytes for r in state.on_node(node.name) if r.is_parkable)
    return NodeView(
        node=node.name,
        label=node.label,
        gpus=tuple(gpus),
        host_budget_bytes=node.host_budget_bytes,
        host_parked_bytes=parked_bytes,
        joined_at_s=node.joined_at_s,
    )


def _held_bytes(replica: Replica, gpu_uuid: str) -> int:
    """On this GPU: its share, its residue while it is parked, and nothing before its engine is started."""
    if replica.state in HOLDS_SHARE:
        return replica.request_on(gpu_uuid)
    return replica.residue_on(gpu_uuid) if replica.state == "parked" else 0


@SERVICE.answering(Explain)
def explain(state: ClusterState, query: Explain, tenant: str) -> Explanation:
    """Why here, why not elsewhere, what would help; from the decision's own record, not guessed afterwards."""
    deployment = state.named(tenant, query.model)
    if deployment is None:
        return Explanation(is_known=False, model=query.model, summary=f"there is no deployment '{query.model}'")
    replicas = state.replicas_of(deployment.deployment_id)
    if not replicas:
        cold = deployment.replica_count == 0
        summary = "cold: scaled to zero, started by the next request" if cold else f"not placed: {deployment.problem}"
    else:
        summary = "; ".join(_why(state, replica) for replica in replicas)
    return Explanation(
        is_known=True,
        model=query.model,
        summary=summary,
        alternatives=deployment.alternatives or alternatives_of(state, demand_of(deployment.spec)),
        remedy="" if replicas else deployment.remedy,
        deployment=deployment_view(state, deployment),
    )


def _why(state: ClusterState, replica: Replica) -> str:
    view = _replica_view(state, replica)
    problem = f" ({replica.problem})" if replica.problem else ""
    return f"{replica.state}{problem} on {replica.node}/gpu{view.gpu_index}, chosen as {replica.reason}"


@SERVICE.answering(ListKeys)
def list_keys(state: ClusterState, query: ListKeys, tenant: str) -> KeyList:
    mine = [key for key in state.keys.values() if key.tenant == tenant]
    return KeyList(keys=tuple(KeyView(key_id=k.key_id, name=k.name, created_at_s=k.created_at_s) for k in mine))

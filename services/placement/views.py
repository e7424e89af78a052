"""Answers to queries: what placement knows, in the words of the client."""

from collections import Counter
from collections.abc import Sequence

from msgspec import structs

from schemas.placement import Victim
from schemas.queries import (
    DeploymentList,
    DeploymentView,
    GpuView,
    KeyList,
    KeyView,
    ListDeployments,
    ListKeys,
    ListNodes,
    ListQuotas,
    NodeList,
    NodeView,
    QuotaList,
    QuotaView,
    ReplicaView,
)
from services.placement.core import SERVICE
from services.placement.observed import latest_s
from services.placement.packing.fleet import PARTS
from services.placement.state import ClusterState, Deployment, Node, Replica

HOLDS_SHARE = frozenset({"starting", "resident", "draining", "waking", "suspect"})


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
        replicas=tuple(replica_view(state, r) for r in replicas),
        admitted_at_s=deployment.admitted_at_s,
        problem="" if replicas else deployment.problem,
        remedy="" if replicas else deployment.remedy,
    )


def replica_view(state: ClusterState, replica: Replica) -> ReplicaView:
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
        gpu_uuids=replica.gpu_uuids,
        gpu_indices=gpu_indices(state, replica.node, replica.gpu_uuids),
    )


def gpu_indices(state: ClusterState, node: str, gpu_uuids: Sequence[str]) -> tuple[int, ...]:
    """Their places on the node; -1 for one that the node does not offer any more."""
    there = state.nodes[node].gpus if node in state.nodes else {}
    return tuple(there[uuid].index if uuid in there else -1 for uuid in gpu_uuids)


def victims_seen_by(tenant: str, victims: Sequence[Victim]) -> tuple[Victim, ...]:
    """Without the names of what belongs to others."""
    hidden = "of-another-tenant"
    return tuple(
        victim
        if victim.tenant == tenant
        else structs.replace(
            victim, replica_id=hidden, deployment_id=hidden, model=hidden, tenant=hidden, reason="of lower standing"
        )
        for victim in victims
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
                foreign_bytes=gpu.foreign_bytes,
                quarantine_reason=gpu.quarantine_reason,
                compute_sharing=gpu.compute_sharing,
                is_mig=gpu.is_mig,
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
        cpu_millicores=node.cpu_millicores,
        cpu_left_millicores=state.index.rooms.fleet.nodes[node.name].cpu_milli,
        memory_bytes=node.memory_bytes,
        memory_left_bytes=state.index.rooms.fleet.nodes[node.name].memory_bytes,
        labels=dict(node.labels),
        condition="lost"
        if node.lost_at_s is not None
        else "open"
        if node.is_open(latest_s(state.observed, state.nodes.values()))
        else "quarantined",
        condition_until_s=node.quarantine_until_s,
    )


def _held_bytes(replica: Replica, gpu_uuid: str) -> int:
    """On this GPU: its share, its residue while it is parked, and nothing before its engine is started."""
    if replica.state in HOLDS_SHARE:
        return replica.request_on(gpu_uuid)
    return replica.residue_on(gpu_uuid) if replica.state == "parked" else 0


@SERVICE.answering(ListQuotas)
def list_quotas(state: ClusterState, query: ListQuotas, tenant: str) -> QuotaList:
    """Of all tenants for the operator, of the asking one else."""
    names = {tenant, *state.quotas, *state.index.occupancy.tenants()}
    seen = sorted(names) if tenant == state.settings.operator_tenant else [tenant]
    waiting = Counter(state.deployments[deployment_id].tenant for deployment_id in state.waiting)
    return QuotaList(quotas=tuple(_quota_view(state, name, waiting[name]) for name in seen))


def _quota_view(state: ClusterState, tenant: str, waiting_count: int) -> QuotaView:
    quota, occupancy = state.quotas.get(tenant), state.index.occupancy
    return QuotaView(
        tenant=tenant,
        gpu_quota=quota.parts / PARTS if quota is not None and quota.parts is not None else None,
        over_quota_weight=quota.over_quota_weight if quota is not None else 1.0,
        used_gpus=occupancy.used_parts(tenant) / PARTS,
        never_preempted_gpus=occupancy.fixed_parts(tenant) / PARTS,
        waiting_count=waiting_count,
    )


@SERVICE.answering(ListKeys)
def list_keys(state: ClusterState, query: ListKeys, tenant: str) -> KeyList:
    mine = [key for key in state.keys.values() if key.tenant == tenant]
    return KeyList(keys=tuple(KeyView(key_id=k.key_id, name=k.name, created_at_s=k.created_at_s) for k in mine))

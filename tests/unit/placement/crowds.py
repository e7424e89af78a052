"""States of placement that are made by facts alone, for questions about priorities, tenants and claims."""

import random
from dataclasses import dataclass, field
from typing import Any

from schemas.deployments import DeploymentSpec, EngineSpec, PlacementSpec, ShareSpec, SwapSpec
from schemas.messages import Fact
from schemas.nodes import Lease, LeaseGranted, LeaseReleased, NodeJoined, Ready, ReplicaReady
from schemas.placement import (
    DeploymentAdmitted,
    PlacementProposed,
    QuotaSet,
    ReleaseProposed,
    ReplicaProposal,
    ShareProposal,
)
from schemas.units import GiB
from services.placement.core import SERVICE
from services.placement.settings import PlacementSettings
from services.placement.state import ClusterState, Deployment
from tests.unit.placement.builders import gpu

RESIDUE_GIB = 1
GPU_GIB = 80


def wish(
    name: str,
    gib: int | None = None,
    *,
    portion: float | None = None,
    priority: str = "very-high",
    is_preemptible: bool | None = None,
    is_parkable: bool = False,
    gpu_count: int = 1,
    minimum_runtime_s: float = 0.0,
    preemption_delay_s: float = 0.0,
    is_gang: bool = False,
    **values: Any,
) -> DeploymentSpec:
    return DeploymentSpec(
        name=name,
        engine=EngineSpec(weights_bytes=GiB),
        share=ShareSpec(request_bytes=None if gib is None else gib * GiB, request_portion=portion, gpu_count=gpu_count),
        priority=priority,
        is_preemptible=is_preemptible,
        swap=SwapSpec(is_parkable=is_parkable),
        placement=PlacementSpec(
            minimum_runtime_s=minimum_runtime_s, preemption_delay_s=preemption_delay_s, is_gang=is_gang
        ),
        **values,
    )


@dataclass
class Crowd:
    """A fleet and who stands in it. Time is what the test says it is."""

    state: ClusterState = field(
        default_factory=lambda: SERVICE.new_state(PlacementSettings(residue_bytes=RESIDUE_GIB * GiB))
    )
    count: int = 0

    def fold(self, fact: Fact) -> None:
        SERVICE.evolve(self.state, fact)

    def join(self, node: str, gpu_count: int = 1, *, allocatable_gib: int = GPU_GIB) -> None:
        gpus = tuple(gpu(f"{node}-gpu-{index}", allocatable_gib=allocatable_gib) for index in range(gpu_count))
        self.fold(
            NodeJoined(
                node=node,
                at_s=0.0,
                machine_id=node,
                gpus=gpus,
                host_budget_bytes=10_000 * GiB,
                holder_url="",
                label="software GPU",
            )
        )

    def admit(self, spec: DeploymentSpec, *, tenant: str = "default", at_s: float = 0.0) -> Deployment:
        self.count += 1
        self.fold(
            DeploymentAdmitted(
                at_s=at_s,
                inbox_seq=self.count,
                command_id=f"c{self.count}",
                tenant=tenant,
                deployment_id=f"d{self.count}",
                revision_count=1,
                deployment=spec,
            )
        )
        return self.state.deployments[f"d{self.count}"]

    def stand(
        self,
        spec: DeploymentSpec,
        *places: tuple[str, ...],
        tenant: str = "default",
        ready_at_s: float | None = 0.0,
        gang_id: str = "",
    ) -> Deployment:
        """A deployment with one replica on each of the places, which are GPUs of one node."""
        deployment = self.admit(spec, tenant=tenant)
        for gpus in places:
            self.put(deployment, gpus, ready_at_s=ready_at_s, gang_id=gang_id)
        return deployment

    def put(
        self, deployment: Deployment, gpus: tuple[str, ...], *, ready_at_s: float | None = 0.0, gang_id: str = ""
    ) -> str:
        """One more replica of it."""
        replica_id = f"{deployment.spec.name}-{deployment.created_count + 1}"
        node = gpus[0].rpartition("-gpu-")[0]
        share = deployment.spec.share
        sizes = [
            share.request_bytes
            if share.request_bytes is not None
            else int(self.state.nodes[node].gpus[uuid].allocatable_bytes * (share.request_portion or 0))
            for uuid in gpus
        ]
        shares = tuple(
            ShareProposal(replica_id=replica_id, shard_index=i, gpu_uuid=uuid, request_bytes=size, limit_bytes=size)
            for i, (uuid, size) in enumerate(zip(gpus, sizes, strict=True))
        )
        proposal = ReplicaProposal(
            replica_id=replica_id,
            deployment_id=deployment.deployment_id,
            tenant=deployment.tenant,
            deployment=deployment.spec,
            shares=shares,
        )
        self.fold(
            PlacementProposed(
                at_s=0.0, proposal_id=replica_id, node=node, replicas=(proposal,), reason="", gang_id=gang_id
            )
        )
        leases = tuple(
            Lease(
                replica_id=replica_id,
                shard_index=each.shard_index,
                gpu_uuid=each.gpu_uuid,
                request_bytes=each.request_bytes,
                granted_bytes=each.request_bytes,
                limit_bytes=each.limit_bytes,
                residue_bytes=RESIDUE_GIB * GiB,
                lease_epoch=1,
            )
            for each in shares
        )
        self.fold(
            LeaseGranted(
                node=node, at_s=0.0, proposal_id=replica_id, leases=leases, replicas=(proposal,), gang_id=gang_id
            )
        )
        if ready_at_s is not None:
            ready = Ready(
                replica_id=replica_id,
                deployment_id=deployment.deployment_id,
                model=deployment.spec.name,
                endpoint="http://x",
                wake_epoch=1,
                start_s=1.0,
                enforced_bytes=sizes[0],
            )
            self.fold(ReplicaReady(node=node, at_s=ready_at_s, replicas=(ready,)))
        return replica_id

    def begin_release(self, replica_id: str) -> None:
        node = self.state.replicas[replica_id].node
        self.fold(ReleaseProposed(at_s=0.0, node=node, replica_id=replica_id, reason="the test says so"))

    def release(self, replica_id: str, at_s: float = 0.0) -> None:
        node = self.state.replicas[replica_id].node
        self.fold(LeaseReleased(node=node, at_s=at_s, replica_id=replica_id, reason="gone"))

    def quota(self, tenant: str, gpus: float | None, weight: float = 1.0) -> None:
        self.count += 1
        self.fold(
            QuotaSet(
                at_s=0.0,
                inbox_seq=self.count,
                command_id=f"c{self.count}",
                tenant="default",
                quota_tenant=tenant,
                gpu_quota=gpus,
                over_quota_weight=weight,
            )
        )


PRIORITY_NAMES = ("very-low", "low", "medium", "high", "very-high")


def drawn_crowd(seed: int, *, has_quotas: bool = False, node_gpus: tuple[int, ...] = (1, 2, 1)) -> Crowd:
    """A small fleet, full of whatever the seed draws; on no GPU is more requested than there is."""
    draw = random.Random(seed)
    crowd = Crowd()
    for index, gpu_count in enumerate(node_gpus):
        crowd.join(f"n{index}", gpu_count)
    if has_quotas:
        for tenant in ("a", "b"):
            crowd.quota(tenant, draw.choice((0.5, 1.0, 2.0)), draw.choice((1.0, 2.0)))
    for node in list(crowd.state.nodes.values()):
        for uuid in sorted(node.gpus):
            left_gib = GPU_GIB
            while left_gib > 5 and draw.random() < 0.93:
                gib = draw.choice((5, 10, 15, 20, 30, 40, 60, 80))
                if gib > left_gib:
                    continue
                left_gib -= gib
                spec = wish(
                    f"m{crowd.count}",
                    gib,
                    priority=draw.choice(PRIORITY_NAMES),
                    is_preemptible=draw.choice((None, None, True, False)),
                    is_parkable=draw.random() < 0.4,
                    minimum_runtime_s=draw.choice((0.0, 0.0, 0.0, 50.0)),
                )
                crowd.stand(
                    spec,
                    (uuid,),
                    tenant=draw.choice(("a", "b", "c")),
                    ready_at_s=draw.choice((None, 10.0, 20.0, 70.0)),
                )
    return crowd

"""What placement knows: the fleet, the wishes, and where each replica is."""

from collections import Counter
from dataclasses import dataclass, field

from schemas.autoscaler import ReplicasDecided
from schemas.deployments import DeploymentSpec
from schemas.nodes import (
    GpuOffer,
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFact,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaWaking,
    WakeRefused,
)
from schemas.placement import (
    Alternative,
    CommandFact,
    DeploymentAdmitted,
    DeploymentRetired,
    KeyAdded,
    KeyRevoked,
    PlacementFailed,
    PlacementProposed,
    ReleaseProposed,
)
from services.placement.settings import PlacementSettings


@dataclass(slots=True)
class Node:
    name: str
    label: str
    joined_at_s: float
    gpus: dict[str, GpuOffer]
    host_budget_bytes: int


@dataclass(slots=True)
class Replica:
    """One replica, from its proposal to its release."""

    replica_id: str
    deployment_id: str
    node: str
    gpu_uuid: str
    request_bytes: int
    limit_bytes: int
    is_parkable: bool
    weights_bytes: int
    state: str
    since_s: float
    reason: str
    alternatives: tuple[Alternative, ...]
    granted_bytes: int = 0
    residue_bytes: int = 0
    wake_epoch: int = 0
    endpoint: str = ""
    last_wake_s: float | None = None
    last_start_s: float | None = None
    problem: str = ""
    is_releasing: bool = False


@dataclass(slots=True)
class Deployment:
    """A wish, and why it is not fulfilled if it is not."""

    deployment_id: str
    tenant: str
    spec: DeploymentSpec
    admitted_at_s: float
    revision_count: int
    replica_count: int
    """How many replicas it shall have now; the autoscaler moves it between 0 and the wish."""
    created_count: int = 0
    """Replicas that were ever made for it: names the next one."""
    refused_nodes: tuple[str, ...] = ()
    """Nodes that refused since the last success; asked again when they report more room."""
    problem: str = ""
    remedy: str = ""
    alternatives: tuple[Alternative, ...] = ()


@dataclass(slots=True)
class Key:
    key_id: str
    tenant: str
    name: str
    key_hash: str
    created_at_s: float


@dataclass(slots=True)
class ClusterState:
    """The fold of the whole system's history, as far as placement needs it."""

    settings: PlacementSettings
    nodes: dict[str, Node] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    """{deployment_id: deployment}; retired ones are gone."""
    replicas: dict[str, Replica] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    inbox_seq: int = 0
    """The inbox cursor: the highest inbox sequence that a fact names."""
    command_ids: dict[str, str] = field(default_factory=dict)
    """{tenant/command_id: verdict in words}, oldest first, bounded."""

    def named(self, tenant: str, model: str) -> Deployment | None:
        """The tenant's deployment of that name."""
        for deployment in self.deployments.values():
            if deployment.tenant == tenant and deployment.spec.name == model:
                return deployment
        return None

    def replicas_of(self, deployment_id: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.deployment_id == deployment_id]

    def replica_counts(self) -> Counter[str]:
        """{deployment_id: its replicas}, for those who ask about all deployments: one pass instead of one for each."""
        return Counter(replica.deployment_id for replica in self.replicas.values())

    def on_gpu(self, gpu_uuid: str) -> list[Replica]:
        """Replicas that are promised a place on the GPU; those that failed for good hold none."""
        return [r for r in self.replicas.values() if r.gpu_uuid == gpu_uuid and r.state != "failed"]


def new_state(settings: PlacementSettings) -> ClusterState:
    return ClusterState(settings=settings)


# --- Own facts --------------------------------------------------------------------------------------------------------


def fold_command(state: ClusterState, fact: CommandFact) -> None:
    """Move the inbox cursor on and remember the command, so that its repetition is recognised."""
    state.inbox_seq = max(state.inbox_seq, fact.inbox_seq)
    state.command_ids[f"{fact.tenant}/{fact.command_id}"] = type(fact).__name__
    while len(state.command_ids) > state.settings.remembered_command_count:
        del state.command_ids[next(iter(state.command_ids))]


def fold_admitted(state: ClusterState, fact: DeploymentAdmitted) -> None:
    fold_command(state, fact)
    state.deployments[fact.deployment_id] = Deployment(
        deployment_id=fact.deployment_id,
        tenant=fact.tenant,
        spec=fact.deployment,
        admitted_at_s=fact.at_s,
        revision_count=fact.revision_count,
        replica_count=fact.deployment.replica_count,
    )


def fold_retired(state: ClusterState, fact: DeploymentRetired) -> None:
    fold_command(state, fact)
    state.deployments.pop(fact.deployment_id, None)


def fold_key_added(state: ClusterState, fact: KeyAdded) -> None:
    fold_command(state, fact)
    state.keys[fact.key_id] = Key(
        key_id=fact.key_id, tenant=fact.tenant, name=fact.name, key_hash=fact.key_hash, created_at_s=fact.at_s
    )


def fold_key_revoked(state: ClusterState, fact: KeyRevoked) -> None:
    fold_command(state, fact)
    state.keys.pop(fact.key_id, None)


def fold_proposed(state: ClusterState, fact: PlacementProposed) -> None:
    for proposal in fact.replicas:
        share = proposal.shares[0]
        state.replicas[proposal.replica_id] = Replica(
            replica_id=proposal.replica_id,
            deployment_id=proposal.deployment_id,
            node=fact.node,
            gpu_uuid=share.gpu_uuid,
            request_bytes=share.request_bytes,
            limit_bytes=share.limit_bytes,
            is_parkable=proposal.deployment.swap.is_parkable,
            weights_bytes=proposal.deployment.engine.weights_bytes,
            state="proposed",
            since_s=fact.at_s,
            reason=fact.reason,
            alternatives=fact.alternatives,
            residue_bytes=state.settings.residue_bytes,
        )
        deployment = state.deployments.get(proposal.deployment_id)
        if deployment is not None:
            deployment.created_count += 1
            deployment.problem = ""
            deployment.remedy = ""
            deployment.alternatives = fact.alternatives


def fold_failed_placement(state: ClusterState, fact: PlacementFailed) -> None:
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is not None:
        deployment.problem = fact.message
        deployment.remedy = fact.remedy
        deployment.alternatives = fact.alternatives


def fold_release(state: ClusterState, fact: ReleaseProposed) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is not None:
        replica.is_releasing = True


# --- Facts of node agents and of the autoscaler -----------------------------------------------------------------------


def fold_joined(state: ClusterState, fact: NodeJoined) -> None:
    state.nodes[fact.node] = Node(
        name=fact.node,
        label=fact.label,
        joined_at_s=fact.at_s,
        gpus={gpu.gpu_uuid: gpu for gpu in fact.gpus},
        host_budget_bytes=fact.host_budget_bytes,
    )
    for deployment in state.deployments.values():
        deployment.refused_nodes = ()


def fold_granted(state: ClusterState, fact: LeaseGranted) -> None:
    for lease in fact.leases:
        replica = _move(state, lease.replica_id, "granted", fact.at_s)
        if replica is not None:
            replica.granted_bytes = lease.granted_bytes
            replica.residue_bytes = lease.residue_bytes
            replica.wake_epoch = 1
            deployment = state.deployments.get(replica.deployment_id)
            if deployment is not None:
                deployment.refused_nodes = ()


def fold_refused(state: ClusterState, fact: LeaseRefused) -> None:
    for replica_id in fact.replica_ids:
        replica = state.replicas.pop(replica_id, None)
        deployment = state.deployments.get(replica.deployment_id) if replica is not None else None
        if deployment is not None:
            deployment.refused_nodes = (*deployment.refused_nodes, fact.node)
            deployment.problem = f"{fact.node} refused: {fact.message}"


def fold_released(state: ClusterState, fact: LeaseReleased) -> None:
    state.replicas.pop(fact.replica_id, None)
    for deployment in state.deployments.values():
        deployment.refused_nodes = ()


def _move(state: ClusterState, replica_id: str, to: str, at_s: float) -> Replica | None:
    replica = state.replicas.get(replica_id)
    if replica is not None:
        replica.state, replica.since_s = to, at_s
    return replica


def fold_replica_fact(state: ClusterState, fact: ReplicaFact) -> None:
    """Where a replica is now; one word per kind of fact."""
    words: dict[type[ReplicaFact], str] = {
        ReplicaStarting: "starting",
        ReplicaDraining: "draining",
        ParkAbandoned: "resident",
        ReplicaWaking: "waking",
    }
    _move(state, fact.replica_id, words[type(fact)], fact.at_s)


def fold_ready(state: ClusterState, fact: ReplicaReady) -> None:
    for ready in fact.replicas:
        replica = _move(state, ready.replica_id, "resident", fact.at_s)
        if replica is not None:
            replica.endpoint, replica.last_start_s, replica.problem = ready.endpoint, ready.start_s, ""
            replica.wake_epoch = ready.wake_epoch


def fold_parked(state: ClusterState, fact: ReplicaParked) -> None:
    replica = _move(state, fact.replica_id, "parked", fact.at_s)
    if replica is not None:
        replica.wake_epoch, replica.residue_bytes = fact.wake_epoch, fact.residue_bytes


def fold_resident(state: ClusterState, fact: ReplicaResident) -> None:
    replica = _move(state, fact.replica_id, "resident", fact.at_s)
    if replica is not None:
        replica.endpoint, replica.last_wake_s, replica.problem = fact.endpoint, fact.wake_s, ""


def fold_wake_refused(state: ClusterState, fact: WakeRefused) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is not None and replica.state == "waking":
        _move(state, fact.replica_id, "parked" if replica.endpoint else "granted", fact.at_s)
        replica.problem = fact.reason


def fold_replica_failed(state: ClusterState, fact: ReplicaFailed) -> None:
    replica = _move(state, fact.replica_id, "failed" if fact.is_final else "granted", fact.at_s)
    if replica is not None:
        replica.problem = fact.reason
        replica.endpoint = ""
        replica.wake_epoch = fact.wake_epoch


def fold_replicas_decided(state: ClusterState, fact: ReplicasDecided) -> None:
    deployment = state.deployments.get(fact.deployment_id)
    if deployment is not None:
        deployment.replica_count = fact.replica_count

"""What placement knows: the fleet, the wishes, where each replica is. `folds` changes it, `index` answers from it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from schemas.deployments import DeploymentSpec
from schemas.nodes import GpuOffer
from schemas.placement import Alternative, Constraint, ReasonCode, ReplicaProposal, ShareProposal, Victim
from services.placement.index import Index
from services.placement.observed import Observed
from services.placement.settings import PlacementSettings


@dataclass(slots=True)
class Node:
    name: str
    label: str
    joined_at_s: float
    gpus: dict[str, GpuOffer]
    host_budget_bytes: int
    """For the weights of parked replicas."""
    cpu_millicores: int | None = None
    """None: not told, so that nothing that asks for it goes there."""
    memory_bytes: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    machine_id: str = ""
    lost_at_s: float | None = None
    """Since when it is taken for lost; its replicas do not count as placed."""
    quarantine_until_s: float = 0.0
    """Until then nothing new goes there."""
    silent_since_s: float = 0.0
    """When a lost one was last heard."""
    returned_at_s: float = 0.0
    """When it was last heard again after a loss; 0: never."""
    loss_times_s: tuple[float, ...] = ()
    """Its losses within the time that is remembered, oldest first."""

    def is_open(self, now_s: float) -> bool:
        """Whether anything new may go there."""
        return self.lost_at_s is None and self.quarantine_until_s <= now_s


@dataclass(slots=True)
class Replica:
    """One replica, from its proposal to its release."""

    replica_id: str
    deployment_id: str
    tenant: str
    node: str
    shares: tuple[ShareProposal, ...]
    """One for each of its GPUs, by shard."""
    priority: int
    is_preemptible: bool
    is_parkable: bool
    weights_bytes: int
    cpu_millicores: int
    memory_bytes: int
    state: str
    since_s: float
    reason: str
    codes: tuple[ReasonCode, ...]
    residue_bytes: tuple[int, ...]
    """By shard: what it keeps on its GPU while parked; expected at first, measured from its first park on."""
    granted_bytes: tuple[int, ...] = ()
    """By shard; empty before its lease is granted."""
    gang_id: str = ""
    is_held: bool = False
    """Its gang is not complete: it starts nothing yet."""
    wake_epoch: int = 0
    endpoint: str = ""
    ready_at_s: float | None = None
    """When it was ready to serve for the first time, by its node's clock."""
    moved_at_s: float = 0.0
    """When it took another's place, by placement's own clock; 0: it did not."""
    last_wake_s: float | None = None
    last_start_s: float | None = None
    problem: str = ""
    is_releasing: bool = False

    @classmethod
    def proposed(
        cls,
        proposal: ReplicaProposal,
        *,
        node: str,
        at_s: float,
        reason: str,
        codes: tuple[ReasonCode, ...],
        gang_id: str,
        residue_bytes: int,
    ) -> "Replica":
        """As it is when its proposal leaves. `residue_bytes`: what a shard is expected to keep."""
        spec = proposal.deployment
        return cls(
            replica_id=proposal.replica_id,
            deployment_id=proposal.deployment_id,
            tenant=proposal.tenant,
            node=node,
            shares=proposal.shares,
            priority=spec.priority_number,
            is_preemptible=spec.may_be_preempted,
            is_parkable=spec.swap.is_parkable,
            weights_bytes=spec.engine.weights_bytes,
            cpu_millicores=spec.host.cpu_millicores,
            memory_bytes=spec.host.memory_bytes,
            state="proposed",
            since_s=at_s,
            reason=proposal.reason or reason,
            codes=codes,
            residue_bytes=tuple(min(residue_bytes, share.request_bytes) for share in proposal.shares),
            gang_id=gang_id,
            is_held=bool(gang_id),
        )

    @property
    def request_bytes(self) -> int:
        """On all its GPUs together."""
        return sum(share.request_bytes for share in self.shares)

    @property
    def limit_bytes(self) -> int:
        return sum(share.limit_bytes for share in self.shares)

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        return tuple(share.gpu_uuid for share in self.shares)

    @property
    def holds_place(self) -> bool:
        """Whether it is promised its bytes; one that failed for good is not."""
        return self.state != "failed"

    def request_on(self, gpu_uuid: str) -> int:
        """What it is promised on this GPU."""
        return sum(share.request_bytes for share in self.shares if share.gpu_uuid == gpu_uuid)

    def residue_on(self, gpu_uuid: str) -> int:
        """What it keeps on this GPU while it is parked, at most its request there."""
        pairs = zip(self.shares, self.residue_bytes, strict=True)
        return sum(min(size, share.request_bytes) for share, size in pairs if share.gpu_uuid == gpu_uuid)


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
    not_moved_before_s: float = 0.0
    """A move of it was given up: it is left alone until then."""
    problem: str = ""
    remedy: str = ""
    alternatives: tuple[Alternative, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    codes: tuple[ReasonCode, ...] = ()
    short_since_s: float = 0.0
    """Since when it lacks replicas, where it does."""
    displaced: tuple[Victim, ...] = ()
    """Who gave their places to it, the newest last, a bounded number."""
    displaced_by: str = ""
    """The model that took the place of one of its replicas; empty once it has all of them again."""
    rests_until_s: float = 0.0
    """What was displaced is not placed sooner, so that it does not take and lose a place in turns."""
    gang_attempt_count: int = 0
    """Gangs of it that were given up since the last one that started, or since it was told so."""
    gang_not_before_s: float = 0.0
    """The next one is not proposed sooner."""


@dataclass(slots=True)
class Claim:
    """Room that is being made for one replica. Nobody else is placed there."""

    preemption_id: str
    deployment_id: str
    tenant: str
    is_preemptible: bool
    replica_id: str
    """The newcomer."""
    node: str
    gpu_uuids: tuple[str, ...]
    request_bytes: tuple[int, ...]
    """On each of these GPUs."""
    victims: tuple[Victim, ...]
    decided_at_s: float
    reason: str


@dataclass(slots=True)
class Quota:
    """What a tenant's workloads are guaranteed together."""

    tenant: str
    parts: int | None
    """Millionths of a GPU; None: no limit."""
    over_quota_weight: float


@dataclass(slots=True)
class Gang:
    """Replicas that start together or not at all, from their proposal until all leases are there or given back."""

    gang_id: str
    deployment_id: str
    proposed_at_s: float
    replica_ids: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """{node: its part}"""
    missing: dict[str, str] = field(default_factory=dict)
    """{replica_id: node}, those without a lease"""
    problem: str = ""
    """Why it cannot become complete."""

    @property
    def wanted_count(self) -> int:
        return sum(len(ids) for ids in self.replica_ids.values())


@dataclass(slots=True)
class Move:
    """A replica that is being moved: it and its replacement both hold their places until one of them ends."""

    move_id: str
    replica_id: str
    replacement_id: str
    deployment_id: str
    decided_at_s: float


@dataclass(slots=True)
class Repacking:
    """What an operator asked for."""

    until_s: float
    left_count: int
    """Moves that may still be begun for it."""


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
    """{replica_id: replica}, in the order of their proposals. Added, moved and dropped by `folds` only."""
    moves: dict[str, Move] = field(default_factory=dict)
    """{move_id: a move that has not ended}"""
    move_times_s: tuple[float, ...] = ()
    """When moves were begun that nobody asked for, within the last hour, oldest first."""
    repacking: Repacking | None = None
    draining: dict[str, str] = field(default_factory=dict)
    """{gpu_uuid: its node}, those that an operator wants empty, until they are reinstated."""
    claims: dict[str, Claim] = field(default_factory=dict)
    """{preemption_id: claim}, from its decision to its end."""
    quotas: dict[str, Quota] = field(default_factory=dict)
    """{tenant: quota}; a tenant that is not named has no limit and a weight of 1."""
    gangs: dict[str, Gang] = field(default_factory=dict)
    """{gang_id: gang}, those that are not complete"""
    keys: dict[str, Key] = field(default_factory=dict)
    inbox_seq: int = 0
    """The inbox cursor: the highest inbox sequence that a fact names."""
    command_ids: dict[str, str] = field(default_factory=dict)
    """{tenant/command_id: verdict in words}, oldest first, bounded."""
    derived: Index | None = None
    """What `index` gives; no part of history."""
    observed: Observed = field(default_factory=Observed)

    @property
    def index(self) -> Index:
        """The same knowledge, laid out for questions; made anew where there is none, after a restore."""
        if self.derived is None:
            self.derived = Index(self)
        return self.derived

    def named(self, tenant: str, model: str) -> Deployment | None:
        """The tenant's deployment of that name."""
        return self.index.named.get((tenant, model))

    def replicas_of(self, deployment_id: str) -> list[Replica]:
        """In the order of their proposals."""
        return list(self.index.of_deployment.get(deployment_id, {}).values())

    def on_gpu(self, gpu_uuid: str) -> list[Replica]:
        """Replicas that are promised a place on the GPU, in the order of their proposals, failed ones left out."""
        return list(self.index.on_gpu.get(gpu_uuid, {}).values())

    def on_node(self, node: str) -> list[Replica]:
        """All replicas that were proposed to the node and not released."""
        return list(self.index.on_node.get(node, {}).values())

    def is_lost(self, replica: Replica) -> bool:
        """Whether its node is lost: it holds its place there, and another one is wanted."""
        node = self.nodes.get(replica.node)
        return node is not None and node.lost_at_s is not None

    def placed_count(self, deployment_id: str) -> int:
        """Its replicas that count as placed: all that are not on a lost node."""
        return self.index.placed_counts.get(deployment_id, 0)

    @property
    def waiting(self) -> Collection[str]:
        """Ids of the deployments that lack replicas, in no order that means anything."""
        return self.index.waiting.keys()


def new_state(settings: PlacementSettings) -> ClusterState:
    return ClusterState(settings=settings)

"""Where requests may go: a fold of others' facts, and the route leases of the nodes' holders. Pure.

Facts say what exists, where it is and in which state. Whether a request may be sent *now* is the holder's word alone:
a replica is routable while its node's lease lasts and the lease lists it as open. That word is given over HTTP, so it
holds without NATS, and it is taken back before a replica is parked.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self

from msgspec import Struct

from schemas.deployments import DeploymentSpec, WorkloadKind
from schemas.holders import RouteLease
from schemas.messages import Fact
from schemas.nodes import (
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
    ReplicaSuspect,
    ReplicaWaking,
)
from schemas.placement import (
    DeploymentAdmitted,
    DeploymentRetired,
    KeyAdded,
    KeyRevoked,
    PlacementFailed,
    PlacementProposed,
)


class ReplicaState(StrEnum):
    """What facts last said about a replica; best first, as seen by a request that wants an answer."""

    RESIDENT = "resident"
    WAKING = "waking"
    STARTING = "starting"
    DRAINING = "draining"
    PARKED = "parked"
    SUSPECT = "suspect"
    """Its node finds out what it is."""
    GRANTED = "cold"
    """It has a lease but no engine yet."""
    PROPOSED = "proposed"
    FAILED = "failed"


_BEST_FIRST: Final = {state: rank for rank, state in enumerate(ReplicaState)}
_SOONEST_FIRST: Final = {
    state: rank
    for rank, state in enumerate(
        (
            ReplicaState.RESIDENT,
            ReplicaState.WAKING,
            ReplicaState.PARKED,
            ReplicaState.STARTING,
            ReplicaState.DRAINING,
            ReplicaState.SUSPECT,
            ReplicaState.GRANTED,
            ReplicaState.PROPOSED,
            ReplicaState.FAILED,
        )
    )
}
"""As seen by a request that has to wait: a wake takes about a second, a cold start many, a draining one has both ways
before it."""
COLD: Final = "cold"
"""State of a deployment without a replica, or with one whose engine was not started."""


@dataclass(slots=True, kw_only=True)
class Replica:
    """One replica as this gateway knows it."""

    replica_id: str
    deployment_id: str
    node: str
    state: ReplicaState
    since_s: float
    endpoint: str = ""
    """Base address of its engine as facts say; empty until the first `ReplicaReady`, and after a failure."""
    wake_epoch: int = 0
    """The node agent's counter as last read; named in every wish for this replica."""
    is_final: bool = False
    """It failed and will not be tried again."""
    problem: str = ""


@dataclass(slots=True, kw_only=True)
class Deployment:
    """A wish that was admitted, with what helps to foretell its return."""

    deployment_id: str
    tenant: str
    spec: DeploymentSpec
    admitted_s: float
    replicas: dict[str, Replica] = field(default_factory=dict)
    last_wake_s: float | None = None
    last_start_s: float | None = None
    problem: str = ""
    """Why placement could not place it; empty when it could."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLease:
    """One holder's word. It ends at `ends_s`, counted from before the wish was sent."""

    version: int
    endpoints: dict[str, str]
    """{replica id: base address of its engine} of all that are open; may be newer than the last fact read."""
    ends_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose key it was."""

    tenant: str
    key_id: str


class TableImage(Struct, frozen=True, kw_only=True):
    """What facts have told a table, without what holders say: enough to go on from where it was made."""

    deployments: tuple[Deployment, ...]
    holder_urls: dict[str, str]
    keys: dict[str, Caller]
    """{hash of the key: whose it is}"""


class RouteTable:
    """Everything that routing rests on. `fold` and `renew` change it and name the deployments that they touched."""

    def __init__(self) -> None:
        self.deployments: dict[str, Deployment] = {}
        self.models: dict[tuple[str, str], str] = {}
        """(tenant, model name) -> deployment id; inference only."""
        self.replicas: dict[str, Replica] = {}
        self.holder_urls: dict[str, str] = {}
        self.leases: dict[str, NodeLease] = {}
        self._callers: dict[str, Caller] = {}
        self._hashes: dict[Caller, str] = {}
        self._draining_ids: set[str] = set()
        """Announced as draining while the holder still lists them open; the holder's next word replaces this."""

    def image(self) -> TableImage:
        return TableImage(
            deployments=tuple(self.deployments.values()), holder_urls=self.holder_urls, keys=self._callers
        )

    @classmethod
    def of(cls, image: TableImage) -> Self:
        """A table that has folded what the one behind the image had."""
        table = cls()
        for deployment in image.deployments:
            table.deployments[deployment.deployment_id] = deployment
            if deployment.spec.kind is WorkloadKind.INFERENCE:
                table.models[deployment.tenant, deployment.spec.name] = deployment.deployment_id
            table.replicas.update(deployment.replicas)
        table.holder_urls.update(image.holder_urls)
        table._callers.update(image.keys)
        table._hashes.update({caller: key_hash for key_hash, caller in image.keys.items()})
        return table

    # --- Questions ----------------------------------------------------------------------------------------------------

    def caller(self, key_hash: str) -> Caller | None:
        return self._callers.get(key_hash)

    def find(self, tenant: str, model: str) -> Deployment | None:
        deployment_id = self.models.get((tenant, model))
        return None if deployment_id is None else self.deployments.get(deployment_id)

    def of_tenant(self, tenant: str) -> list[Deployment]:
        """The tenant's models by name."""
        ids = (deployment_id for (owner, _), deployment_id in sorted(self.models.items()) if owner == tenant)
        return [self.deployments[deployment_id] for deployment_id in ids]

    def is_routable(self, replica: Replica, now_s: float) -> bool:
        """True while a new request may be sent to it. At the very end of a term it may not."""
        lease = self.leases.get(replica.node)
        return (
            lease is not None
            and now_s < lease.ends_s
            and replica.replica_id in lease.endpoints
            and self.endpoint_of(replica) != ""
            and replica.replica_id not in self._draining_ids
        )

    def endpoint_of(self, replica: Replica) -> str:
        """Where its engine listens: the holder's word if it gave one, else the last fact's."""
        lease = self.leases.get(replica.node)
        return (lease and lease.endpoints.get(replica.replica_id)) or replica.endpoint

    def best(
        self, deployment: Deployment, *, now_s: float, load: Mapping[str, int], shunned: Mapping[str, float]
    ) -> Replica | None:
        """The routable replica with the fewest requests in flight; ties go to the smaller id."""
        chosen: tuple[int, str] | None = None
        for replica_id, replica in deployment.replicas.items():
            if shunned.get(replica_id, 0.0) <= now_s and self.is_routable(replica, now_s):
                candidate = (load.get(replica_id, 0), replica_id)
                if chosen is None or candidate < chosen:
                    chosen = candidate
        return None if chosen is None else deployment.replicas[chosen[1]]

    def state_of(self, deployment: Deployment) -> str:
        """One word for the deployment: that of its best replica."""
        states = [replica.state for replica in deployment.replicas.values()]
        if not states:
            return COLD
        best = min(states, key=_BEST_FIRST.__getitem__)
        return COLD if best in {ReplicaState.GRANTED, ReplicaState.PROPOSED} else best.value

    def failure_of(self, deployment: Deployment) -> str | None:
        """Why no replica of it will ever return by itself; None when one may."""
        replicas = deployment.replicas.values()
        if not replicas or not all(replica.is_final for replica in replicas):
            return None
        return "; ".join(sorted(replica.problem for replica in replicas))

    def wanted(self, deployment: Deployment, now_s: float) -> tuple[str, int]:
        """Which replica to ask for, with its wake epoch; an empty id when none has a lease.

        Of several, the one that can be there soonest; all gateways name the same one, so that one wakes. Those on nodes
        whose holder is silent come last: whatever facts say of them, nothing can be sent there.
        """
        leased = [r for r in deployment.replicas.values() if r.state is not ReplicaState.PROPOSED and not r.is_final]
        if not leased:
            return "", 0
        replica = min(leased, key=lambda r: (self._is_silent(r.node, now_s), _SOONEST_FIRST[r.state], r.replica_id))
        return replica.replica_id, replica.wake_epoch

    def _is_silent(self, node: str, now_s: float) -> bool:
        """True when its holder has given no word that still holds."""
        lease = self.leases.get(node)
        return lease is None or now_s >= lease.ends_s

    def eta_s(self, deployment: Deployment, now_s: float) -> float | None:
        """Seconds until it is back if it behaves as last time; None when nothing is known or it is overdue."""
        state = self.state_of(deployment)
        usual_s = deployment.last_start_s if state in {COLD, ReplicaState.STARTING} else deployment.last_wake_s
        if state == ReplicaState.RESIDENT:
            return 0.0
        if usual_s is None or state == ReplicaState.FAILED:
            return None
        if state not in {ReplicaState.STARTING, ReplicaState.WAKING}:
            return usual_s
        since_s = max(r.since_s for r in deployment.replicas.values() if r.state == state)
        left_s = usual_s - max(0.0, now_s - since_s)
        return left_s if left_s > 0 else None

    # --- The holders' word --------------------------------------------------------------------------------------------

    def renew(self, node: str, lease: RouteLease, *, sent_s: float) -> set[str]:
        """Take the holder's newest answer; the deployments whose routes it opens or closes."""
        before = self.leases.get(node)
        if before is not None and lease.version < before.version:
            return set()
        named = dict(zip(lease.open_ids, lease.endpoints, strict=False))
        facts = ((key, self.replicas[key].endpoint if key in self.replicas else "") for key in lease.open_ids)
        endpoints = {key: named.get(key) or endpoint for key, endpoint in facts if key not in lease.closed_ids}
        was_open = before.endpoints if before is not None and sent_s < before.ends_s else {}
        self.leases[node] = NodeLease(version=lease.version, endpoints=endpoints, ends_s=sent_s + lease.term_s)
        # Closed by the holder: from here on the holder alone says when it is open again.
        self._draining_ids -= was_open.keys() - endpoints.keys()
        return self._deployments_of(endpoints.keys() ^ was_open.keys())

    def forget_lease(self, node: str) -> None:
        self.leases.pop(node, None)

    def _deployments_of(self, replica_ids: Iterable[str]) -> set[str]:
        found = (self.replicas.get(replica_id) for replica_id in replica_ids)
        return {replica.deployment_id for replica in found if replica is not None}

    # --- Facts --------------------------------------------------------------------------------------------------------

    def fold(self, fact: Fact) -> set[str]:
        """Change the table by one fact; the ids of the deployments that it touched."""
        fold = _FOLDS.get(type(fact))
        return set() if fold is None else fold(self, fact)

    def admitted(self, fact: DeploymentAdmitted) -> set[str]:
        deployment = self.deployments.get(fact.deployment_id)
        if deployment is None:
            deployment = Deployment(
                deployment_id=fact.deployment_id, tenant=fact.tenant, spec=fact.deployment, admitted_s=fact.at_s
            )
            self.deployments[fact.deployment_id] = deployment
        deployment.spec = fact.deployment
        if fact.deployment.kind is WorkloadKind.INFERENCE:
            self.models[fact.tenant, fact.deployment.name] = fact.deployment_id
        return {fact.deployment_id}

    def deployment_retired(self, fact: DeploymentRetired) -> set[str]:
        deployment = self.deployments.pop(fact.deployment_id, None)
        if deployment is None:
            return set()
        name = (deployment.tenant, deployment.spec.name)
        if self.models.get(name) == fact.deployment_id:
            del self.models[name]
        for replica_id in deployment.replicas:
            self._forget(replica_id)
        return {fact.deployment_id}

    def key_added(self, fact: KeyAdded) -> set[str]:
        caller = Caller(tenant=fact.tenant, key_id=fact.key_id)
        self._drop_key(caller)
        self._callers[fact.key_hash.lower()] = caller
        self._hashes[caller] = fact.key_hash.lower()
        return set()

    def key_revoked(self, fact: KeyRevoked) -> set[str]:
        self._drop_key(Caller(tenant=fact.tenant, key_id=fact.key_id))
        return set()

    def _drop_key(self, caller: Caller) -> None:
        key_hash = self._hashes.pop(caller, None)
        if key_hash is not None and self._callers.get(key_hash) == caller:
            del self._callers[key_hash]

    def proposed(self, fact: PlacementProposed) -> set[str]:
        for proposal in fact.replicas:
            self._put(proposal.replica_id, proposal.deployment_id, fact.node, ReplicaState.PROPOSED, fact.at_s)
        touched = {proposal.deployment_id for proposal in fact.replicas}
        for deployment_id in touched & self.deployments.keys():
            self.deployments[deployment_id].problem = ""
        return touched

    def placement_failed(self, fact: PlacementFailed) -> set[str]:
        deployment = self.deployments.get(fact.deployment_id)
        if deployment is not None:
            deployment.problem = fact.message
        return {fact.deployment_id}

    def node_joined(self, fact: NodeJoined) -> set[str]:
        if self.holder_urls.get(fact.node) != fact.holder_url:
            self.holder_urls[fact.node] = fact.holder_url
            self.forget_lease(fact.node)
        return set()

    def granted(self, fact: LeaseGranted) -> set[str]:
        for proposal in fact.replicas:
            self._put(proposal.replica_id, proposal.deployment_id, fact.node, ReplicaState.GRANTED, fact.at_s)
        return {proposal.deployment_id for proposal in fact.replicas}

    def refused(self, fact: LeaseRefused) -> set[str]:
        touched = self._deployments_of(fact.replica_ids)
        for replica_id in fact.replica_ids:
            replica = self.replicas.get(replica_id)
            if replica is not None and replica.state is ReplicaState.PROPOSED:
                self._forget(replica_id)
        return touched

    def released(self, fact: LeaseReleased) -> set[str]:
        touched = self._deployments_of((fact.replica_id,))
        self._forget(fact.replica_id)
        return touched

    def ready(self, fact: ReplicaReady) -> set[str]:
        for one in fact.replicas:
            replica = self._put(one.replica_id, one.deployment_id, fact.node, ReplicaState.RESIDENT, fact.at_s)
            replica.endpoint, replica.wake_epoch = one.endpoint, one.wake_epoch
            deployment = self.deployments.get(one.deployment_id)
            if deployment is not None:
                deployment.last_start_s = one.start_s
        return {one.deployment_id for one in fact.replicas}

    def replica_turned(self, fact: ReplicaFact) -> set[str]:
        """The facts about one replica: each gives it a state and what else that state knows."""
        replica = self._put(fact.replica_id, fact.deployment_id, fact.node, _STATES[type(fact)], fact.at_s)
        match fact:
            case ReplicaStarting():
                replica.endpoint, replica.wake_epoch = "", fact.wake_epoch
            case ReplicaParked() | ReplicaWaking() | ParkAbandoned():
                replica.wake_epoch = fact.wake_epoch
            case ReplicaResident():
                replica.endpoint, replica.wake_epoch = fact.endpoint, fact.wake_epoch
                deployment = self.deployments.get(fact.deployment_id)
                if deployment is not None:
                    deployment.last_wake_s = fact.wake_s
            case ReplicaFailed():
                replica.endpoint, replica.wake_epoch = "", fact.wake_epoch
                replica.is_final, replica.problem = fact.is_final, fact.reason
            case ReplicaDraining():
                lease = self.leases.get(fact.node)
                if lease is not None and fact.replica_id in lease.endpoints:
                    self._draining_ids.add(fact.replica_id)
        return {fact.deployment_id}

    def _put(self, replica_id: str, deployment_id: str, node: str, state: ReplicaState, at_s: float) -> Replica:
        self._draining_ids.discard(replica_id)
        replica = self.replicas.get(replica_id)
        if replica is None:
            replica = Replica(replica_id=replica_id, deployment_id=deployment_id, node=node, state=state, since_s=at_s)
        replica.node, replica.state, replica.since_s = node, state, at_s
        replica.is_final, replica.problem = False, ""
        deployment = self.deployments.get(deployment_id)
        # Without a deployment it was retired: nothing is routed to it, and nothing is remembered.
        if deployment is not None:
            self.replicas[replica_id] = deployment.replicas[replica_id] = replica
        return replica

    def _forget(self, replica_id: str) -> None:
        self._draining_ids.discard(replica_id)
        replica = self.replicas.pop(replica_id, None)
        if replica is not None and (deployment := self.deployments.get(replica.deployment_id)):
            deployment.replicas.pop(replica_id, None)


_STATES: Final[dict[type[ReplicaFact], ReplicaState]] = {
    ReplicaStarting: ReplicaState.STARTING,
    ReplicaDraining: ReplicaState.DRAINING,
    ReplicaParked: ReplicaState.PARKED,
    ReplicaWaking: ReplicaState.WAKING,
    ReplicaResident: ReplicaState.RESIDENT,
    ParkAbandoned: ReplicaState.RESIDENT,
    ReplicaSuspect: ReplicaState.SUSPECT,
    ReplicaFailed: ReplicaState.FAILED,
}

_FOLDS: Final[dict[type[Fact], Callable[[RouteTable, Any], set[str]]]] = {
    DeploymentAdmitted: RouteTable.admitted,
    DeploymentRetired: RouteTable.deployment_retired,
    KeyAdded: RouteTable.key_added,
    KeyRevoked: RouteTable.key_revoked,
    PlacementProposed: RouteTable.proposed,
    PlacementFailed: RouteTable.placement_failed,
    NodeJoined: RouteTable.node_joined,
    LeaseGranted: RouteTable.granted,
    LeaseRefused: RouteTable.refused,
    LeaseReleased: RouteTable.released,
    ReplicaReady: RouteTable.ready,
    **dict.fromkeys(_STATES, RouteTable.replica_turned),
}

"""A small fleet in words: facts and route leases as placement, node agents and holders would send them."""

from schemas.deployments import DeploymentSpec, EngineSpec, ShareSpec, SwapSpec
from schemas.holders import RouteLease
from schemas.messages import Fact
from schemas.nodes import (
    Lease,
    LeaseGranted,
    LeaseReleased,
    NodeJoined,
    Ready,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaWaking,
)
from schemas.placement import (
    DeploymentAdmitted,
    DeploymentRetired,
    KeyAdded,
    KeyRevoked,
    PlacementProposed,
    ReplicaProposal,
    ShareProposal,
)
from services.gateway.actions import Dispatch, Publish, Refuse
from services.gateway.core import Gateway
from services.gateway.settings import GatewaySettings

T0 = 1_000.0


def spec_of(model: str, *, return_deadline_s: float = 30.0) -> DeploymentSpec:
    return DeploymentSpec(
        name=model,
        engine=EngineSpec(weights_bytes=10),
        share=ShareSpec(request_portion=0.5),
        swap=SwapSpec(return_deadline_s=return_deadline_s),
    )


def admitted(model: str = "m", *, tenant: str = "acme", return_deadline_s: float = 30.0) -> Fact:
    return DeploymentAdmitted(
        inbox_seq=1, command_id="c", tenant=tenant, at_s=T0, deployment_id=f"d-{model}", revision_count=1,
        deployment=spec_of(model, return_deadline_s=return_deadline_s),
    )  # fmt: skip


def retired(model: str = "m", *, tenant: str = "acme") -> Fact:
    return DeploymentRetired(
        inbox_seq=2, command_id="c2", tenant=tenant, at_s=T0, deployment_id=f"d-{model}", model=model
    )


def key_added(key_hash: str, *, tenant: str = "acme", key_id: str = "k") -> Fact:
    return KeyAdded(inbox_seq=3, command_id="c3", tenant=tenant, at_s=T0, key_id=key_id, key_hash=key_hash, name="")


def key_revoked(*, tenant: str = "acme", key_id: str = "k") -> Fact:
    return KeyRevoked(inbox_seq=4, command_id="c4", tenant=tenant, at_s=T0, key_id=key_id)


def _proposal(model: str, replica: str, tenant: str) -> ReplicaProposal:
    share = ShareProposal(replica_id=replica, shard_index=0, gpu_uuid="GPU-0", request_bytes=10, limit_bytes=10)
    return ReplicaProposal(
        replica_id=replica, deployment_id=f"d-{model}", tenant=tenant, deployment=spec_of(model), shares=(share,)
    )


def proposed(model: str = "m", replica: str = "r", *, node: str = "n", tenant: str = "acme") -> Fact:
    return PlacementProposed(
        at_s=T0, proposal_id="p", node=node, replicas=(_proposal(model, replica, tenant),), reason=""
    )


def granted(model: str = "m", replica: str = "r", *, node: str = "n", tenant: str = "acme") -> Fact:
    lease = Lease(
        replica_id=replica, shard_index=0, gpu_uuid="GPU-0", request_bytes=10, granted_bytes=10, limit_bytes=10,
        residue_bytes=1, lease_epoch=1,
    )  # fmt: skip
    return LeaseGranted(
        node=node, at_s=T0, proposal_id="p", leases=(lease,), replicas=(_proposal(model, replica, tenant),)
    )


def joined(*, node: str = "n", holder_url: str = "http://holder") -> Fact:
    return NodeJoined(
        node=node, at_s=T0, machine_id="x", gpus=(), host_budget_bytes=0, holder_url=holder_url, label="software GPU"
    )


def starting(model: str = "m", replica: str = "r", *, node: str = "n", epoch: int = 0, at_s: float = T0) -> Fact:
    return ReplicaStarting(
        node=node, at_s=at_s, replica_id=replica, deployment_id=f"d-{model}", model=model, wake_epoch=epoch
    )


def ready(
    model: str = "m", replica: str = "r", *, node: str = "n", endpoint: str = "http://e", start_s: float = 10.0
) -> Fact:
    one = Ready(
        replica_id=replica, deployment_id=f"d-{model}", model=model, endpoint=endpoint, wake_epoch=0, start_s=start_s,
        enforced_bytes=10,
    )  # fmt: skip
    return ReplicaReady(node=node, at_s=T0, replicas=(one,))


def draining(model: str = "m", replica: str = "r", *, node: str = "n") -> Fact:
    return ReplicaDraining(
        node=node, at_s=T0, replica_id=replica, deployment_id=f"d-{model}", model=model, reason="room"
    )


def parked(model: str = "m", replica: str = "r", *, node: str = "n", epoch: int = 1) -> Fact:
    return ReplicaParked(
        node=node, at_s=T0, replica_id=replica, deployment_id=f"d-{model}", model=model, wake_epoch=epoch,
        residue_bytes=1, host_bytes=9, copied_bytes=0, park_s=0.1, drain_s=0.0, reason="idle",
    )  # fmt: skip


def waking(model: str = "m", replica: str = "r", *, node: str = "n", epoch: int = 1, at_s: float = T0) -> Fact:
    return ReplicaWaking(
        node=node, at_s=at_s, replica_id=replica, deployment_id=f"d-{model}", model=model, wake_epoch=epoch
    )


def resident(
    model: str = "m",
    replica: str = "r",
    *,
    node: str = "n",
    epoch: int = 1,
    wake_s: float = 1.0,
    endpoint: str = "http://e",
) -> Fact:
    return ReplicaResident(
        node=node, at_s=T0, replica_id=replica, deployment_id=f"d-{model}", model=model, wake_epoch=epoch,
        endpoint=endpoint, copied_bytes=9, reserve_s=0.1, restore_s=0.5, verify_s=0.1, wake_s=wake_s,
    )  # fmt: skip


def failed(model: str = "m", replica: str = "r", *, node: str = "n", is_final: bool = False, epoch: int = 2) -> Fact:
    return ReplicaFailed(
        node=node, at_s=T0, replica_id=replica, deployment_id=f"d-{model}", model=model, reason="it crashed",
        attempt_count=1, is_final=is_final, wake_epoch=epoch,
    )  # fmt: skip


def released(replica: str = "r", *, node: str = "n") -> Fact:
    return LeaseReleased(node=node, at_s=T0, replica_id=replica, reason="")


def lease_of(version: int, *open_ids: str, closed: tuple[str, ...] = (), term_s: float = 1.0) -> RouteLease:
    return RouteLease(version=version, open_ids=open_ids, closed_ids=closed, term_s=term_s)


class Story:
    """A core with a clock of its own, told step by step. Every step gives what the core asked for."""

    def __init__(self, **settings: float) -> None:
        self.now_s = T0
        self.settings = GatewaySettings(**{"sample_every_s": 1e6, "ramp_first_count": 1, **settings})  # type: ignore[arg-type]
        self.core = Gateway(self.settings, gateway_id="g", now_s=T0)
        self.actions: list[object] = []
        self._count = 0
        self._version = 0

    def tell(self, *facts: Fact) -> None:
        for fact in facts:
            self._note(self.core.fact(fact, now_s=self.now_s))

    def open(self, *open_ids: str, node: str = "n", closed: tuple[str, ...] = (), term_s: float = 1e6) -> None:
        """The holder grants a lease under which exactly these replicas are open."""
        self._version += 1
        lease = lease_of(self._version, *open_ids, closed=closed, term_s=term_s)
        self._note(self.core.lease(node, lease, sent_s=self.now_s, now_s=self.now_s))

    def arrive(self, model: str = "m", *, tenant: str = "acme", size: int = 1, patience_s: float | None = None) -> str:
        self._count += 1
        request_id = f"q{self._count}"
        self._note(
            self.core.arrive(
                request_id, tenant=tenant, model=model, body_bytes=size, patience_s=patience_s, now_s=self.now_s
            )
        )
        return request_id

    def pass_time(self, seconds: float) -> None:
        """Let everything that becomes due happen at its time."""
        end_s = self.now_s + seconds
        while (due_s := self.core.next_due_s()) is not None and due_s <= end_s:
            self.now_s = max(self.now_s, due_s)
            self._note(self.core.tick(now_s=self.now_s))
        self.now_s = end_s

    def _note(self, actions: object) -> None:
        assert isinstance(actions, list)
        self.actions += actions

    def note(self, actions: object) -> None:
        self._note(actions)

    def dispatched(self) -> list[tuple[str, str]]:
        """(request, replica) so far, in order."""
        return [(a.request_id, a.replica_id) for a in self.actions if isinstance(a, Dispatch)]

    def refused(self) -> dict[str, tuple[int, str]]:
        """{request: (status, code)} so far."""
        return {a.request_id: (a.refusal.status, a.refusal.code) for a in self.actions if isinstance(a, Refuse)}

    def signals(self, kind: type) -> list[object]:
        return [a.signal for a in self.actions if isinstance(a, Publish) and isinstance(a.signal, kind)]


def parked_story(**settings: float) -> Story:
    """One model, parked at epoch 1, with nothing said about how long it takes to return."""
    story = Story(**settings)
    story.tell(joined(), admitted(), proposed(), granted(), ready(), parked())
    story.open(closed=("r",))
    story.actions.clear()
    return story


def resident_story(**settings: float) -> Story:
    story = Story(**settings)
    story.tell(joined(), admitted(), proposed(), granted(), ready())
    story.open("r")
    story.actions.clear()
    return story

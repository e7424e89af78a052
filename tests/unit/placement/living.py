"""Placement's core with nodes that grant, start and release at once, and with its timers: a fleet that lives on."""

import heapq
from collections.abc import Iterable
from itertools import count
from typing import Any

from kit.outcomes import Context, Outcome, Timer
from schemas.autoscaler import ReplicasDecided
from schemas.catalogue import decode, encode
from schemas.deployments import DeploymentSpec
from schemas.inbox import DeployRequested, QuotaRequested, RetireRequested
from schemas.messages import Fact
from schemas.nodes import Lease, LeaseGranted, LeaseReleased, NodeJoined, Ready, ReplicaReady
from schemas.placement import PlacementProposed, PreemptionDecided, ReleaseProposed
from schemas.units import GiB
from services.placement.core import SERVICE
from services.placement.settings import PlacementSettings
from services.placement.state import ClusterState
from tests.unit.placement.builders import gpu
from tests.unit.placement.crowds import GPU_GIB, RESIDUE_GIB

LEAVE_S = 3.0
"""How long a replica takes to leave."""
START_S = 1.0


class Living:
    """Inputs are handled in the order of their times."""

    def __init__(self, **settings: Any) -> None:
        known = PlacementSettings(**{"residue_bytes": RESIDUE_GIB * GiB, **settings})
        self.state: ClusterState = SERVICE.new_state(known)
        self.now_s = 0.0
        self.facts: list[Fact] = []
        self._due: list[tuple[float, int, str, Any]] = []
        self._number = count(1)
        self._tell(SERVICE.on_start(self.state, self._ctx("")))

    def _ctx(self, tenant: str) -> Context:
        return Context(now_s=self.now_s, writer_epoch=1, cause_seq=next(self._number), tenant=tenant)

    def at(self, due_s: float, item: Any, *, tenant: str = "default") -> None:
        heapq.heappush(self._due, (due_s, next(self._number), tenant, item))

    def now(self, item: Any, *, tenant: str = "default") -> None:
        self.at(self.now_s, item, tenant=tenant)

    def run_until(self, end_s: float) -> None:
        while self._due and self._due[0][0] <= end_s:
            self.now_s, _, tenant, item = heapq.heappop(self._due)
            if isinstance(item, Fact):
                SERVICE.evolve(self.state, item)
            handler = SERVICE.handlers.get(type(item))
            if handler is not None:
                self._tell(handler(self.state, item, self._ctx(tenant)))
            SERVICE.check_invariants(self.state)
        self.now_s = end_s

    def run_for(self, duration_s: float) -> None:
        self.run_until(self.now_s + duration_s)

    def _tell(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Timer):
                self.at(outcome.due_s, outcome.input)
            elif isinstance(outcome, Fact):
                fact = decode(encode(outcome))
                assert isinstance(fact, Fact)
                SERVICE.evolve(self.state, fact)
                self.facts.append(fact)
                self._answer(fact)

    def _answer(self, fact: Fact) -> None:
        """As nodes do that have all the room that they told of."""
        if isinstance(fact, PlacementProposed):
            self.check_room(fact)
            leases = tuple(
                Lease(
                    replica_id=replica.replica_id,
                    shard_index=share.shard_index,
                    gpu_uuid=share.gpu_uuid,
                    request_bytes=share.request_bytes,
                    granted_bytes=share.request_bytes,
                    limit_bytes=share.limit_bytes,
                    residue_bytes=min(RESIDUE_GIB * GiB, share.request_bytes),
                    lease_epoch=1,
                )
                for replica in fact.replicas
                for share in replica.shares
            )
            granted = LeaseGranted(
                node=fact.node,
                at_s=self.now_s,
                proposal_id=fact.proposal_id,
                leases=leases,
                replicas=fact.replicas,
                gang_id=fact.gang_id,
                gang_hold_s=fact.gang_hold_s,
            )
            self.now(granted)
            for replica in fact.replicas:
                ready = Ready(
                    replica_id=replica.replica_id,
                    deployment_id=replica.deployment_id,
                    model=replica.deployment.name,
                    endpoint="http://x",
                    wake_epoch=1,
                    start_s=START_S,
                    enforced_bytes=replica.shares[0].request_bytes,
                )
                at_s = self.now_s + START_S
                self.at(at_s, ReplicaReady(node=fact.node, at_s=at_s, replicas=(ready,)))
        elif isinstance(fact, ReleaseProposed):
            at_s = self.now_s + LEAVE_S
            self.at(at_s, LeaseReleased(node=fact.node, at_s=at_s, replica_id=fact.replica_id, reason="stopped"))

    def check_room(self, fact: PlacementProposed) -> None:
        """What a node would refuse: guarantees that do not fit."""
        for uuid in {share.gpu_uuid for replica in fact.replicas for share in replica.shares}:
            here = self.state.on_gpu(uuid)
            rests = [r.residue_on(uuid) if r.is_parkable else r.request_on(uuid) for r in here]
            returns = [r.request_on(uuid) - rest for r, rest in zip(here, rests, strict=True)]
            assert sum(rests) + max(returns, default=0) <= GPU_GIB * GiB, f"{uuid} is promised more than it has"

    # --- Inputs -------------------------------------------------------------------------------------------------------

    def join(self, node: str, gpu_count: int = 1) -> None:
        gpus = tuple(gpu(f"{node}-gpu-{index}", allocatable_gib=GPU_GIB) for index in range(gpu_count))
        self.now(
            NodeJoined(
                node=node,
                at_s=self.now_s,
                machine_id=node,
                gpus=gpus,
                host_budget_bytes=10_000 * GiB,
                holder_url="",
                label="software GPU",
            )
        )

    def deploy(self, spec: DeploymentSpec, *, tenant: str = "default") -> None:
        self.now(DeployRequested(command_id=f"x{next(self._number)}", deployment=spec), tenant=tenant)

    def retire(self, model: str, *, tenant: str = "default") -> None:
        self.now(RetireRequested(command_id=f"x{next(self._number)}", model=model), tenant=tenant)

    def quota(self, tenant: str, gpus: float | None, weight: float = 1.0) -> None:
        command = QuotaRequested(
            command_id=f"x{next(self._number)}", quota_tenant=tenant, gpu_quota=gpus, over_quota_weight=weight
        )
        self.now(command)

    def scale(self, model: str, replica_count: int, *, tenant: str = "default") -> None:
        deployment = self.state.named(tenant, model)
        assert deployment is not None
        decided = ReplicasDecided(
            at_s=self.now_s,
            deployment_id=deployment.deployment_id,
            model=model,
            replica_count=replica_count,
            reason="the test says so",
        )
        self.now(decided)

    # --- What came of it ----------------------------------------------------------------------------------------------

    def placed(self) -> list[str]:
        """Models with a replica that stays, each once for every replica."""
        return sorted(
            self.state.deployments[r.deployment_id].spec.name
            for r in self.state.replicas.values()
            if not r.is_releasing and r.deployment_id in self.state.deployments
        )

    def preemptions(self) -> list[tuple[str, list[str]]]:
        """(newcomer, models that gave way)"""
        decided = [fact for fact in self.facts if isinstance(fact, PreemptionDecided)]
        return [(fact.model, [victim.model for victim in fact.victims]) for fact in decided]

    def told(self, kind: type[Fact]) -> list[Fact]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

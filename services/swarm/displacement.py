"""Rules about who gives his place to whom, from facts alone.

Each decision is judged by what placement had read when it made it (the cursor of its fact). Guarantees of those that
may be parked are counted whole, so that the rules about room hold for what never parks; who may go holds for all.
"""

from dataclasses import dataclass, field

from kit.bus import Stored
from schemas.deployments import DeploymentSpec
from schemas.messages import Fact
from schemas.nodes import LeaseRefused, LeaseReleased, NodeFact, NodeJoined, ReplicaFailed, ReplicaReady
from schemas.placement import (
    DeploymentAdmitted,
    GangAbandoned,
    PlacementFact,
    PlacementProposed,
    PreemptionDecided,
    PreemptionEnded,
    QuotaSet,
    ReleaseProposed,
    ReplicaProposal,
)


@dataclass(slots=True)
class _Held:
    proposal: ReplicaProposal
    ready_at_s: float | None = None
    is_leaving: bool = False

    @property
    def spec(self) -> DeploymentSpec:
        return self.proposal.deployment

    def on(self, gpu_uuid: str) -> int:
        return sum(share.request_bytes for share in self.proposal.shares if share.gpu_uuid == gpu_uuid)


@dataclass(slots=True)
class Displacement:
    """Hear every fact in the order of the stream; each rule raises at the fact that breaks it."""

    room_bytes: dict[str, int] = field(default_factory=dict)
    """{gpu_uuid: allocatable bytes}"""
    held: dict[str, _Held] = field(default_factory=dict)
    """{replica_id: who was proposed and has not ended}, as placement knew it at its latest fact"""
    wishes: dict[str, DeploymentAdmitted] = field(default_factory=dict)
    claims: dict[str, PreemptionDecided] = field(default_factory=dict)
    decided_count: int = 0
    has_quotas: bool = False
    _unread: list[tuple[int, NodeFact]] = field(default_factory=list)
    """Facts of nodes that placement may not have read yet."""

    def hear(self, stored: Stored, fact: Fact) -> None:
        if isinstance(fact, NodeFact):
            self._unread.append((stored.seq, fact))
            return
        if not isinstance(fact, PlacementFact):
            return
        while self._unread and self._unread[0][0] <= stored.cursor_seq:
            self._read(self._unread.pop(0)[1])
        match fact:
            case DeploymentAdmitted():
                self.wishes[fact.deployment_id] = fact
            case QuotaSet():
                self.has_quotas = True
            case PreemptionDecided():
                self._judge(fact)
                self.claims[fact.preemption_id] = fact
                self.decided_count += 1
            case PreemptionEnded():
                self.claims.pop(fact.preemption_id, None)
            case PlacementProposed():
                self._propose(fact)
            case ReleaseProposed():
                self._leave(fact.replica_id)
            case GangAbandoned():
                for replica_id in fact.replica_ids:
                    self._leave(replica_id)

    def _leave(self, replica_id: str) -> None:
        if replica_id in self.held:
            self.held[replica_id].is_leaving = True

    def _read(self, fact: NodeFact) -> None:
        match fact:
            case NodeJoined():
                self.room_bytes.update({gpu.gpu_uuid: gpu.allocatable_bytes for gpu in fact.gpus})
            case LeaseReleased():
                self.held.pop(fact.replica_id, None)
            case ReplicaFailed() if fact.is_final:
                self.held.pop(fact.replica_id, None)
            case LeaseRefused():
                for replica_id in fact.replica_ids:
                    self.held.pop(replica_id, None)
            case ReplicaReady():
                for ready in fact.replicas:
                    held = self.held.get(ready.replica_id)
                    if held is not None and held.ready_at_s is None:
                        held.ready_at_s = fact.at_s

    # --- Rules --------------------------------------------------------------------------------------------------------

    def _judge(self, fact: PreemptionDecided) -> None:
        """Whether these may go for that one, and are all needed."""
        wish = self.wishes[fact.deployment_id]
        priority = wish.deployment.priority_number
        waited_s = fact.at_s - wish.at_s
        delay_s = wish.deployment.placement.preemption_delay_s
        assert waited_s >= delay_s, f"{fact.model} displaces after {waited_s:.1f} s and not {delay_s:g}"
        victims = {victim.replica_id: self.held[victim.replica_id] for victim in fact.victims}
        for replica_id, victim in victims.items():
            spec = victim.spec
            assert spec.may_be_preempted, f"{replica_id} is not preemptible and gives way to {fact.model}"
            is_equal = spec.priority_number == priority and self.has_quotas and victim.proposal.tenant != wish.tenant
            is_lower = spec.priority_number < priority
            assert is_lower or is_equal, f"{replica_id} ({spec.priority_number}) gives way to {fact.model} ({priority})"
            assert not victim.is_leaving, f"{replica_id} is on its way out and gives way to {fact.model} too"
            ran_s = fact.at_s - victim.ready_at_s if victim.ready_at_s is not None else 0.0
            admitted = self.wishes[victim.proposal.deployment_id].deployment
            runtime_s = admitted.placement.minimum_runtime_s
            assert victim.ready_at_s is None or ran_s >= runtime_s, f"{replica_id} ran {ran_s:.1f} s of {runtime_s:g}"
        if not self._is_plain(fact, victims):
            return
        assert self._fits(fact, victims), f"{fact.model} does not fit when its victims have left"
        for replica_id in victims:
            others = {key: held for key, held in victims.items() if key != replica_id}
            assert not self._fits(fact, others), f"{replica_id} gives way to {fact.model}, which fits without its end"

    def _is_plain(self, fact: PreemptionDecided, victims: dict[str, _Held]) -> bool:
        """Whether sums of requests decide: nobody there parks, and no gang ends as a whole."""
        here = [held for held in self.held.values() if any(held.on(uuid) for uuid in fact.gpu_uuids)]
        parks = any(held.spec.swap.is_parkable for held in here)
        gangs = any(held.spec.placement.is_gang for held in victims.values())
        return not (parks or gangs or self.wishes[fact.deployment_id].deployment.swap.is_parkable)

    def _fits(self, fact: PreemptionDecided, gone: dict[str, _Held]) -> bool:
        return all(
            self._promised(uuid, without=gone) + size_bytes <= self.room_bytes.get(uuid, 0)
            for uuid, size_bytes in zip(fact.gpu_uuids, fact.request_bytes, strict=True)
        )

    def _promised(self, gpu_uuid: str, *, without: dict[str, _Held]) -> int:
        """Requests of those who stay, and room that is kept for newcomers."""
        stays = sum(h.on(gpu_uuid) for key, h in self.held.items() if key not in without and not h.is_leaving)
        claimed = sum(
            size_bytes
            for claim in self.claims.values()
            for uuid, size_bytes in zip(claim.gpu_uuids, claim.request_bytes, strict=True)
            if uuid == gpu_uuid
        )
        return stays + claimed

    def _propose(self, fact: PlacementProposed) -> None:
        """Nobody but its newcomer goes into room that is kept."""
        for replica in fact.replicas:
            own = [key for key, claim in self.claims.items() if claim.replica_id == replica.replica_id]
            for key in own:
                del self.claims[key]
            self.held[replica.replica_id] = _Held(replica)
            if own or replica.deployment.swap.is_parkable:
                continue
            for share in replica.shares:
                claims = [c for c in self.claims.values() if share.gpu_uuid in c.gpu_uuids]
                here = [held for held in self.held.values() if held.on(share.gpu_uuid)]
                if not claims or any(held.spec.swap.is_parkable for held in here):
                    continue
                over = self._promised(share.gpu_uuid, without={}) - self.room_bytes.get(share.gpu_uuid, 0)
                assert over <= 0, f"{replica.replica_id} takes {over} bytes that are kept for {claims[0].replica_id}"

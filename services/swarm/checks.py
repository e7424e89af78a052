"""What must hold at any instant of a run, from facts alone, and what must hold when all is healed.

The rules are written anew here: what a service believes of itself does not count.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kit.bus import Stored
from schemas.catalogue import decode
from schemas.deployments import DeploymentSpec, WorkloadKind
from schemas.messages import Fact
from schemas.nodes import (
    GpuOffer,
    LeaseGranted,
    LeaseReleased,
    LeaseResized,
    NodeJoined,
    ParkAbandoned,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaWaking,
    ResizeReason,
    WakeRefused,
)
from schemas.placement import CommandFact, DeploymentAdmitted, DeploymentRetired
from schemas.swapper import ParkDecided, WakeDecided
from services.nodeagent.state import NodeState
from services.nodeagent.transitions import Residency
from services.placement.state import ClusterState
from services.simulated import SimulatedSystem
from services.swapper.state import FleetState

SETTLED: Final = {Residency.GRANTED, Residency.RESIDENT, Residency.PARKED, Residency.FAILED}


Amounts = dict[str, int]
"""{gpu_uuid: bytes}"""


@dataclass(slots=True)
class Books:
    """An account of every GPU; after each fact the sum of its GPU is compared with what the GPU has."""

    gpus: dict[str, GpuOffer] = field(default_factory=dict)
    share: dict[str, Amounts] = field(default_factory=dict)
    """{replica_id: what it holds on each of its GPUs while it is resident}, by shard; so for the next ones."""
    request: dict[str, Amounts] = field(default_factory=dict)
    limit: dict[str, Amounts] = field(default_factory=dict)
    residue: dict[str, Amounts] = field(default_factory=dict)
    held: dict[str, Amounts] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    """{gpu_uuid: bytes}"""

    def hear(self, fact: Fact) -> None:
        match fact:
            case NodeJoined():
                self.gpus.update({gpu.gpu_uuid: gpu for gpu in fact.gpus})
            case LeaseGranted():
                for replica in fact.replicas:
                    name = replica.replica_id
                    leases = [lease for lease in fact.leases if lease.replica_id == name]
                    self.share[name] = {lease.gpu_uuid: lease.granted_bytes for lease in leases}
                    self.request[name] = {lease.gpu_uuid: lease.request_bytes for lease in leases}
                    self.limit[name] = {lease.gpu_uuid: lease.limit_bytes for lease in leases}
                    assert self.share[name] == self.request[name], f"it begins with more than its request: {fact}"
                    self.residue[name] = {lease.gpu_uuid: lease.residue_bytes for lease in leases}
                    self._hold(name, {}, fact)
            case LeaseResized():
                self._resize(fact)
            case ReplicaStarting() | ReplicaResident() | ParkAbandoned() | ReplicaWaking(is_reserved=True):
                self._hold(fact.replica_id, self.share[fact.replica_id], fact)
            case ReplicaParked():
                self.share[fact.replica_id] = self.request[fact.replica_id]
                gpu_uuids = list(self.share[fact.replica_id])
                self.residue[fact.replica_id] = dict(zip(gpu_uuids, fact.residues(len(gpu_uuids)), strict=True))
                self._hold(fact.replica_id, self.residue[fact.replica_id], fact)
            case WakeRefused() if self.held[fact.replica_id]:
                self._hold(fact.replica_id, self.residue[fact.replica_id], fact)
            case ReplicaFailed() | LeaseReleased():
                self.share[fact.replica_id] = self.request[fact.replica_id]
                self._hold(fact.replica_id, {}, fact)

    def _resize(self, fact: LeaseResized) -> None:
        """Between its request and its limit, and only what is resident changes its size."""
        name = fact.replica_id
        granted = dict(zip(self.share[name], fact.granted_bytes, strict=True))
        for gpu_uuid, size in granted.items():
            least_bytes, most_bytes = self.request[name][gpu_uuid], self.limit[name][gpu_uuid]
            assert least_bytes <= size <= max(least_bytes, most_bytes), f"{name} is not between its bounds: {fact}"
            grows = size > self.share[name][gpu_uuid]
            assert grows == (fact.reason is ResizeReason.BURST), f"{name} has {self.share[name]} before {fact}"
        assert self.held[name] == self.share[name], f"{name} is resized while it is not resident: {fact}"
        self.share[name] = granted
        self._hold(name, granted, fact)

    def _hold(self, name: str, amounts: Amounts, fact: Fact) -> None:
        before = self.held.get(name, {})
        self.held[name] = amounts
        for gpu_uuid in self.share[name]:
            change_bytes = amounts.get(gpu_uuid, 0) - before.get(gpu_uuid, 0)
            self.sums[gpu_uuid] = held_bytes = self.sums.get(gpu_uuid, 0) + change_bytes
            gpu = self.gpus[gpu_uuid]
            assert held_bytes + gpu.reserve_bytes <= gpu.capacity_bytes, f"{gpu_uuid}: leases exceed it after {fact}"


@dataclass(slots=True)
class Conduct:
    """Rules about decisions: each is judged by what its writer had read."""

    load_fresh_s: float
    specs: dict[str, DeploymentSpec] = field(default_factory=dict)
    resident_seqs: dict[str, list[int]] = field(default_factory=dict)
    resident_times_s: dict[str, list[float]] = field(default_factory=dict)
    wake_epochs: dict[str, int] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)
    heard_load_at_s: float = 0.0

    def hear(self, stored: Stored, fact: Fact) -> None:
        epoch = getattr(fact, "wake_epoch", None)
        match fact:
            case LeaseGranted():
                assert fact.proposal_id not in self.granted, f"{fact.proposal_id} was granted twice"
                self.granted.add(fact.proposal_id)
                self.specs.update({r.replica_id: r.deployment for r in fact.replicas})
            case ReplicaReady():
                for ready in fact.replicas:
                    self._resident(ready.replica_id, stored.seq, min(fact.at_s, stored.time_s))
            case ReplicaResident() | ParkAbandoned():
                self._resident(fact.replica_id, stored.seq, min(fact.at_s, stored.time_s))
            case WakeDecided():
                for victim_id in fact.victim_ids:
                    self._may_give_way(victim_id, fact, cursor_seq=stored.cursor_seq)
                return
            case ParkDecided():
                if fact.reason.startswith("idle"):
                    silent_s = fact.at_s - self.heard_load_at_s
                    assert silent_s <= self.load_fresh_s, f"parked as idle, unheard for {silent_s:.1f} s: {fact}"
                return
        if epoch is not None and not isinstance(fact, ReplicaReady) and stored.subject.startswith("sublet.fact.node."):
            replica_id: str = fact.replica_id  # type: ignore[attr-defined]  # Every node fact with a wake epoch has it.
            assert epoch >= self.wake_epochs.get(replica_id, 0), f"the wake epoch went back: {fact}"
            self.wake_epochs[replica_id] = epoch

    def _resident(self, replica_id: str, seq: int, at_s: float) -> None:
        self.resident_seqs.setdefault(replica_id, []).append(seq)
        self.resident_times_s.setdefault(replica_id, []).append(at_s)

    def _may_give_way(self, victim_id: str, wake: WakeDecided, *, cursor_seq: int) -> None:
        victim, comer = self.specs[victim_id], self.specs[wake.replica_id]
        assert victim.swap.is_parkable, f"{victim_id} may not be parked: {wake}"
        assert comer.kind is not WorkloadKind.TRAINING or wake.reason.startswith("asked"), f"training preempts: {wake}"
        if victim.kind is WorkloadKind.TRAINING and victim.priority_number < comer.priority_number:
            return
        place = bisect_right(self.resident_seqs.get(victim_id, []), cursor_seq)
        since_s = self.resident_times_s[victim_id][place - 1] if place else 0.0
        stays_s, shortest_s = wake.at_s - since_s, victim.swap.minimum_residency_s
        assert stays_s >= shortest_s, f"{victim_id} gave way after {stays_s:.2f} s of {shortest_s} s: {wake}"


def facts_of(system: SimulatedSystem) -> list[Fact]:
    facts = [decode(stored.body) for stored in system.simulation.stream]
    return [fact for fact in facts if isinstance(fact, Fact)]


def placement_of(system: SimulatedSystem) -> ClusterState:
    state = system.state("placement")
    assert isinstance(state, ClusterState), state
    return state


def disagreement(system: SimulatedSystem) -> str:
    """Who does not run, or where services and engines tell different stories; empty when they tell one."""
    down = [writer for writer in system.simulation.holders if not system.simulation.active(writer).is_active]
    down += [gateway.name for gateway in system.gateways if not gateway.is_alive]
    if down:
        return f"not running: {', '.join(down)}"
    placement, swapper = placement_of(system), system.state("swapper")
    assert isinstance(swapper, FleetState), swapper
    truth: dict[str, tuple[str, Any]] = {}
    for node in system.hosts:
        state = system.state(f"node.{node}")
        assert isinstance(state, NodeState), state
        truth.update({name: (node, replica) for name, replica in state.replicas.items()})
        if state.gpus.keys() != {gpu.gpu_uuid for gpu in system.hosts[node].gpus}:
            return f"{node} offers {sorted(state.gpus)}, which is not what it has"
    for knower, known in (("placement", placement.replicas), ("swapper", swapper.replicas)):
        if set(truth) != set(known):
            return f"agents and {knower} know other replicas: {sorted(set(truth) ^ set(known))}"
    for name, (node, replica) in truth.items():
        if replica.residency not in SETTLED:
            return f"{name} is still {replica.residency}"
        told = (placement.replicas[name].state, swapper.replicas[name].tier.value)
        if told != (replica.residency.value, replica.residency.value):
            return f"{name} is {replica.residency}; placement and swapper say {told}"
        epochs = (placement.replicas[name].wake_epoch, swapper.replicas[name].wake_epoch)
        if epochs != (replica.wake_epoch, replica.wake_epoch):
            return f"{name} has wake epoch {replica.wake_epoch}; placement and swapper say {epochs}"
        if replica.residue_bytes != swapper.replicas[name].residue_bytes:
            return f"{name} keeps {replica.residue_bytes} bytes; the swapper says otherwise"
        if replica.is_started != (name in system.hosts[node].engines):
            return f"{name} has an engine: {not replica.is_started}; its agent says otherwise"
    return _strangers(system, truth) or _miscounted(placement)


def _miscounted(placement: ClusterState) -> str:
    """A deployment that has neither as many replicas as it shall have nor a word about why."""
    for deployment_id, deployment in placement.deployments.items():
        count = len(placement.replicas_of(deployment_id))
        if count != deployment.replica_count and not deployment.problem:
            return f"{deployment.spec.name} has {count} of {deployment.replica_count} replicas"
    return ""


def _strangers(system: SimulatedSystem, truth: Mapping[str, Any]) -> str:
    strangers = [name for host in system.hosts.values() for name in host.engines if name not in truth]
    return f"engines without a lease: {strangers}" if strangers else ""


def check_ends(system: SimulatedSystem) -> None:
    """Nothing is silent: deployments, commands, requests, facts."""
    placement, facts = placement_of(system), facts_of(system)
    retired = {fact.deployment_id for fact in facts if isinstance(fact, DeploymentRetired)}
    for fact in facts:
        if isinstance(fact, DeploymentAdmitted) and fact.deployment_id not in retired:
            deployment = placement.deployments[fact.deployment_id]
            placed_count = len(placement.replicas_of(fact.deployment_id))
            moving_count = sum(move.deployment_id == fact.deployment_id for move in placement.moves.values())
            is_placed = placed_count - moving_count <= deployment.replica_count <= placed_count
            wished = f"{placed_count} of {deployment.replica_count} replicas"
            assert is_placed or deployment.problem, f"{deployment.spec.name} ended in silence with {wished}"
    named = [fact.inbox_seq for fact in facts if isinstance(fact, CommandFact)]
    everyone = [stored.seq for stored in system.simulation.inbox]
    assert everyone == sorted(set(named)), "a command led to no fact"
    answered = [reply.answer.inbox_seq for reply in system.simulation.replies]
    assert len(answered) == len(set(answered)), "a command was answered twice"
    ids = [stored.id for stored in system.simulation.stream]
    assert len(ids) == len(set(ids)), "a fact was stored twice"
    open_asks = [ask for ask in system.asks if ask.ended_s is None]
    assert not open_asks, f"{len(open_asks)} requests have no end, the first is {open_asks[0]}"
    for member in system.simulation.members.values():
        skipped = member.processor.skipped_count if member.processor is not None else 0
        assert skipped == 0, f"{member.name} skipped {skipped} facts"


def is_answerable(system: SimulatedSystem, model: str) -> bool:
    """Whether a request to it must be answered now: inference that is placed and did not fail for good."""
    placement = placement_of(system)
    deployment = placement.named("default", model)
    if deployment is None or deployment.problem or deployment.spec.kind is not WorkloadKind.INFERENCE:
        return False
    return all(replica.state != "failed" for replica in placement.replicas_of(deployment.deployment_id))


def signature(error: BaseException) -> str:
    """Names a failure, whatever its numbers: the same defect in a smaller run has the same one."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    words = re.sub(r"[0-9][0-9.]*", "#", str(error).split("\n", 1)[0])
    words = re.sub(r"\(.*|: [A-Z]\w+.*", "", words)
    return f"{type(error).__name__} in {trace.tb_frame.f_code.co_name}: {words[:80]}"

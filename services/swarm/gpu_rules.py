"""Rules about GPUs that misbehave, get lost or have strangers on them, from facts alone.

A node's facts are judged in their order, placement's by what it had read when it decided (the cursor of its fact).
"""

from dataclasses import dataclass, field
from typing import Final

from kit.bus import Stored
from schemas.messages import Fact
from schemas.nodes import (
    GpuObserved,
    GpuOffer,
    GpuQuarantined,
    GpuReinstated,
    LeaseGranted,
    LeaseReleased,
    NodeJoined,
    ReplicaStarting,
    ReplicaWaking,
)
from schemas.placement import PlacementProposed
from services.simulated import SimulatedSystem
from services.swarm.checks import Books

TRIAL_S: Final = 120.0
"""After a quarantine's time: a look, a trial, and a silence of the driver between them."""


@dataclass(slots=True)
class _Closed:
    """One quarantine that has not ended."""

    seq: int
    told: GpuQuarantined


@dataclass(slots=True)
class GpuRules:
    """Hear every fact in the order of the stream, after the books; each rule raises at the fact that breaks it."""

    books: Books
    offers: dict[str, dict[str, GpuOffer]] = field(default_factory=dict)
    """{node: {gpu_uuid: as it is offered now}}"""
    foreign_bytes: dict[str, int] = field(default_factory=dict)
    closed: dict[str, _Closed] = field(default_factory=dict)
    """{gpu_uuid: its quarantine}"""
    leased: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """{replica_id: (node, its GPUs)}, from grant to release"""
    quarantine_count: int = 0
    reinstated_count: int = 0
    foreign_count: int = 0

    def hear(self, stored: Stored, fact: Fact) -> None:
        match fact:
            case NodeJoined():
                self.offers[fact.node] = {gpu.gpu_uuid: gpu for gpu in fact.gpus}
                self.foreign_bytes.update({gpu.gpu_uuid: gpu.foreign_bytes for gpu in fact.gpus})
            case GpuObserved():
                self.foreign_bytes[fact.gpu_uuid] = fact.foreign_bytes
                self.foreign_count += 1
            case GpuQuarantined():
                self._judge_quarantine(stored.seq, fact)
            case GpuReinstated():
                assert fact.gpu_uuid in self.closed, f"was not quarantined: {fact}"
                del self.closed[fact.gpu_uuid]
                self.reinstated_count += 1
            case LeaseGranted():
                self._judge_grant(fact)
            case LeaseReleased():
                self.leased.pop(fact.replica_id, None)
            case ReplicaStarting() | ReplicaWaking(is_reserved=True):
                self._judge_room(fact)
            case PlacementProposed():
                self._judge_proposal(fact, stored.cursor_seq)

    # --- Each a sentence ----------------------------------------------------------------------------------------------

    def _judge_quarantine(self, seq: int, fact: GpuQuarantined) -> None:
        """Each quarantine of a GPU lasts at least as long as the one before it, until one lasts for good."""
        before = self.closed.get(fact.gpu_uuid)
        if before is not None:
            assert fact.fault_count > before.told.fault_count, f"quarantined again and not for longer: {fact}"
            is_longer = not fact.quarantine_s or fact.quarantine_s >= before.told.quarantine_s > 0
            assert is_longer, f"quarantined for less than before: {fact}"
        self.closed[fact.gpu_uuid] = _Closed(before.seq if before is not None else seq, fact)
        self.quarantine_count += 1

    def _judge_grant(self, fact: LeaseGranted) -> None:
        """Nothing is granted on a GPU that is quarantined, or not offered."""
        for replica in fact.replicas:
            gpu_uuids = tuple(share.gpu_uuid for share in replica.shares)
            self.leased[replica.replica_id] = (fact.node, gpu_uuids)
            for gpu_uuid in gpu_uuids:
                assert gpu_uuid not in self.closed, f"{gpu_uuid} is quarantined, and granted: {fact}"
                assert gpu_uuid in self.offers[fact.node], f"{gpu_uuid} is away, and granted: {fact}"

    def _judge_room(self, fact: ReplicaStarting | ReplicaWaking) -> None:
        """What begins to hold its share fits beside all that is held and all that strangers use."""
        for gpu_uuid in self.books.share[fact.replica_id]:
            gpu = self.books.gpus[gpu_uuid]
            taken_bytes = self.books.sums[gpu_uuid] + gpu.reserve_bytes + self.foreign_bytes.get(gpu_uuid, 0)
            assert taken_bytes <= gpu.capacity_bytes, f"{gpu_uuid}: no room beside strangers for {fact}"

    def _judge_proposal(self, fact: PlacementProposed, cursor_seq: int) -> None:
        """Nothing is proposed to a GPU whose quarantine placement had read of."""
        for replica in fact.replicas:
            for share in replica.shares:
                closed = self.closed.get(share.gpu_uuid)
                is_read = closed is not None and closed.seq <= cursor_seq
                assert not is_read, f"{share.gpu_uuid} is quarantined, and proposed: {fact}"

    # --- At the end ---------------------------------------------------------------------------------------------------

    def check_ends(self, system: SimulatedSystem) -> None:
        """All GPUs that are there are offered, and no lease names one that is away."""
        for node, host in system.hosts.items():
            here = {gpu.gpu_uuid for gpu in host.gpus}
            assert here == self.offers[node].keys(), f"{node} has {sorted(here)} and offers others"
        for replica_id, (node, gpu_uuids) in self.leased.items():
            assert set(gpu_uuids) <= self.offers[node].keys(), f"{replica_id} holds a lease on a GPU that is away"

    def check_quarantines_end(self, *, now_s: float) -> None:
        """In time; for runs in which clocks are not set."""
        for gpu_uuid, closed in self.closed.items():
            late_s = now_s - closed.told.at_s - closed.told.quarantine_s
            assert not closed.told.quarantine_s or late_s <= TRIAL_S, f"{gpu_uuid} is still closed: {closed.told}"

"""What gangs may expect, from facts alone: no part of one runs before all of it may, and none is held for ever."""

from collections import defaultdict
from dataclasses import dataclass, field

from kit.bus import Stored
from schemas.messages import Fact
from schemas.nodes import LeaseGranted, LeaseReleased, ReplicaStarting
from schemas.placement import (
    GangAbandoned,
    GangCommitted,
    NodeLost,
    NodeReturned,
    PlacementProposed,
    ReleaseProposed,
    ReplicaProposal,
)


@dataclass(slots=True)
class Gangs:
    """Hear every fact in stream order; each rule raises at the fact that breaks it."""

    gang_of: dict[str, str] = field(default_factory=dict)
    """{replica_id: its gang}, as proposed."""
    members: dict[str, list[ReplicaProposal]] = field(default_factory=lambda: defaultdict(list))
    """{gang_id: all that was proposed for it}"""
    standing: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """{deployment_id: replicas that were granted and that nobody wished away}"""
    ended_at: dict[str, int] = field(default_factory=dict)
    """{replica_id: the sequence of its lease's end}"""
    lost: dict[str, set[str]] = field(default_factory=dict)
    """{node: those that stood there when it was lost}"""
    deployment_of: dict[str, str] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)
    """Replicas that ever had their lease."""
    committed: set[tuple[str, str]] = field(default_factory=set)
    """{(gang, node)}"""
    held_until_s: dict[str, float] = field(default_factory=dict)
    """{replica_id: when its held lease must have ended}"""

    def hear(self, fact: Fact, stored: Stored | None = None) -> None:
        """`stored` says when the stream took it, and what its writer had read; without it, of no end of a lease."""
        match fact:
            case PlacementProposed():
                self._proposed(fact)
            case LeaseGranted():
                self._granted(fact, at_s=fact.at_s if stored is None else stored.time_s)
            case GangCommitted():
                self._committed(fact, stored)
            case GangAbandoned():
                for replica_id in fact.replica_ids:
                    self._leave(replica_id)
                kept = [one for one in self.members[fact.gang_id] if one.replica_id not in fact.replica_ids]
                self.members[fact.gang_id] = kept
            case NodeLost():
                self.lost[fact.node] = {replica_id for replica_id in fact.replica_ids if self._leave(replica_id)}
            case NodeReturned():
                for replica_id in self.lost.pop(fact.node, ()):
                    self.standing[self.deployment_of[replica_id]].add(replica_id)
            case ReleaseProposed():
                self._leave(fact.replica_id)
            case LeaseReleased():
                self.held_until_s.pop(fact.replica_id, None)
                self.ended_at.setdefault(fact.replica_id, 0 if stored is None else stored.seq)
            case ReplicaStarting() if (gang_id := self.gang_of.get(fact.replica_id)) is not None:
                assert (gang_id, fact.node) in self.committed, f"a part of {gang_id} runs before its commit: {fact}"

    def _proposed(self, fact: PlacementProposed) -> None:
        self.deployment_of.update({replica.replica_id: replica.deployment_id for replica in fact.replicas})
        if fact.gang_id:
            self.gang_of.update({replica.replica_id: fact.gang_id for replica in fact.replicas})
            self.members[fact.gang_id] += fact.replicas

    def _granted(self, fact: LeaseGranted, *, at_s: float) -> None:
        for replica in fact.replicas:
            replica_id = replica.replica_id
            gang_id = self.gang_of.get(replica_id, "")
            assert gang_id == fact.gang_id, f"{replica_id} is of gang '{gang_id}', and was granted to '{fact.gang_id}'"
            self.granted.add(replica_id)
            self.standing[replica.deployment_id].add(replica_id)
            if gang_id:
                self.held_until_s[replica_id] = at_s + fact.gang_hold_s

    def _leave(self, replica_id: str) -> bool:
        """Whether it stood."""
        standing = self.standing[self.deployment_of.get(replica_id, "")]
        stood = replica_id in standing
        standing.discard(replica_id)
        return stood

    def _committed(self, fact: GangCommitted, stored: Stored | None) -> None:
        """All that was ever proposed of it is granted, and with it the deployment is complete: no part runs alone."""
        members = self.members[fact.gang_id]
        missing = sorted(replica.replica_id for replica in members if replica.replica_id not in self.granted)
        assert not missing, f"{fact.gang_id} is committed, and {missing} have no lease: {fact}"
        for replica in members:
            read_seq = -1 if stored is None else stored.cursor_seq
            there = self.standing[replica.deployment_id]
            there -= {name for name in there if self.ended_at.get(name, read_seq + 1) <= read_seq}
            wished_count = replica.deployment.replica_count
            assert len(there) >= wished_count, f"{fact.gang_id} starts with {len(there)} of {wished_count}: {fact}"
        self.committed.add((fact.gang_id, fact.node))
        for replica_id in fact.replica_ids:
            self.held_until_s.pop(replica_id, None)

    def check_ended(self, now_s: float) -> None:
        """No lease is held beyond its time; to be asked when every node has had its turn."""
        late = sorted(replica_id for replica_id, until_s in self.held_until_s.items() if until_s < now_s)
        assert not late, f"held beyond their time: {late}"

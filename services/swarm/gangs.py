"""What gangs may expect, from facts alone: no part of one runs before all of it may, and none is held for ever."""

from dataclasses import dataclass, field

from schemas.messages import Fact
from schemas.nodes import LeaseGranted, LeaseReleased, ReplicaStarting
from schemas.placement import GangCommitted, PlacementProposed


@dataclass(slots=True)
class Gangs:
    """Hear every fact in stream order; each rule raises at the fact that breaks it."""

    gang_of: dict[str, str] = field(default_factory=dict)
    """{replica_id: its gang}, as proposed."""
    granted: set[str] = field(default_factory=set)
    """Replicas that ever had their lease."""
    committed: set[tuple[str, str]] = field(default_factory=set)
    """{(gang, node)}"""
    held_until_s: dict[str, float] = field(default_factory=dict)
    """{replica_id: when its held lease must have ended}"""

    def hear(self, fact: Fact, *, stored_s: float | None = None) -> None:
        """`stored_s`: when the stream took it, where its writer's clock may be wrong."""
        match fact:
            case PlacementProposed() if fact.gang_id:
                self.gang_of.update({replica.replica_id: fact.gang_id for replica in fact.replicas})
            case LeaseGranted():
                self._granted(fact, at_s=fact.at_s if stored_s is None else stored_s)
            case GangCommitted():
                self._committed(fact)
            case LeaseReleased():
                self.held_until_s.pop(fact.replica_id, None)
            case ReplicaStarting() if (gang_id := self.gang_of.get(fact.replica_id)) is not None:
                assert (gang_id, fact.node) in self.committed, f"a part of {gang_id} runs before its commit: {fact}"

    def _granted(self, fact: LeaseGranted, *, at_s: float) -> None:
        for replica in fact.replicas:
            replica_id = replica.replica_id
            gang_id = self.gang_of.get(replica_id, "")
            assert gang_id == fact.gang_id, f"{replica_id} is of gang '{gang_id}', and was granted to '{fact.gang_id}'"
            self.granted.add(replica_id)
            if gang_id:
                self.held_until_s[replica_id] = at_s + fact.gang_hold_s

    def _committed(self, fact: GangCommitted) -> None:
        """All that was ever proposed of it has been granted: else a part of it would run without the rest."""
        members = sorted(replica_id for replica_id, gang_id in self.gang_of.items() if gang_id == fact.gang_id)
        missing = [replica_id for replica_id in members if replica_id not in self.granted]
        assert not missing, f"{fact.gang_id} is committed, and {missing} have no lease: {fact}"
        self.committed.add((fact.gang_id, fact.node))
        for replica_id in fact.replica_ids:
            self.held_until_s.pop(replica_id, None)

    def check_ended(self, now_s: float) -> None:
        """No lease is held beyond its time; to be asked when every node has had its turn."""
        late = sorted(replica_id for replica_id, until_s in self.held_until_s.items() if until_s < now_s)
        assert not late, f"held beyond their time: {late}"

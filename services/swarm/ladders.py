"""Rules about borrowers that must give back, from facts alone: each in the order of the stream of its node."""

from dataclasses import dataclass, field
from typing import Final

from schemas.deployments import SwapDriver
from schemas.messages import Fact
from schemas.nodes import (
    GaveBack,
    GiveBackAsked,
    GiveBackStep,
    LeaseGranted,
    LeaseReleased,
    LeaseResized,
    NodeFact,
    ReplicaFailed,
    ReplicaParked,
    ReplicaStarting,
    ReplicaWaking,
    ResizeReason,
)

ORDER: Final = (
    GiveBackStep.FREEZE,
    GiveBackStep.SHRINK,
    GiveBackStep.PARK,
    GiveBackStep.CHECKPOINT,
    GiveBackStep.STOP,
)


@dataclass(slots=True)
class Ladders:
    """Hear every fact in the order of the stream; each rule raises at the fact that breaks it."""

    is_parkable: dict[str, bool] = field(default_factory=dict)
    """{replica_id: as it was granted}"""
    at: dict[str, GiveBackStep] = field(default_factory=dict)
    """{replica_id: the last step that it ended without having given enough}"""
    frozen: set[str] = field(default_factory=set)
    """Those whose checkpoint has brought the bytes, until they are told to be parked."""
    due_back: dict[str, str] = field(default_factory=dict)
    """{replica_id: its node}; it is parked and is never to be: the next word of its node is that it waits."""
    unable: set[str] = field(default_factory=set)
    """Those whose engine has said that it cannot live in another grant, until the next one is started."""
    checkpoint_count: int = 0

    def hear(self, fact: Fact) -> None:
        if isinstance(fact, NodeFact):
            self._judge_return(fact)
        match fact:
            case LeaseGranted():
                self.is_parkable.update({r.replica_id: r.deployment.swap.is_parkable for r in fact.replicas})
            case LeaseResized():
                self._judge_growth(fact)
            case ReplicaStarting():
                self.unable.discard(fact.replica_id)
            case GiveBackAsked():
                self.at.pop(fact.replica_id, None)
            case GaveBack():
                self._judge_step(fact)
            case ReplicaParked():
                self._judge_park(fact)
            case ReplicaFailed() | LeaseReleased():
                self.frozen.discard(fact.replica_id)
                self.at.pop(fact.replica_id, None)

    # --- Each a sentence ----------------------------------------------------------------------------------------------

    def _judge_step(self, fact: GaveBack) -> None:
        """Each step is harsher than the one before it, and a park is for those that may be parked."""
        before = self.at.pop(fact.replica_id, None)
        is_later = before is None or ORDER.index(fact.step) > ORDER.index(before)
        assert is_later, f"the step after '{before}' is milder: {fact}"
        may_park = fact.step is not GiveBackStep.PARK or self.is_parkable[fact.replica_id]
        assert may_park, f"it is never to be parked: {fact}"
        if not fact.is_enough:
            self.at[fact.replica_id] = fact.step
        elif fact.step is GiveBackStep.CHECKPOINT:
            self.frozen.add(fact.replica_id)

    def _judge_growth(self, fact: LeaseResized) -> None:
        """Nobody is granted more than its engine has said that it can live in."""
        asked_again = fact.reason is ResizeReason.BURST and fact.replica_id in self.unable
        assert not asked_again, f"its engine cannot grow, and has said so: {fact}"
        if not fact.is_able:
            self.unable.add(fact.replica_id)

    def _judge_park(self, fact: ReplicaParked) -> None:
        """What was checkpointed keeps nothing on any GPU, and comes back at once if it is never to be away."""
        if fact.replica_id not in self.frozen:
            return
        self.frozen.discard(fact.replica_id)
        self.checkpoint_count += 1
        assert fact.swap_driver is SwapDriver.CHECKPOINT, f"it was not checkpointed: {fact}"
        assert fact.residue_bytes == 0, f"a checkpoint leaves nothing: {fact}"
        if not self.is_parkable[fact.replica_id]:
            self.due_back[fact.replica_id] = fact.node

    def _judge_return(self, fact: NodeFact) -> None:
        """Whoever is never to be away stands in line for its request before anything else happens on its node."""
        for replica_id in [name for name, node in self.due_back.items() if node == fact.node]:
            del self.due_back[replica_id]
            waits = isinstance(fact, ReplicaWaking) and fact.replica_id == replica_id
            assert waits, f"{replica_id} is never to be away, and does not come back: {fact}"

"""Rules about nodes that come and go and about replicas that are moved, from facts alone.

Each decision is judged by what placement had read when it made it (the cursor of its fact).
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

from kit.bus import Stored
from schemas.messages import Fact
from schemas.nodes import GpuOffer, LeaseRefused, LeaseReleased, NodeJoined, ReplicaFailed, ReplicaReady
from schemas.placement import (
    MoveDecided,
    MoveEnded,
    NodeLost,
    NodeReturned,
    PlacementProposed,
    ReasonCode,
    ReleaseProposed,
    ReplicaProposal,
)

NEVER: Final = 1 << 62


@dataclass(slots=True)
class _Life:
    """One replica's life, by the sequences of the facts that tell it."""

    proposal: ReplicaProposal
    node: str
    ready_seq: int = NEVER
    failed_seq: int = NEVER
    """Since it was ready last."""
    failed_for_good_seq: int = NEVER
    ended_seq: int = NEVER
    is_releasing: bool = False

    def is_there(self, seq: int) -> bool:
        """Whether it holds its place, as far as facts up to this one tell."""
        return min(self.ended_seq, self.failed_for_good_seq) > seq

    def stands(self, seq: int) -> bool:
        return self.ready_seq <= seq < min(self.failed_seq, self.ended_seq) and not self.is_releasing


@dataclass(slots=True)
class Upkeep:
    """Hear every fact in the order of the stream; each rule raises at the fact that breaks it."""

    quarantine_max_s: float = 1800.0
    node_lost_s: float = 30.0
    nobody_heard_s: float = 11.0
    """A second more than placement's own, for what was on its way."""
    alive_times_s: list[float] = field(default_factory=list)
    """When any node was heard, in order, by placement's clock; empty where nobody tells: clocks may be set."""
    gpus: dict[str, GpuOffer] = field(default_factory=dict)
    lives: dict[str, _Life] = field(default_factory=dict)
    on_gpu: dict[str, set[str]] = field(default_factory=dict)
    """{gpu_uuid: replicas that were ever proposed there and have not ended}"""
    lost: set[str] = field(default_factory=set)
    closed_until_s: dict[str, float] = field(default_factory=dict)
    moves: dict[str, MoveDecided] = field(default_factory=dict)
    moved_at_s: dict[str, float] = field(default_factory=dict)
    """{replica that took another's place: since when}"""
    rests_s: float = 600.0
    """Placement's own, from the end of its move on."""
    done_count: int = 0

    def hear(self, stored: Stored, fact: Fact) -> None:
        match fact:
            case NodeJoined():
                self.gpus.update({gpu.gpu_uuid: gpu for gpu in fact.gpus})
            case NodeLost():
                self._judge_loss(fact)
            case NodeReturned():
                self._judge_return(fact)
            case PlacementProposed():
                self._judge_proposal(fact, stored.cursor_seq)
            case ReleaseProposed():
                self._judge_release(fact, stored.cursor_seq)
            case MoveDecided():
                both = {fact.replica_id, fact.replacement_id}
                moving = {name for move in self.moves.values() for name in (move.replica_id, move.replacement_id)}
                assert not both & moving, f"moved twice at once: {fact}"
                rested_s = fact.at_s - self.moved_at_s.get(fact.replica_id, float("-inf"))
                assert rested_s >= self.rests_s, f"moved again after {rested_s:.0f} s: {fact}"
                self.moves[fact.move_id] = fact
            case MoveEnded():
                move = self.moves.pop(fact.move_id)
                self.done_count += fact.is_done
                if fact.is_done:
                    self.moved_at_s[move.replacement_id] = fact.at_s
            case _:
                self._follow(stored.seq, fact)

    def _follow(self, seq: int, fact: Fact) -> None:
        match fact:
            case ReplicaReady():
                for ready in fact.replicas:
                    life = self.lives[ready.replica_id]
                    life.ready_seq, life.failed_seq = seq, NEVER
            case ReplicaFailed():
                life = self.lives[fact.replica_id]
                life.failed_seq = min(seq, life.failed_seq)
                if fact.is_final:
                    life.failed_for_good_seq = seq
            case LeaseRefused():
                for replica_id in fact.replica_ids:
                    self.lives[replica_id].ended_seq = seq
            case LeaseReleased() if fact.replica_id in self.lives:
                self.lives[fact.replica_id].ended_seq = seq

    def hear_alive(self, now_s: float) -> None:
        """Some node's agent has said that it is there, and could be heard."""
        self.alive_times_s.append(now_s)

    # --- Each a sentence ----------------------------------------------------------------------------------------------

    def _judge_loss(self, fact: NodeLost) -> None:
        """A node is lost once, after its time, and never for want of news of all nodes."""
        assert fact.node not in self.lost, f"lost twice: {fact}"
        assert fact.silent_s >= self.node_lost_s, f"lost too soon: {fact}"
        self.lost.add(fact.node)
        if self.alive_times_s:
            place = bisect_right(self.alive_times_s, fact.at_s)
            deaf_s = fact.at_s - self.alive_times_s[place - 1] if place else float("inf")
            assert deaf_s <= self.nobody_heard_s, f"lost when nobody was heard for {deaf_s:.1f} s: {fact}"

    def _judge_return(self, fact: NodeReturned) -> None:
        """Only a lost node returns; a quarantine comes with the second loss and ends some day."""
        assert fact.node in self.lost, f"was not lost: {fact}"
        self.lost.remove(fact.node)
        assert (fact.quarantine_s > 0) == (fact.loss_count > 1), f"quarantined for nothing, or not at all: {fact}"
        assert fact.quarantine_s <= self.quarantine_max_s, f"a quarantine for ever: {fact}"
        self.closed_until_s[fact.node] = fact.at_s + fact.quarantine_s

    def _judge_proposal(self, fact: PlacementProposed, cursor_seq: int) -> None:
        """Nothing new goes to a lost or quarantined node; a move's target has room beside both copies of all others."""
        assert fact.node not in self.lost, f"proposed to a lost node: {fact}"
        assert fact.at_s >= self.closed_until_s.get(fact.node, 0.0), f"proposed to a node in quarantine: {fact}"
        for replica in fact.replicas:
            self.lives[replica.replica_id] = _Life(replica, fact.node)
            for share in replica.shares:
                self.on_gpu.setdefault(share.gpu_uuid, set()).add(replica.replica_id)
                if ReasonCode.ROOM_BY_MOVING in fact.codes:
                    gpu, promised = self.gpus[share.gpu_uuid], self._promised(share.gpu_uuid, cursor_seq)
                    fits = promised + gpu.reserve_bytes <= gpu.capacity_bytes
                    assert fits, f"{share.gpu_uuid} is promised {promised} bytes by {fact}"

    def _promised(self, gpu_uuid: str, seq: int) -> int:
        total = 0
        for replica_id in sorted(self.on_gpu[gpu_uuid]):
            life = self.lives[replica_id]
            if life.is_there(seq):
                total += sum(s.request_bytes for s in life.proposal.shares if s.gpu_uuid == gpu_uuid)
        return total

    def _judge_release(self, fact: ReleaseProposed, cursor_seq: int) -> None:
        """A moved replica ends behind one that stands in, or before it started; of those too many never all end."""
        life = self.lives[fact.replica_id]
        if fact.reason.startswith("moved to "):
            (move,) = [move for move in self.moves.values() if move.replica_id == fact.replica_id]
            stands = self.lives[move.replacement_id].stands(cursor_seq) or life.ready_seq > cursor_seq
            assert stands, f"nobody stands in for it: {fact}"
        life.is_releasing = True
        if fact.reason.startswith("one too many"):
            others = [
                other
                for other in self.lives.values()
                if other.proposal.deployment_id == life.proposal.deployment_id
                if not other.is_releasing and other.is_there(cursor_seq) and other.node not in self.lost
            ]
            assert others, f"the last one ends: {fact}"

    # --- At the end ---------------------------------------------------------------------------------------------------

    def check_ends(self, *, now_s: float, lasts_s_max: float) -> None:
        """No move goes on for ever, and when all is healed no node is lost."""
        stuck = [move for move in self.moves.values() if now_s - move.at_s > lasts_s_max]
        assert not stuck, f"moves without an end: {stuck}"
        assert not self.lost, f"still taken for lost: {sorted(self.lost)}"

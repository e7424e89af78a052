"""What each service owes the others, judged from messages alone: never by what a service believes of itself.

`Books` and `Conduct` (test_invariants_system.py) judge bytes and victims; these judge grants, grades, commands,
tenants, orders, epochs and answers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kit.bus import Stored
from kit.outcomes import Reply
from kit.processor import CHAIN_START, chain_hash, writer_of
from schemas.autoscaler import ReplicasDecided
from schemas.catalogue import UnreadableMessage, decode
from schemas.deployments import GRADE_ORDER
from schemas.inbox import DeployRequested, Verdict
from schemas.messages import Command, Fact
from schemas.nodes import (
    GaveBack,
    GiveBackAsked,
    GpuOffer,
    LeaseGranted,
    LeaseRefused,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaWaking,
)
from schemas.placement import (
    CommandDuplicated,
    CommandFact,
    CommandRejected,
    DeploymentAdmitted,
    DeploymentRetired,
    PlacementProposed,
    ReleaseProposed,
)
from schemas.swapper import ParkDecided
from services.nodeagent.core import GPU_IS_GONE

VERDICTS = {CommandRejected: Verdict.REJECTED, CommandDuplicated: Verdict.DUPLICATE}
"""Every other fact about a command means that it was admitted."""


@dataclass(slots=True)
class Contracts:
    """Hear every fact in stream order; each rule raises at the fact that breaks it."""

    inbox: Callable[[], Sequence[Stored]] = lambda: ()
    gpus: dict[str, GpuOffer] = field(default_factory=dict)
    proposed: dict[str, PlacementProposed] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    """{proposal id: grants and refusals}"""
    releases: set[str] = field(default_factory=set)
    park_decided: set[tuple[str, int]] = field(default_factory=set)
    """{(replica, wake epoch)}"""
    victims: set[str] = field(default_factory=set)
    """Of wakes that their node has accepted, until they drain."""
    owing: set[str] = field(default_factory=set)
    """Borrowers that were asked for bytes and have not given enough."""
    wake_epochs: dict[str, int] = field(default_factory=dict)
    commands: dict[int, list[CommandFact]] = field(default_factory=dict)
    effective: dict[tuple[str, str], int] = field(default_factory=dict)
    """{(tenant, command id): the inbox sequence that was admitted}"""
    hashes: dict[str, str] = field(default_factory=dict)

    def hear(self, stored: Stored, fact: Fact) -> None:
        self._follow_chain(stored)
        self.judge(fact)

    def judge(self, fact: Fact) -> None:
        """Every rule but that of the chain."""
        match fact:
            case NodeJoined():
                self.gpus.update({gpu.gpu_uuid: gpu for gpu in fact.gpus})
            case PlacementProposed():
                self.proposed[fact.proposal_id] = fact
            case ReleaseProposed():
                self.releases.add(fact.replica_id)
            case LeaseGranted():
                self.answered[fact.proposal_id] += 1
                self._judge_grant(fact)
            case LeaseRefused():
                self.answered[fact.proposal_id] += 1
            case ParkDecided():
                self.park_decided.add((fact.replica_id, fact.wake_epoch))
            case CommandFact():
                self._judge_command(fact)
            case _:
                self._judge_life(fact)

    def hear_stranger(self, stored: Stored) -> None:
        """What somebody else put under a prefix: the chain goes over it if it continues the chain, else around it."""
        writer = writer_of(stored.subject)
        if self.hashes.get(writer, CHAIN_START) == stored.previous_hash:
            self._follow_chain(stored)

    # --- Each a sentence ----------------------------------------------------------------------------------------------

    def _follow_chain(self, stored: Stored) -> None:
        """A prefix is one chain: nobody wrote who had not read what was there."""
        writer = writer_of(stored.subject)
        assert self.hashes.get(writer, CHAIN_START) == stored.previous_hash, f"{stored.id} does not continue its chain"
        self.hashes[writer] = chain_hash(stored.previous_hash, id=stored.id, subject=stored.subject, body=stored.body)

    def _judge_grant(self, fact: LeaseGranted) -> None:
        """All of what was proposed, no share less than its request, and in the grade that was asked for, or nothing."""
        proposal = self.proposed[fact.proposal_id]
        asked = [(replica, share) for replica in proposal.replicas for share in replica.shares]
        places = [(share.replica_id, share.shard_index, share.gpu_uuid) for _, share in asked]
        given = [(lease.replica_id, lease.shard_index, lease.gpu_uuid) for lease in fact.leases]
        assert 1 == self.answered[fact.proposal_id], f"{fact.proposal_id} was answered twice"
        assert places == given, f"{fact} is not all of {proposal}, where it was proposed"
        for (replica, share), lease in zip(asked, fact.leases, strict=True):
            assert share.request_bytes <= lease.granted_bytes, f"{lease} is less than its request"
            minimum, grade = replica.deployment.share.minimum_grade, self.gpus[lease.gpu_uuid].grade
            is_enforced = minimum is None or GRADE_ORDER.index(grade) <= GRADE_ORDER.index(minimum)
            assert is_enforced, f"{lease.replica_id} was promised '{minimum}' and has '{grade}'"

    def _judge_command(self, fact: CommandFact) -> None:
        """The fact is about the command that it names, of the tenant who sent it; a repetition has no second effect."""
        stored = self.inbox()[fact.inbox_seq - 1]
        tenant = stored.subject.split(".")[2]
        assert tenant == fact.tenant, f"{tenant}'s command became {fact.tenant}'s: {fact}"
        try:
            command = decode(stored.body)
        except UnreadableMessage:
            assert isinstance(fact, CommandRejected), f"an unreadable command became {fact}"
            command = None
        if isinstance(fact, DeploymentAdmitted):
            assert isinstance(command, DeployRequested), command
            assert command.deployment == fact.deployment, f"another deployment was admitted than wished: {fact}"
        before = self.commands.setdefault(fact.inbox_seq, [])
        kinds = [type(f) for f in (*before, fact)]
        is_replacement = kinds == [DeploymentRetired, DeploymentAdmitted]
        assert len(kinds) == 1 or is_replacement, f"command {fact.inbox_seq} has more than its fact: {kinds}"
        before.append(fact)
        if not isinstance(fact, CommandRejected | CommandDuplicated):
            assert isinstance(command, Command), command
            sent_id = command.command_id
            first_seq = self.effective.setdefault((tenant, sent_id), fact.inbox_seq)
            assert first_seq == fact.inbox_seq, f"{sent_id} was carried out twice: {fact}"

    def _judge_life(self, fact: Fact) -> None:
        """Nobody is parked or stopped whom nobody wished away; every park raises the wake epoch."""
        match fact:
            case ReplicaWaking():
                self.victims.update(fact.victim_ids)
            case GiveBackAsked():
                self.owing.add(fact.replica_id)
            case GaveBack(is_enough=True):
                self.owing.discard(fact.replica_id)
            case ReplicaDraining(is_release=True):
                is_meant = fact.replica_id in self.releases or fact.reason == GPU_IS_GONE
                assert is_meant, f"nobody proposed this release: {fact}"
            case ReplicaDraining():
                decided = (fact.replica_id, self.wake_epochs.get(fact.replica_id, 1)) in self.park_decided
                is_owing = fact.replica_id in self.owing
                assert decided or is_owing or fact.replica_id in self.victims, f"nobody decided this park: {fact}"
                self.victims.discard(fact.replica_id)
            case ReplicaParked() | ReplicaFailed():
                older = self.wake_epochs.get(fact.replica_id, 1)
                assert older < fact.wake_epoch, f"the wake epoch stays {older}: {fact}"
                self.wake_epochs[fact.replica_id] = fact.wake_epoch
            case ReplicaResident() | ParkAbandoned():
                self.wake_epochs[fact.replica_id] = fact.wake_epoch
            case ReplicaReady():
                self.wake_epochs.update({ready.replica_id: ready.wake_epoch for ready in fact.replicas})

    # --- At the end ---------------------------------------------------------------------------------------------------

    def check_answers(self, replies: Iterable[Reply]) -> None:
        """Each command has its fact, each answer says what the fact says, and none comes twice."""
        assert set(self.commands) == {stored.seq for stored in self.inbox()}, "a command without a fact"
        seen: set[int] = set()
        for reply in replies:
            seq = reply.answer.inbox_seq
            assert seq not in seen, f"answered twice: {reply}"
            seen.add(seq)
            fact = self.commands[seq][-1]
            assert fact.tenant == reply.tenant, f"answered to {reply.tenant}: {fact}"
            assert VERDICTS.get(type(fact), Verdict.ADMITTED) == reply.answer.verdict, f"{reply} and {fact}"

    def check_proposals(self) -> None:
        """Every proposal was granted or refused."""
        open_ids = [name for name in self.proposed if not self.answered[name]]
        assert not open_ids, f"neither granted nor refused: {open_ids}"


@dataclass(slots=True)
class ColdConduct:
    """Nothing goes cold for want of news: the autoscaler decides on zero only while it hears of loads."""

    heard_load_at_s: float = 0.0
    load_fresh_s: float = 3.0

    def hear(self, fact: Fact) -> None:
        if isinstance(fact, ReplicasDecided) and fact.replica_count == 0:
            silent_s = fact.at_s - self.heard_load_at_s
            assert silent_s <= self.load_fresh_s, f"cold after {silent_s:.1f} s without any sample: {fact}"

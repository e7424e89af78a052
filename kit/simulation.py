"""The virtual-time shell: the same services over a heap of events, from one seed, with faults; no event loop.

What the real shell does in parallel happens here one event after another, so a run is a function of its seed. Messages
take time, get lost, come twice; appends lose their acks; services die at any moment and come back from history.
"""

import hashlib
import heapq
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

from kit.bus import Entry, Stored, subject_matches
from kit.outcomes import Effect, Input, Reply, Timer
from kit.processor import Batch, Delivery, Processor, Released, writer_of
from kit.service import Service, digest
from kit.simulation_snapshots import DrawnSnapshots
from schemas.catalogue import decode, encode
from schemas.messages import Command, Fact, Message, Order, Signal, command_subject, message_subject, prefix_of

STREAM_EPOCH_S: Final = 1_700_000_000.0
"""Stream time at the start of every run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What may go wrong, as chances per event and as times."""

    latency_s: float = 0.0004
    """Mean of every message's way; each one is drawn between half and three times this."""
    fleeting_lost_fraction: float = 0.0
    fleeting_twice_fraction: float = 0.0
    ack_lost_fraction: float = 0.0
    """Of appends that are stored although their writer hears nothing."""
    resend_s: float = 1.0
    rebuild_s: float = 0.1
    """Until a writer whose append was refused has stopped and reads history anew."""


class World(Protocol):
    """What effects act upon: the hosts, GPUs and engines outside of the services."""

    def perform(self, effect: Effect, done: Callable[[float, Input], None]) -> None:
        """Begin the effect; call `done(after_s, result)` for what comes back. Goes on when its service dies."""
        ...


@dataclass(slots=True)
class Counters:
    delivered_count: int = 0
    appended_count: int = 0
    crashed_count: int = 0
    refused_count: int = 0
    """Appends that named an older sequence than the stream held."""
    lost_count: int = 0


@dataclass(slots=True)
class Member:
    """One service instance in the simulation."""

    service: Service[Any]
    settings: Any
    writer: str
    world: World | None
    is_journaled: bool
    processor: Processor[Any] | None = None
    life: int = 0
    """Raised at each crash: whatever was scheduled for an earlier life is void."""
    is_alive: bool = False
    is_active: bool = False
    """Has taken over: history was read and its start is acknowledged."""
    position: int = 0
    """Messages of the stream that were handed to it."""
    inbox_position: int = 0
    waiting: deque[Delivery | Stored] = field(default_factory=deque)
    in_flight: Batch | None = None
    journal: list[Entry] = field(default_factory=list)
    uploaded_count: int = 0
    is_uploading: bool = False
    next_arrival_s: float = 0.0


class Simulation:
    """One run. Add members, send commands and signals, advance the time, look at the states and the trace."""

    def __init__(self, *, seed: int, faults: Faults | None = None) -> None:
        self.seed = seed
        self.faults = faults or Faults()
        self.random = random.Random(seed)  # Reproducible by design.
        self.now_s = STREAM_EPOCH_S
        self.members: dict[str, Member] = {}
        self.stream: list[Stored] = []
        self.inbox: list[Stored] = []
        self.replies: list[Reply] = []
        self.counters = Counters()
        self.snapshots = DrawnSnapshots(seed)
        self.on_stored: list[Callable[[Stored, Fact], None]] = []
        self.on_signal: list[Callable[[Signal], None]] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._trace = hashlib.sha256()
        self._stored_ids: set[str] = set()
        self._newest_of: dict[str, Stored] = {}

    # --- Time ---------------------------------------------------------------------------------------------------------

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        """Do it at this stream time, never earlier than now; ties in the order in which they were asked for."""
        heapq.heappush(self._heap, (max(when_s, self.now_s), next(self._numbers), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def run_for(self, duration_s: float) -> None:
        self.run_until(self.now_s + duration_s)

    def run_until(self, end_s: float) -> None:
        while self._heap and self._heap[0][0] <= end_s:
            self.now_s, _, action = heapq.heappop(self._heap)
            action()
        self.now_s = end_s

    def trace_hash(self) -> str:
        """Equal for runs in which the same messages were stored in the same order at the same times."""
        return self._trace.hexdigest()

    def _latency_s(self) -> float:
        return self.faults.latency_s * self.random.uniform(0.5, 3.0)

    # --- Members ------------------------------------------------------------------------------------------------------

    def add(
        self,
        service: Service[Any],
        settings: Any,
        *,
        writer: str,
        world: World | None = None,
        is_journaled: bool = False,
    ) -> Member:
        member = Member(service=service, settings=settings, writer=writer, world=world, is_journaled=is_journaled)
        self.members[writer] = member
        self.start(member)
        return member

    def start(self, member: Member) -> None:
        """Rebuild from history and take over, as the real shell does."""
        processor = Processor(member.service, member.settings, writer=member.writer, instance=f"sim{member.life}")
        if self.snapshots.is_drawn():
            self.snapshots.restore(processor)
        self._replay(processor)
        member.processor, member.is_alive, member.is_active = processor, True, False
        member.position = len(self.stream)
        member.waiting.clear()
        member.in_flight = None
        if member.is_journaled:
            for entry in member.journal[member.uploaded_count :]:
                if not processor.knows(entry.id):
                    processor.replay_own(entry, seq=processor.last_seq)
        batch = processor.take_over(now_s=self.now_s)
        self._commit(member, batch, is_start=True)

    def _replay(self, processor: Processor[Any]) -> None:
        """All of history that concerns it, from where it is."""
        filters = (processor.prefix, *processor.reads)
        for stored in self.stream[processor.read_seq :]:
            if any(subject_matches(pattern, stored.subject) for pattern in filters):
                processor.replay_one(stored)

    def crash(self, writer: str, *, down_s: float) -> None:
        """SIGKILL: memory and everything scheduled for this life are gone; history, journal and the world remain."""
        member = self.members[writer]
        if not member.is_alive:
            return
        member.is_alive = member.is_active = False
        member.life += 1
        member.is_uploading = False
        self.counters.crashed_count += 1
        self.after(down_s, lambda: self.start(member))

    def _if_living(self, member: Member, action: Callable[[], None], *, life: int | None = None) -> Callable[[], None]:
        """The action, void once the given life (the present one) has ended."""
        meant = member.life if life is None else life

        def guarded() -> None:
            if member.is_alive and member.life == meant:
                action()

        return guarded

    def tell(self, writer: str, result: Input) -> None:
        """Hand an input to a member if it lives now, as a watch of its shell would."""
        member = self.members[writer]
        if member.is_active:
            self._deliver(member, Delivery(input=result, now_s=self.now_s))

    # --- Messages -----------------------------------------------------------------------------------------------------

    def command(self, tenant: str, command: Command, *, body: bytes | None = None) -> None:
        """Publish to the inbox; it is stored and read in order by whoever has an inbox cursor."""
        stored = Stored(
            seq=len(self.inbox) + 1,
            time_s=self.now_s,
            subject=command_subject(tenant, command),
            body=encode(command) if body is None else body,
        )
        self.inbox.append(stored)
        for member in self.members.values():
            if member.service.inbox_cursor is not None:
                self.after(self._latency_s(), self._if_living(member, partial(self._read_inbox, member)))

    def _read_inbox(self, member: Member) -> None:
        if not member.is_active:
            return
        while member.inbox_position < len(self.inbox):
            stored = self.inbox[member.inbox_position]
            member.inbox_position += 1
            message = decode(stored.body)
            delivery = Delivery(
                input=message, now_s=self.now_s, inbox_seq=stored.seq, tenant=stored.subject.split(".")[2]
            )
            self._deliver(member, delivery)

    def fleeting(self, message: Order | Signal) -> None:
        """Send an order or a signal to everybody who handles it; it may be lost, late or doubled."""
        if isinstance(message, Signal):
            for listen in self.on_signal:
                listen(message)
        for member in self.members.values():
            kinds = (*member.service.handlers, *member.service.observers)
            if type(message) not in kinds:
                continue
            if isinstance(message, Order) and member.writer != f"node.{message.node}":
                continue
            chance = self.random.random()
            if chance < self.faults.fleeting_lost_fraction:
                self.counters.lost_count += 1
                continue
            twice = self.random.random() < self.faults.fleeting_twice_fraction
            for _ in range(2 if twice else 1):
                self.after(
                    self._latency_s(),
                    self._if_living(
                        member,
                        partial(self._deliver_fleeting, member, encode(message)),
                    ),
                )

    def _deliver_fleeting(self, member: Member, body: bytes) -> None:
        self._deliver(member, Delivery(input=decode(body), now_s=self.now_s))

    def _deliver(self, member: Member, item: Delivery | Stored) -> None:
        member.waiting.append(item)
        self._work(member)

    def _work(self, member: Member) -> None:
        """Handle what waits, one after another; an append in flight holds up the rest."""
        while member.is_active and member.in_flight is None and member.waiting:
            self._handle(member, member.waiting.popleft())
        processor = member.processor
        is_quiet = member.is_active and member.in_flight is None and not member.waiting
        if is_quiet and processor is not None and member.uploaded_count == len(member.journal):
            self.snapshots.offer(processor)

    def _handle(self, member: Member, item: Delivery | Stored) -> None:
        processor = member.processor
        assert processor is not None, member.writer
        self.counters.delivered_count += 1
        if isinstance(item, Stored):
            if processor.is_own(item):
                return
            processor.receive_stored(item)
        else:
            processor.receive(item, handled_s=self.now_s)
        member.service.check_invariants(processor.state)
        ahead = [r for r in processor.batch.released if isinstance(r.outcome, Order) and r.outcome.goes_ahead]
        for released in ahead:
            processor.batch.released.remove(released)
            self._release(member, released)
        batch = processor.take_batch()
        if not batch.is_empty:
            self._commit(member, batch)

    # --- Commits ------------------------------------------------------------------------------------------------------

    def _commit(self, member: Member, batch: Batch, *, is_start: bool = False) -> None:
        if member.is_journaled and not is_start:
            member.journal.extend(batch.entries)
            self._upload(member)
            self._release_all(member, batch)
            return
        if member.is_journaled:
            member.journal.extend(batch.entries)
            member.in_flight = batch
            self._upload(member, then=lambda seq: self._acknowledged(member, batch, seq, is_start=True))
            return
        if not batch.entries:
            self._release_all(member, batch)
            return
        member.in_flight = batch
        assert member.processor is not None, member.writer
        last_seq = member.processor.last_seq
        self._append(
            member, batch.entries, last_seq, lambda seq: self._acknowledged(member, batch, seq, is_start=is_start)
        )

    def _acknowledged(self, member: Member, batch: Batch, last_seq: int, *, is_start: bool) -> None:
        processor = member.processor
        assert processor is not None, member.writer
        member.in_flight = None
        processor.committed(batch, last_seq=last_seq)
        if is_start:
            member.is_active = True
            processor.started(writer_epoch=last_seq)
            processor.catch_up(entries_max=sys.maxsize)
            if member.service.inbox_cursor is not None:
                member.inbox_position = member.service.inbox_cursor(processor.state)
                self._read_inbox(member)
            first = processor.take_batch()
            if not first.is_empty:
                self._commit(member, first)
            self._hand_over(member)
        else:
            self._release_all(member, batch)
        self._work(member)

    def _append(self, member: Member, entries: Sequence[Entry], last_seq: int, then: Callable[[int], None]) -> None:
        """One attempt on its way to the stream; the same bytes again when its ack is lost.

        Bytes on their way arrive although their writer dies, even after its next life has begun: the stream accepts
        them or refuses them by the sequence that they name, and whoever is refused while it lives rebuilds itself.
        """
        life = member.life

        def arrive() -> None:
            newest = self._newest(prefix_of(member.writer))
            if newest is not None and newest.id == entries[-1].id:
                seq = newest.seq
            elif (newest.seq if newest else 0) == last_seq:
                seq = self._store(entries)
            else:
                self.counters.refused_count += 1
                if member.is_alive and member.life == life:
                    self.crash(member.writer, down_s=self.faults.rebuild_s)
                return
            if self.random.random() < self.faults.ack_lost_fraction:
                self.after(self.faults.resend_s, self._if_living(member, arrive, life=life))
            else:
                self.after(self._latency_s(), self._if_living(member, lambda: then(seq), life=life))

        self.after(self._latency_s(), arrive)

    def _upload(self, member: Member, then: Callable[[int], None] | None = None) -> None:
        """Bring the journal's surplus into the stream, in order, one append in flight."""
        if member.is_uploading or member.uploaded_count >= len(member.journal):
            if then is not None:
                self.after(self.faults.latency_s, self._if_living(member, lambda: self._upload(member, then)))
            return
        processor = member.processor
        assert processor is not None, member.writer
        newest = self._newest(processor.prefix)
        while member.uploaded_count < len(member.journal) and self._has(member.journal[member.uploaded_count].id):
            member.uploaded_count += 1
        entries = member.journal[member.uploaded_count :]
        if not entries:
            if then is not None:
                then(newest.seq if newest else 0)
            return
        member.is_uploading = True

        def stored(seq: int) -> None:
            member.is_uploading = False
            member.uploaded_count += len(entries)
            processor.last_seq = seq
            if then is not None:
                then(seq)
            elif member.uploaded_count < len(member.journal):
                self._upload(member)

        self._append(member, entries, newest.seq if newest else 0, stored)

    def _newest(self, prefix: str) -> Stored | None:
        return self._newest_of.get(prefix)

    def _has(self, entry_id: str) -> bool:
        return entry_id in self._stored_ids

    def _store(self, entries: Sequence[Entry]) -> int:
        for entry in entries:
            stored = Stored(
                seq=len(self.stream) + 1,
                time_s=self.now_s,
                subject=entry.subject,
                body=entry.body,
                id=entry.id,
                cause_seq=entry.cause_seq,
                cursor_seq=entry.cursor_seq,
                previous_hash=entry.previous_hash,
            )
            self.stream.append(stored)
            self._stored_ids.add(entry.id)
            self._newest_of[prefix_of(writer_of(entry.subject))] = stored
            self.counters.appended_count += 1
            self._trace.update(f"{stored.time_s:.9f} {stored.subject} {stored.id} ".encode() + stored.body)
            fact = decode(stored.body)
            assert isinstance(fact, Fact), fact
            for listen in self.on_stored:
                listen(stored, fact)
        for member in self.members.values():
            if member.is_active:
                self._hand_over(member)
        return len(self.stream)

    def _hand_over(self, member: Member) -> None:
        """Send what is new in the stream on its way to a reader, in order."""
        processor = member.processor
        assert processor is not None, member.writer
        filters = processor.reads
        while member.position < len(self.stream):
            stored = self.stream[member.position]
            member.position += 1
            if any(subject_matches(pattern, stored.subject) for pattern in filters):
                member.next_arrival_s = max(member.next_arrival_s, self.now_s + self._latency_s())
                self.at(
                    member.next_arrival_s,
                    self._if_living(member, partial(self._deliver, member, stored)),
                )

    # --- Outcomes -----------------------------------------------------------------------------------------------------

    def _release_all(self, member: Member, batch: Batch) -> None:
        for released in batch.released:
            self._release(member, released)

    def _release(self, member: Member, released: Released) -> None:
        outcome = released.outcome
        if isinstance(outcome, Reply):
            self.replies.append(outcome)
        elif isinstance(outcome, Order | Signal):
            assert isinstance(outcome, Message), outcome
            message_subject(member.writer, outcome)
            self.fleeting(outcome)
        elif isinstance(outcome, Timer):
            delivery = Delivery(input=outcome.input, now_s=outcome.due_s)
            self.at(outcome.due_s, self._if_living(member, lambda: self._deliver(member, delivery)))
        else:
            self._begin(member, outcome)

    def _begin(self, member: Member, effect: Effect) -> None:
        assert member.world is not None, f"{member.writer} has effects but no world"

        life = member.life

        def done(after_s: float, result: Input) -> None:
            def arrive() -> None:
                if member.is_alive and member.life == life:
                    self._deliver(member, Delivery(input=result, now_s=self.now_s))

            self.after(after_s, arrive)

        member.world.perform(effect, done)

    # --- Checks -------------------------------------------------------------------------------------------------------

    def check_replay(self) -> None:
        """A fold from zero, and one from a snapshot, gives every quiet member's live state, byte for byte."""
        for member in self.members.values():
            if not member.is_active or member.in_flight is not None or member.waiting:
                continue
            live = member.processor
            assert live is not None, member.writer
            for is_restored in (False, True):
                fresh = Processor(member.service, member.settings, writer=member.writer, instance="replay")
                if is_restored and not self.snapshots.restore(fresh):
                    continue
                self._replay(fresh)
                for entry in member.journal:
                    if not fresh.knows(entry.id):
                        fresh.replay_own(entry, seq=fresh.last_seq)
                fresh.fold_foreign_to(live.cursor_seq)
                replayed, lived = digest(fresh.state), digest(live.state)
                assert replayed == lived, (
                    f"{member.writer}: replay differs, from a snapshot {is_restored}\n"
                    f"replayed {replayed!r}\nlived    {lived!r}"
                )

"""The virtual-time shell: the same services over a heap of events, from one seed, with faults; no event loop.

What the real shell does in parallel happens here one event after another, so a run is a function of its seed. Messages
take time, get lost, come twice; appends lose their acks; services die at any moment and come back from history. What
one can do to a running simulation (crash, pause, cut, ...) is in `kit.simulation_harm`.
"""

import heapq
import random
import sys
from collections.abc import Callable
from typing import Any, Final

from kit.bus import Stored
from kit.outcomes import Effect, Input, Reply, Timer
from kit.processor import Batch, Delivery, Processor, Released
from kit.service import Service
from kit.simulation_faults import Counters, Faults, Point
from kit.simulation_history import History
from kit.simulation_members import Action, Member, Party, World
from kit.simulation_snapshots import DrawnSnapshots
from kit.simulation_wire import Wire
from schemas.catalogue import decode, encode
from schemas.messages import Command, Fact, Order, Signal, command_subject

__all__ = ["STREAM_EPOCH_S", "Counters", "Faults", "Member", "Party", "Point", "Simulation", "World"]

STREAM_EPOCH_S: Final = 1_700_000_000.0
"""Stream time at the start of every run."""
LEASE_TERM_S: Final = 2.0
"""How long a writer may be silent before its standby takes over; as `kit.runner` has it."""


def _call(_party: Any, action: Any) -> None:
    action()


class Simulation:
    """One run. Add members, send commands and signals, advance the time, look at the states and the trace."""

    def __init__(self, *, seed: int, faults: Faults | None = None) -> None:
        self.seed = seed
        self.faults = faults or Faults()
        self.random = random.Random(seed)  # Reproducible by design.
        self.now_s = STREAM_EPOCH_S
        self.members: dict[str, Member] = {}
        """{name: instance}. The first instance of a writer has the writer's name."""
        self.parties: list[Party] = []
        self.history = History()
        self.wire = Wire(self)
        self.inbox: list[Stored] = []
        self.replies: list[Reply] = []
        self.counters = Counters()
        self.snapshots = DrawnSnapshots(seed)
        self.on_stored: list[Callable[[Stored, Fact], None]] = []
        self.on_signal: list[Callable[[Signal], None]] = []
        self.bus_away_until_s = 0.0
        self.holders: dict[str, Member] = {}
        """{writer: the instance that has its liveness lease}"""
        self.checks_replay_at_crashes = False
        self._heap: list[tuple[float, int, Action, Party | None, int, Any]] = []
        self._number = 0
        self._draw = self.random.random
        self._listeners: dict[type, tuple[Member, ...]] = {}

    @property
    def stream(self) -> list[Stored]:
        return self.history.stream

    # --- Time ---------------------------------------------------------------------------------------------------------

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        """Do it at this stream time, never earlier than now; ties in the order in which they were asked for."""
        self._number += 1
        heapq.heappush(self._heap, (max(when_s, self.now_s), self._number, _call, None, 0, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def schedule(self, when_s: float, action: Action, party: Party, payload: Any, life: int | None = None) -> None:
        """Call `action(party, payload)` then, unless the party's life (the present one) has ended; late if paused."""
        self._number += 1
        heapq.heappush(self._heap, (when_s, self._number, action, party, party.life if life is None else life, payload))

    def run_for(self, duration_s: float) -> None:
        self.run_until(self.now_s + duration_s)

    def run_until(self, end_s: float) -> None:
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= end_s:
            self.now_s, _, action, party, life, payload = pop(heap)
            if party is None:
                action(None, payload)
            elif party.life == life:
                if party.is_paused:
                    party.frozen.append((action, payload))
                else:
                    action(party, payload)
        self.now_s = end_s

    def trace_hash(self) -> str:
        """Equal for runs in which the same messages were stored in the same order at the same times."""
        return self.history.trace_hash()

    def latency_s(self, party: Party | None = None) -> float:
        """One way's time, drawn anew for each message."""
        drawn_s = self.faults.latency_s * (0.5 + 2.5 * self._draw())
        return drawn_s if party is None else drawn_s + party.extra_latency_s

    def local_s(self, member: Member) -> float:
        """What the member's shell takes for the time: its host's clock, moved on so that it never goes back."""
        local_s = self.now_s + member.skew_s + member.offset_s
        decided_s = member.processor.now_s if member.processor is not None else 0.0
        if decided_s > local_s:
            member.offset_s += decided_s - local_s
            return decided_s
        return local_s

    def hears(self, party: Party) -> bool:
        """Whether the bus reaches it now."""
        return self.now_s >= self.bus_away_until_s and self.now_s >= party.cut_in_until_s

    def is_heard(self, party: Party) -> bool:
        """Whether it reaches the bus now."""
        return self.now_s >= self.bus_away_until_s and self.now_s >= party.cut_out_until_s

    # --- Members ------------------------------------------------------------------------------------------------------

    def add(
        self,
        service: Service[Any],
        settings: Any,
        *,
        writer: str,
        world: World | None = None,
        is_journaled: bool = False,
        is_standby: bool = False,
    ) -> Member:
        """A service instance; with `is_standby` a second one, which waits until the first has lost its lease."""
        probe: Processor[Any] = Processor(service, settings, writer=writer, instance="probe")
        member = Member(
            name=f"{writer}/2" if is_standby else writer,
            filters=(probe.prefix, *probe.reads),
            receive=self._receive_stored,
            service=service,
            settings=settings,
            writer=writer,
            world=world,
            is_journaled=is_journaled,
            is_standby=is_standby,
            is_born_standby=is_standby,
        )
        self.members[member.name] = member
        self._listeners.clear()
        self.join(member)
        if not is_standby:
            self.holders[writer] = member
            self.start(member)
        return member

    def join(self, party: Party) -> None:
        """Have the party read what its filters select, once `read_on` is called."""
        self.parties.append(party)
        self.history.follow(party)

    def active(self, writer: str) -> Member:
        """The instance that acts for the writer; the one with the newest epoch when there are two."""
        mine = [m for m in self.members.values() if m.writer == writer and m.processor is not None]
        acting = [m for m in mine if m.is_active] or mine
        return max(acting, key=lambda m: m.processor.writer_epoch if m.processor is not None else 0)

    def start(self, member: Member) -> None:
        """Rebuild from history and take over, as the real shell does; as soon as the bus can be reached."""
        if not (self.hears(member) and self.is_heard(member)):
            member.is_waiting_for_bus = True
            return
        member.is_waiting_for_bus = member.is_standby = False
        instance = f"{'b' if member.is_born_standby else ''}sim{member.life}"
        surplus = member.journal[member.uploaded_count :] if member.is_journaled else ()
        kept = self.snapshots if self.snapshots.is_drawn() else None
        processor = self.history.rebuilt(
            member.service, member.settings, writer=member.writer, instance=instance, journal=surplus, snapshots=kept
        )
        member.processor, member.is_alive, member.is_active = processor, True, False
        member.own_mark = f"{member.writer}:{instance}:"
        member.position, member.is_reading = len(self.stream), False
        member.waiting.clear()
        member.in_flight = None
        member.offset_s = 0.0
        self.follow_time(member, self.stream[-1].time_s if self.stream else 0.0)
        self._commit(member, processor.take_over(now_s=self.local_s(member)), is_start=True)

    def follow_time(self, member: Member, stored_s: float) -> None:
        behind_s = stored_s - self.local_s(member)
        if behind_s > 0:
            member.offset_s += behind_s

    def end_life(self, member: Member) -> None:
        """Memory and everything scheduled for this life are gone; history, journal and the world remain."""
        if self.checks_replay_at_crashes:
            self.check_replay_of(member)
        member.is_alive = member.is_active = member.is_paused = member.is_reading = False
        member.life += 1
        member.frozen.clear()
        member.is_uploading = False
        member.trap = None

    def crash(self, name: str, *, down_s: float) -> None:
        """SIGKILL of one instance; it is started again after a while."""
        member = self.members[name]
        if not member.is_alive:
            return
        self.end_life(member)
        self.counters.crashed_count += 1
        self.after(down_s, lambda: self.come_back(member))
        self.watch_lease(member.writer)

    def come_back(self, member: Member) -> None:
        """Start, or stand by while another instance has the lease."""
        if member.is_alive or member.is_standby or member.is_waiting_for_bus or not member.has_power:
            return
        holder = self.holders[member.writer]
        if holder is not member and self._is_well(holder):
            member.is_standby = True
            return
        self.holders[member.writer] = member
        self.start(member)

    def watch_lease(self, writer: str) -> None:
        """Have a standby take over when the holder of the lease is still silent after its term."""
        if any(m.writer == writer and m.is_standby for m in self.members.values()):
            self.after(LEASE_TERM_S, lambda: self._offer_lease(writer))

    def _offer_lease(self, writer: str) -> None:
        if self.now_s < self.bus_away_until_s or self._is_well(self.holders[writer]):
            return
        for member in self.members.values():
            if member.writer == writer and member.is_standby and self.hears(member) and self.is_heard(member):
                self.holders[writer] = member
                self.start(member)
                return

    def _is_well(self, member: Member) -> bool:
        return member.is_alive and not member.is_paused and self.is_heard(member) and self.hears(member)

    def supersede(self, member: Member) -> None:
        """Another instance has written here: stop deciding, and begin again from history."""
        self.counters.superseded_count += 1
        self.end_life(member)
        self.after(self.faults.rebuild_s, lambda: self.come_back(member))

    def tell(self, writer: str, result: Input) -> None:
        """Hand an input to a member if it lives now, as a watch of its shell would."""
        member = self.members[writer]
        if member.is_active:
            self.schedule(self.now_s, self._result, member, result)

    # --- Messages -----------------------------------------------------------------------------------------------------

    def command(self, tenant: str, command: Command, *, body: bytes | None = None) -> None:
        """Publish to the inbox, again and again while the bus is away; it is read in order by who has a cursor."""
        if self.now_s < self.bus_away_until_s:
            self.after(1.0, lambda: self.command(tenant, command, body=body))
            return
        stored = Stored(
            seq=len(self.inbox) + 1,
            time_s=self.now_s,
            subject=command_subject(tenant, command),
            body=encode(command) if body is None else body,
        )
        self.inbox.append(stored)
        for member in self.members.values():
            if member.service.inbox_cursor is not None:
                self.schedule(self.now_s + self.latency_s(member), self.read_inbox, member, None)

    def read_inbox(self, member: Member, _: None) -> None:
        if member.service.inbox_cursor is None or not self.hears(member):
            return
        while member.inbox_position < len(self.inbox):
            if not member.is_active:
                return
            stored = self.inbox[member.inbox_position]
            member.inbox_position += 1
            delivery = Delivery(
                input=decode(stored.body),
                now_s=self.local_s(member),
                inbox_seq=stored.seq,
                tenant=stored.subject.split(".")[2],
            )
            self._deliver(member, delivery)

    def fleeting(self, message: Order | Signal, sender: Party | None = None) -> None:
        """Send an order or a signal to everybody who handles it; it may be lost, late or doubled."""
        kind = type(message)
        if isinstance(message, Signal):
            for listen in self.on_signal:
                listen(message)
        if self.now_s < self.bus_away_until_s or (sender is not None and self.now_s < sender.cut_out_until_s):
            self.counters.lost_count += 1
            return
        listeners = self._listeners.get(kind)
        if listeners is None:
            listeners = self._listeners[kind] = tuple(
                m for m in self.members.values() if kind in m.service.handlers or kind in m.service.observers
            )
        body, faults, draw = encode(message), self.faults, self._draw
        way_s = 0.0 if sender is None else sender.extra_latency_s
        addressee = f"node.{message.node}" if isinstance(message, Order) else ""
        for member in listeners:
            if not member.is_active or (addressee and member.writer != addressee):
                continue
            if self.now_s < member.cut_in_until_s or draw() < faults.fleeting_lost_fraction:
                self.counters.lost_count += 1
                continue
            count = 1
            if draw() < faults.fleeting_twice_fraction:
                self.counters.doubled_count += 1
                count = 2
            for _ in range(count):
                arrives_s = self.now_s + way_s + self.latency_s(member)
                if faults.fleeting_late_fraction and draw() < faults.fleeting_late_fraction:
                    self.counters.late_count += 1
                    arrives_s += draw() * faults.late_s
                self.schedule(arrives_s, self._receive_fleeting, member, body)

    def _receive_fleeting(self, member: Member, body: bytes) -> None:
        if member.is_active:
            self._deliver(member, Delivery(input=decode(body), now_s=self.local_s(member)))

    def _receive_stored(self, member: Member, stored: Stored) -> None:
        self._deliver(member, stored)

    def _result(self, member: Member, result: Input) -> None:
        self._deliver(member, Delivery(input=result, now_s=self.local_s(member)))

    def _timer_due(self, member: Member, timer: Timer) -> None:
        local_s = self.local_s(member)
        if local_s < timer.due_s - 1e-6:  # Its clock was set back meanwhile.
            self.schedule(self.now_s + timer.due_s - local_s, self._timer_due, member, timer)
            return
        self._deliver(member, Delivery(input=timer.input, now_s=timer.due_s))

    def _deliver(self, member: Member, item: Delivery | Stored) -> None:
        if member.is_active and member.in_flight is None and not member.waiting:
            self._handle(member, item)
            return
        member.waiting.append(item)
        self._work(member)

    def _work(self, member: Member) -> None:
        """Handle what waits, one after another; an append in flight holds up the rest."""
        while member.is_active and member.in_flight is None and member.waiting:
            self._handle(member, member.waiting.popleft())

    def _handle(self, member: Member, item: Delivery | Stored) -> None:
        processor = member.processor
        assert processor is not None, member.writer
        self.counters.delivered_count += 1
        if member.trap is not None and self._springs(member, Point.BEFORE_HANDLE):
            return
        if isinstance(item, Stored):
            self.follow_time(member, item.time_s)
            if processor.is_own(item):
                if item.seq > processor.last_seq and not processor.knows(item.id):
                    self.supersede(member)
                return
            processor.receive_stored(item)
            member.service.check_invariants(processor.state)
        else:
            processor.receive(item, handled_s=self.local_s(member))
        batch = processor.batch
        if not batch.entries and not batch.released:
            return
        if batch.entries:
            member.service.check_invariants(processor.state)
        if member.trap is not None and self._springs(member, Point.AFTER_HANDLE):
            return
        for released in [r for r in batch.released if isinstance(r.outcome, Order) and r.outcome.goes_ahead]:
            batch.released.remove(released)
            self._release(member, released)
            if member.trap is not None and self._springs(member, Point.AFTER_AHEAD):
                return
        if not batch.is_empty:
            self._commit(member, processor.take_batch())

    def _springs(self, member: Member, point: Point) -> bool:
        """If its trap is set at this point, it kills the member."""
        if member.trap is not point:
            return False
        self.counters.tripped[point] = self.counters.tripped.get(point, 0) + 1
        self.crash(member.name, down_s=member.trap_down_s)
        return True

    # --- Commits ------------------------------------------------------------------------------------------------------

    def _commit(self, member: Member, batch: Batch, *, is_start: bool = False) -> None:
        if member.is_journaled:
            self._commit_to_journal(member, batch, is_start=is_start)
            return
        if not batch.entries:
            self._release_all(member, batch)
            return
        processor = member.processor
        assert processor is not None, member.writer
        member.in_flight = batch

        def acknowledged(_: Any, seq: int) -> None:
            self._acknowledged(member, batch, seq, is_start=is_start)

        self.wire.append(member, batch.entries, processor.last_seq, acknowledged)
        self._springs(member, Point.AFTER_SEND)

    def _commit_to_journal(self, member: Member, batch: Batch, *, is_start: bool) -> None:
        member.journal.extend(batch.entries)
        if batch.entries and member.trap is not None and self._springs(member, Point.AFTER_SEND):
            return
        if is_start:
            member.in_flight = batch
            self.wire.upload(member, lambda seq: self._acknowledged(member, batch, seq, is_start=True))
            return
        self.wire.upload(member)
        self._release_all(member, batch)

    def offer_snapshot(self, member: Member) -> None:
        processor = member.processor
        is_quiet = member.is_active and member.in_flight is None and not member.waiting
        if is_quiet and processor is not None and member.uploaded_count == len(member.journal):
            self.snapshots.offer(processor)

    def _acknowledged(self, member: Member, batch: Batch, last_seq: int, *, is_start: bool) -> None:
        processor = member.processor
        assert processor is not None, member.writer
        member.in_flight = None
        processor.committed(batch, last_seq=last_seq)
        if not is_start:
            self._release_all(member, batch)
            self._work(member)
            self.offer_snapshot(member)
            return
        member.is_active = True
        processor.started(writer_epoch=last_seq)
        processor.catch_up(entries_max=sys.maxsize)
        member.service.check_invariants(processor.state)
        first = processor.take_batch()
        if not first.is_empty:
            self._commit(member, first)
        if not member.is_active:
            return
        if member.service.inbox_cursor is not None:
            member.inbox_position = member.service.inbox_cursor(processor.state)
            self.read_inbox(member, None)
        self.wire.read_on(member)
        self._work(member)

    # --- Outcomes -----------------------------------------------------------------------------------------------------

    def _release_all(self, member: Member, batch: Batch) -> None:
        if member.trap is not None and batch.entries and self._springs(member, Point.AFTER_COMMIT):
            return
        for released in batch.released:
            self._release(member, released)
            if member.trap is not None and self._springs(member, Point.MID_RELEASE):
                return

    def _release(self, member: Member, released: Released) -> None:
        outcome = released.outcome
        if isinstance(outcome, Reply):
            self.replies.append(outcome)
        elif isinstance(outcome, Order | Signal):
            self.fleeting(outcome, member)
        elif isinstance(outcome, Timer):
            due_s = self.now_s + max(0.0, outcome.due_s - self.local_s(member))
            self.schedule(due_s, self._timer_due, member, outcome)
        else:
            self._begin(member, outcome)

    def _begin(self, member: Member, effect: Effect) -> None:
        assert member.world is not None, f"{member.writer} has effects but no world"
        life = member.life

        def done(after_s: float, result: Input) -> None:
            self.schedule(self.now_s + after_s, self._result, member, result, life)

        member.world.perform(effect, done)

    # --- Checks -------------------------------------------------------------------------------------------------------

    def check_replay(self) -> None:
        """A fold from zero gives every quiet member's live state, byte for byte."""
        for member in self.members.values():
            self.check_replay_of(member)

    def check_replay_of(self, member: Member) -> None:
        """Nothing to compare while something is on its way, or after another instance has written."""
        live = member.processor
        if live is None or not member.is_active or member.is_paused or member.in_flight is not None or member.waiting:
            return
        if live.batch.entries or (not member.is_journaled and self.history.last_seq(live.prefix) != live.last_seq):
            return
        self.history.check_replay(member, live, self.snapshots)

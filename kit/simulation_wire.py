"""How members reach the stream of a simulation: appends that may be lost or refused, journals, and reading in order."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kit.bus import Entry, Stored
from kit.simulation_members import Action, Member, Party
from schemas.catalogue import decode
from schemas.messages import Fact, prefix_of

if TYPE_CHECKING:
    from kit.simulation import Simulation


class Wire:
    """Between the members and `Simulation.history`."""

    def __init__(self, simulation: "Simulation") -> None:
        self._sim = simulation

    def append(self, member: Member, entries: Sequence[Entry], last_seq: int, then: Action) -> None:
        """One attempt on its way to the stream; the same bytes again when its ack is lost.

        Bytes on their way arrive although their writer dies, even after its next life has begun: the stream accepts
        them or refuses them by the sequence that they name, and whoever is refused while it lives rebuilds itself.
        """
        life = member.life
        prefix = prefix_of(member.writer)

        def again(_: Any, __: Any) -> None:
            self._sim.after(self._sim.latency_s(member), arrive)

        def arrive() -> None:
            if not self._sim.is_heard(member):
                self._sim.counters.unknown_count += 1
                self._sim.schedule(self._sim.now_s + self._sim.faults.resend_s, again, member, None, life)
                return
            newest = self._sim.history.newest(prefix)
            if newest is not None and newest.id == entries[-1].id:
                seq = newest.seq
            elif (newest.seq if newest else 0) == last_seq:
                seq = self._store(entries)
            else:
                self._sim.counters.refused_count += 1
                self._sim.schedule(self._sim.now_s + self._sim.latency_s(member), refused, member, None, life)
                return
            if self._sim.random.random() < self._sim.faults.ack_lost_fraction or not self._sim.hears(member):
                self._sim.counters.unknown_count += 1
                self._sim.schedule(self._sim.now_s + self._sim.faults.resend_s, again, member, None, life)
            else:
                self._sim.schedule(self._sim.now_s + self._sim.latency_s(member), then, member, seq, life)

        def refused(_: Any, __: Any) -> None:
            self._sim.supersede(member)

        self._sim.after(self._sim.latency_s(member), arrive)

    def upload(self, member: Member, then: Callable[[int], None] | None = None) -> None:
        """Bring the journal's surplus into the stream, in order, one append in flight."""
        if member.is_uploading or member.uploaded_count >= len(member.journal):
            if then is not None:
                again: Action = lambda _, __: self.upload(member, then)  # noqa: E731
                self._sim.schedule(self._sim.now_s + self._sim.faults.latency_s, again, member, None)
            return
        processor = member.processor
        assert processor is not None, member.writer
        last_seq = self._sim.history.last_seq(processor.prefix)
        while (
            member.uploaded_count < len(member.journal)
            and member.journal[member.uploaded_count].id in self._sim.history.ids
        ):
            member.uploaded_count += 1
        entries = member.journal[member.uploaded_count :]
        if not entries:
            if then is not None:
                then(last_seq)
            return
        member.is_uploading = True

        def stored(_: Any, seq: int) -> None:
            member.is_uploading = False
            member.uploaded_count += len(entries)
            processor.last_seq = seq
            if then is not None:
                then(seq)
            elif member.uploaded_count < len(member.journal):
                self.upload(member)
            else:
                self._sim.offer_snapshot(member)

        self.append(member, entries, last_seq, stored)

    def _store(self, entries: Sequence[Entry]) -> int:
        for stored in self._sim.history.store(entries, now_s=self._sim.now_s):
            self._sim.counters.appended_count += 1
            if self._sim.on_stored:
                fact = decode(stored.body)
                assert isinstance(fact, Fact), fact
                for listen in self._sim.on_stored:
                    listen(stored, fact)
            for party in self._sim.history.readers(stored.subject):
                if party.is_reading and not stored.id.startswith(party.own_mark):
                    self._send_on(party, stored)
        return len(self._sim.stream)

    def _send_on(self, party: Party, stored: Stored) -> None:
        party.next_arrival_s = max(party.next_arrival_s, self._sim.now_s + self._sim.latency_s(party))
        self._sim.schedule(party.next_arrival_s, party.receive, party, stored)

    def read_on(self, party: Party) -> None:
        """Send what it has not read on its way, and from now on everything new."""
        if party.is_reading or not self._sim.hears(party):
            return
        party.is_reading = True
        for index in range(party.position, len(self._sim.stream)):
            stored = self._sim.stream[index]
            if party in self._sim.history.readers(stored.subject) and not stored.id.startswith(party.own_mark):
                self._send_on(party, stored)

    def stop_reading(self, party: Party) -> None:
        """It keeps its place, and reads on from there when it can."""
        if party.is_reading:
            party.is_reading = False
            party.position = len(self._sim.stream)

"""The log processor: folds history in handling order, hands inputs to the core, and prepares its facts for the stream.

Pure and synchronous; `kit.runner` and `kit.simulation` drive it. Facts are folded when they are decided; whatever else
was decided (orders, effects, timers, replies) waits in a `Batch` until its facts are committed. Only an order that
`goes_ahead` may leave before.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar, cast

from msgspec import Struct, structs

from kit.bus import Entry, Stored, subject_matches
from kit.outcomes import Context, Effect, Input, Outcome, Reply, Timer, Under
from kit.service import Service
from kit.snapshots import (
    FORMAT_VERSION,
    OWN_IDS_MAX,
    Position,
    Snapshot,
    check_fit,
    encode_state,
    restore_state,
    state_types,
)
from schemas.catalogue import UnreadableMessage, decode, encode
from schemas.history import Progressed, WriterStarted
from schemas.messages import Command, Fact, Order, Signal, fact_subject, prefix_of

S = TypeVar("S")

CHAIN_START: Final = "0"
"""Previous hash of the first fact of a prefix."""
SILENT_INPUTS_MAX: Final = 1000
"""After this many foreign facts without one of its own a writer appends `Progressed`, so that replay is bounded."""


def chain_hash(previous_hash: str, *, id: str, subject: str, body: bytes) -> str:
    """The hash that the next fact of the prefix must name: 16 bytes of BLAKE2b over the previous hash and this fact.

    Id, subject and body each behind their length, in four bytes.
    """
    id_bytes, subject_bytes = id.encode(), subject.encode()
    lengths = len(id_bytes), len(subject_bytes), len(body)
    hashed = b"%b%b%b%b%b%b%b" % (
        previous_hash.encode(),
        lengths[0].to_bytes(4, "big"),
        id_bytes,
        lengths[1].to_bytes(4, "big"),
        subject_bytes,
        lengths[2].to_bytes(4, "big"),
        body,
    )
    return hashlib.blake2b(hashed, digest_size=16).hexdigest()


class Delivery(Struct, frozen=True, kw_only=True):
    """One input on its way to the core. A Struct: one is made for every input, at a tenth of the cost."""

    input: Any
    now_s: float
    cause_seq: int = 0
    inbox_seq: int = 0
    tenant: str = ""
    traceparent: str = ""


class Released(Struct, frozen=True, kw_only=True):
    """An outcome that is no fact, with the trace that it continues."""

    outcome: Order | Signal | Effect | Timer | Reply
    traceparent: str


@dataclass(slots=True)
class Batch:
    """What was decided since the last commit. `released` leaves when `entries` are acknowledged."""

    entries: list[Entry] = field(default_factory=list)
    released: list[Released] = field(default_factory=list)
    last_input_start: int = 0
    """Where the entries of the input that was handled last begin."""

    @property
    def is_empty(self) -> bool:
        return not self.entries and not self.released


@dataclass(slots=True)
class _Foreign:
    """Others' facts that were read but not yet folded or handled."""

    stored: Stored
    fact: Fact


class Processor(Generic[S]):
    """One writer's state and its place in history."""

    def __init__(self, service: Service[S], settings: Any, *, writer: str, instance: str, machine_id: str = "") -> None:
        """`machine_id` goes into `WriterStarted`; empty for a writer that may run anywhere."""
        self.service = service
        self.writer = writer
        self.prefix = prefix_of(writer)
        self._own_start = self.prefix.removesuffix(">")
        self.instance = instance
        self.machine_id = machine_id
        self.state: S = service.new_state(settings)
        self.writer_epoch = 0
        self.last_seq = 0
        """Newest sequence known under the own prefix, valid or not: what the next append must name."""
        self.cursor_seq = 0
        """Sequence of the last foreign fact that was handled."""
        self.read_seq = 0
        """All of the stream up to here that concerns this writer was handed to it and, unless it waits, folded."""
        self.stream_id = ""
        """Which stream all these sequences are of; the shell sets it."""
        self.last_machine_id = ""
        """On which machine this prefix's newest `WriterStarted` was written."""
        self.last_hash = CHAIN_START
        self.now_s = 0.0
        self.skipped_count = 0
        """Facts that no fold accepted: unreadable, or not continuing their prefix's chain."""
        self.refused_order_count = 0
        """Orders of superseded writers, and orders that came too late; never carried out."""
        self._own_ids: deque[str] = deque(maxlen=10_000)
        self.reads = tuple(service.reads(writer.removeprefix("node.") if writer.startswith("node.") else ""))
        """Subject filters of the foreign facts that this service follows."""
        self._foreign_hashes: dict[str, str] = {}
        self._writer_epochs: dict[str, int] = {}
        """{writer: the newest epoch that its `WriterStarted`, or an order, told}"""
        self._complete: dict[str, bool] = {}
        """{writer: whether all of its prefix is read}; only then can its chain be followed."""
        self._concerns: dict[str, bool] = {}
        """{subject: whether it concerns this writer}; subjects name writers, kinds and shards, so they are few."""
        self._waiting: deque[_Foreign] = deque()
        self._entry_count = 0
        self._silent_count = 0
        self.batch = Batch()
        """What was decided since the last `take_batch`."""

    # --- Rebuilding ---------------------------------------------------------------------------------------------------

    def replay(self, history: Iterable[Stored]) -> None:
        """Fold history in the order in which this writer handled it.

        Foreign facts beyond its last cursor stay inputs.
        """
        for stored in history:
            self.replay_one(stored)

    def replay_one(self, stored: Stored) -> None:
        self.read_seq = stored.seq
        if not self.concerns(stored.subject):
            return
        if not self.is_own(stored):
            foreign = self._accept_foreign(stored)
            if foreign is not None:
                self._waiting.append(foreign)
            return
        if stored.seq <= self.last_seq:
            return  # In the snapshot that this replay began from.
        self.last_seq = stored.seq
        self.replay_own(stored, seq=stored.seq)

    def replay_own(self, entry: Entry | Stored, *, seq: int) -> bool:
        """Fold one own fact from the stream or from a journal; False when its hash does not continue the chain."""
        if entry.previous_hash != self.last_hash:
            self.skipped_count += 1
            return False
        # Also when it cannot be read: whoever reads this prefix follows the chain over it, and so must its writer.
        self.last_hash = chain_hash(self.last_hash, id=entry.id, subject=entry.subject, body=entry.body)
        self._own_ids.append(entry.id)
        fact = _readable_fact(entry.body)
        if fact is None:
            self.skipped_count += 1
            return False
        self.fold_foreign_to(entry.cursor_seq)
        if isinstance(fact, WriterStarted):
            self.writer_epoch = seq
            self.last_machine_id = fact.machine_id
        self._advance(getattr(fact, "at_s", 0.0))
        self.service.evolve(self.state, fact)
        return True

    def fold_foreign_to(self, cursor_seq: int) -> None:
        while self._waiting and self._waiting[0].stored.seq <= cursor_seq:
            foreign = self._waiting.popleft()
            self._advance(foreign.stored.time_s)
            self.service.evolve(self.state, foreign.fact)
        self.cursor_seq = max(self.cursor_seq, cursor_seq)

    def knows(self, entry_id: str) -> bool:
        """True for an own fact that is part of the folded state (of the last 10,000)."""
        return entry_id in self._own_ids

    def own_ids(self) -> frozenset[str]:
        """All that `knows` knows, for many questions at once."""
        return frozenset(self._own_ids)

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def mark_progress(self) -> None:
        """Append `Progressed`: a snapshot is taken at an own fact, and one that moves on may be trimmed below."""
        self._silent_count = 0
        self._append(Progressed(at_s=self.now_s), cause_seq=0, traceparent="")

    def snapshot(self) -> Snapshot:
        """The state as it is. Only while nothing waits: every own fact acknowledged, every decision released."""
        assert self.batch.is_empty
        assert not self._waiting
        position = Position(
            format_version=FORMAT_VERSION,
            service=self.service.name,
            writer=self.writer,
            state_version=self.service.state_version,
            state_types=state_types(self.state),
            stream_id=self.stream_id,
            read_seq=self.read_seq,
            last_seq=self.last_seq,
            cursor_seq=self.cursor_seq,
            last_hash=self.last_hash,
            writer_epoch=self.writer_epoch,
            now_s=self.now_s,
            machine_id=self.last_machine_id,
        )
        return Snapshot(
            position=position,
            foreign_hashes=dict(self._foreign_hashes),
            writer_epochs=dict(self._writer_epochs),
            own_ids=list(self._own_ids)[-OWN_IDS_MAX:],
            state=encode_state(self.state),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Begin there instead of at the start of history; replay what follows `read_seq`.

        For a new processor. Raises `SnapshotUnusable`; this processor must then not be used.
        """
        position = snapshot.position
        check_fit(position, self.service, self.state, writer=self.writer)
        restore_state(self.state, snapshot.state)
        self.stream_id = position.stream_id
        self.read_seq, self.last_seq, self.cursor_seq = position.read_seq, position.last_seq, position.cursor_seq
        self.last_hash, self.writer_epoch = position.last_hash, position.writer_epoch
        self.now_s, self.last_machine_id = position.now_s, position.machine_id
        self._foreign_hashes = dict(snapshot.foreign_hashes)
        self._writer_epochs = dict(snapshot.writer_epochs)
        self._own_ids.extend(snapshot.own_ids)

    # --- Taking over --------------------------------------------------------------------------------------------------

    def take_over(self, *, now_s: float) -> Batch:
        """The batch that makes this instance the writer; call `started` with its sequence once it is acknowledged."""
        self._advance(now_s)
        self.last_machine_id = self.machine_id
        started = WriterStarted(instance=self.instance, at_s=self.now_s, machine_id=self.machine_id)
        self._append(started, cause_seq=0, traceparent="")
        return self.take_batch()

    def started(self, *, writer_epoch: int) -> None:
        """This writer has taken over: re-issue what is unfinished. Call `catch_up` next."""
        self.writer_epoch = writer_epoch
        nothing = Delivery(input=None, now_s=self.now_s)
        self._collect(self.service.on_start(self.state, self._context(nothing)), nothing)

    def catch_up(self, *, entries_max: int) -> bool:
        """Handle what came beyond the last cursor, until the batch holds `entries_max`; True when nothing is left.

        Commit between two calls: one handled input is never spread over two appends.
        """
        while self._waiting and len(self.batch.entries) < entries_max:
            self._handle_foreign(self._waiting.popleft())
        return not self._waiting

    # --- Handling -----------------------------------------------------------------------------------------------------

    def is_own(self, stored: Stored) -> bool:
        return stored.subject.startswith(self._own_start)

    def concerns(self, subject: str) -> bool:
        """True for the own prefix and for what the service follows; a reader may be handed more than that."""
        known = self._concerns.get(subject)
        if known is None:
            known = any(subject_matches(pattern, subject) for pattern in (self.prefix, *self.reads))
            self._concerns[subject] = known
        return known

    def is_mine(self, entry_id: str) -> bool:
        """True for ids that this very instance made."""
        return entry_id.startswith(f"{self.writer}:{self.instance}:")

    def receive_stored(self, stored: Stored) -> None:
        """Handle one foreign fact from the live stream."""
        self.read_seq = stored.seq
        foreign = self._accept_foreign(stored)
        if foreign is not None:
            self._handle_foreign(foreign)

    def receive(self, delivery: Delivery, *, handled_s: float | None = None) -> str:
        """Handle one input that is no fact: a command, a signal, an order, a timer's input, an effect's result.

        `handled_s`: the time now, where the input waited since its arrival (`delivery.now_s`). The answer is '' or why
        an order was refused: its writer was superseded, or it waited longer than its deadline.
        """
        if isinstance(delivery.input, Order):
            waited_s = (delivery.now_s if handled_s is None else handled_s) - delivery.now_s
            refusal = self._refusal(delivery.input, waited_s=waited_s)
            if refusal:
                self.refused_order_count += 1
                return refusal
        self._advance(delivery.now_s)
        self.batch.last_input_start = len(self.batch.entries)
        kind = type(delivery.input)
        observe = self.service.observers.get(kind)
        if observe is not None:
            observe(self.state, delivery.input, self.now_s)
        handler = self.service.handlers.get(kind)
        if handler is None:
            assert not isinstance(delivery.input, Command | Input), (
                f"{self.service.name} has no handler for {kind.__name__}"
            )
            return ""
        self._collect(handler(self.state, delivery.input, self._context(delivery)), delivery)
        return ""

    def take_batch(self) -> Batch:
        """Everything decided since the last call; hand its entries to the stream before releasing the rest."""
        batch, self.batch = self.batch, Batch()
        return batch

    def committed(self, batch: Batch, *, last_seq: int) -> None:
        """The stream holds the batch."""
        if batch.entries:
            self.last_seq = last_seq

    # --- Inside -------------------------------------------------------------------------------------------------------

    def _refusal(self, order: Order, *, waited_s: float) -> str:
        newest = self._learn_epoch(order.writer, order.writer_epoch)
        if order.writer_epoch < newest:
            return f"{order.writer} of epoch {order.writer_epoch} was superseded by {newest}"
        if waited_s * 1000 > order.deadline_ms:
            return f"it waited {waited_s:.3f} s, longer than its deadline of {order.deadline_ms} ms"
        return ""

    def _learn_epoch(self, writer: str, epoch: int) -> int:
        """The newest epoch of this writer that is known now."""
        newest = max(epoch, self._writer_epochs.get(writer, 0))
        self._writer_epochs[writer] = newest
        return newest

    def _accept_foreign(self, stored: Stored) -> _Foreign | None:
        """The fact, unless it is unreadable or does not continue a chain that this service reads completely."""
        writer = writer_of(stored.subject)
        if stored.id and self._reads_all_of(writer):
            if self._foreign_hashes.get(writer, CHAIN_START) != stored.previous_hash:
                self.skipped_count += 1
                return None
            self._foreign_hashes[writer] = chain_hash(
                stored.previous_hash, id=stored.id, subject=stored.subject, body=stored.body
            )
        elif not stored.id:
            self.skipped_count += 1
            return None
        fact = _readable_fact(stored.body)
        if fact is None:
            self.skipped_count += 1
            return None
        if getattr(fact, "at_s", 0.0) > stored.time_s:
            # Its writer's clock is ahead. Nothing is decided after it is stored, so the stream's time is nearer; else
            # a time that lies in the future would hold up whoever waits until it has passed.
            fact = structs.replace(fact, at_s=stored.time_s)
        if isinstance(fact, WriterStarted):
            # At once, not when it is handled: no order of an older instance may slip through in between.
            self._learn_epoch(writer, stored.seq)
        return _Foreign(stored, fact)

    def _reads_all_of(self, writer: str) -> bool:
        known = self._complete.get(writer)
        if known is None:
            probes = (f"sublet.fact.{writer}.any", f"sublet.fact.{writer}.any.any")
            known = any(all(subject_matches(pattern, probe) for probe in probes) for pattern in self.reads)
            self._complete[writer] = known
        return known

    def _handle_foreign(self, foreign: _Foreign) -> None:
        stored = foreign.stored
        delivery = Delivery(
            input=foreign.fact, now_s=stored.time_s, cause_seq=stored.seq, traceparent=stored.traceparent
        )
        self._advance(stored.time_s)
        self.batch.last_input_start = len(self.batch.entries)
        self.cursor_seq = stored.seq
        self.service.evolve(self.state, foreign.fact)
        handler = self.service.handlers.get(type(foreign.fact))
        before_count = self._entry_count
        if handler is not None:
            self._collect(handler(self.state, foreign.fact, self._context(delivery)), delivery)
        self._silent_count = 0 if self._entry_count > before_count else self._silent_count + 1
        if self._silent_count >= SILENT_INPUTS_MAX:
            self.mark_progress()

    def _advance(self, now_s: float) -> None:
        self.now_s = max(self.now_s, now_s)

    def _context(self, delivery: Delivery) -> Context:
        return Context(
            now_s=self.now_s,
            writer_epoch=self.writer_epoch,
            cause_seq=delivery.inbox_seq or delivery.cause_seq,
            tenant=delivery.tenant,
            traceparent=delivery.traceparent,
        )

    def _collect(self, outcomes: Sequence[Outcome], delivery: Delivery) -> None:
        for outcome in outcomes:
            traceparent = delivery.traceparent
            plain = outcome
            if isinstance(outcome, Under):
                traceparent, plain = outcome.traceparent, outcome.outcome
            if isinstance(plain, Fact):
                body = self._append(plain, cause_seq=delivery.cause_seq, traceparent=traceparent)
                # Folded as it will be read back, so that replay cannot differ by what JSON does to a value.
                self.service.evolve(self.state, cast(Fact, decode(body)))
            else:
                assert isinstance(plain, Order | Signal | Effect | Timer | Reply), plain
                self.batch.released.append(Released(outcome=plain, traceparent=traceparent))

    def _append(self, fact: Fact, *, cause_seq: int, traceparent: str) -> bytes:
        subject = fact_subject(self.writer, fact)
        body = encode(fact)
        entry = Entry(
            subject=subject,
            body=body,
            id=f"{self.writer}:{self.instance}:{self._entry_count}",
            cause_seq=cause_seq,
            cursor_seq=self.cursor_seq,
            previous_hash=self.last_hash,
            traceparent=traceparent,
        )
        self._entry_count += 1
        self.last_hash = chain_hash(self.last_hash, id=entry.id, subject=subject, body=body)
        self._own_ids.append(entry.id)
        self.batch.entries.append(entry)
        return body


@lru_cache(maxsize=50_000)
def writer_of(subject: str) -> str:
    """``placement`` or ``node.<node>``, from a fact's subject."""
    tokens = subject.split(".")
    return ".".join(tokens[2:4]) if tokens[2] == "node" else tokens[2]


def _readable_fact(body: bytes) -> Fact | None:
    """None for what is no fact of ours. Raises `UnknownVersion`."""
    try:
        fact = decode(body)
    except UnreadableMessage:
        return None
    return fact if isinstance(fact, Fact) else None

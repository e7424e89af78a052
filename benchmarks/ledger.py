"""Writers whose every fact is accounted for: what was sent, what was acknowledged, and the state after each fact.

The append path is the real one (`kit.processor`, `kit.commit`, `kit.history`, `kit.journal`); the service is the
smallest whose state depends on the order of all its facts. What a stream holds later is compared with the accounts.
"""

import hashlib
import itertools
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

import anyio

from kit.bus import Bus, CaughtUp, Stored, Stream
from kit.commit import Committer, DirectCommitter, JournaledCommitter
from kit.journal import Journal
from kit.outcomes import Context, Input
from kit.processor import Delivery, Processor
from kit.rebuild import rebuilt
from kit.service import Service
from kit.snapshot_store import SnapshotStore
from schemas.autoscaler import ReplicasDecided

BATCH_FACTS_MAX = 8
BATCHES_PER_SNAPSHOT = 10
NOTHING_FOLDED = "nothing"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class LedgerState:
    """Equal for two folds only if they folded the same facts in the same order."""

    fact_count: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deposit(Input):
    reason: str


def ledger() -> Service[LedgerState]:
    """Answers each deposit with one fact."""
    service: Service[LedgerState] = Service(name="ledger", new_state=lambda _: LedgerState(), reads=lambda _: ())

    @service.folding(ReplicasDecided)
    def fold(state: LedgerState, fact: ReplicasDecided) -> None:
        state.fact_count += 1
        state.digest = hashlib.blake2b(f"{state.digest}{fact.reason}".encode(), digest_size=8).hexdigest()

    @service.on(Deposit)
    def deposit(state: LedgerState, deposit: Deposit, ctx: Context) -> Sequence[ReplicasDecided]:
        fact = ReplicasDecided(at_s=ctx.now_s, deployment_id="d", model="m", replica_count=1, reason=deposit.reason)
        return [fact]

    return service


@dataclass(slots=True)
class Account:
    """What one writer did in all its lives."""

    writer: str
    sent: dict[str, str] = field(default_factory=dict)
    """{entry id: the live state after that fact}, in the order in which they were sent."""
    acknowledged: list[str] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)
    """Ids that were sent together."""
    gaps_s: list[float] = field(default_factory=list)
    """How long each append took until it was certain."""

    def torn_batches(self, found: "Found") -> list[list[str]]:
        """Batches of which a part is there."""
        present = set(found.ids)
        return [batch for batch in self.batches if 0 < len(present.intersection(batch)) < len(batch)]

    async def until_appended(self, count: int) -> None:
        """Returns when so many appends have been acknowledged."""
        while len(self.gaps_s) < count:  # noqa: ASYNC110  (an event for each append would slow them down)
            await anyio.sleep(0.05)

    def problems(self, found: "Found") -> list[str]:
        """What of this account the stream, and the journal behind it, do not hold as they must. One line for each."""
        if found.problem:
            return [f"{self.writer}: {found.problem}"]
        present = set(found.ids)
        lost = [entry_id for entry_id in self.acknowledged if entry_id not in present]
        told = [f"{self.writer}: acknowledged, but lost: {entry_id}" for entry_id in lost]
        told += [f"{self.writer}: never sent: {entry_id}" for entry_id in found.ids if entry_id not in self.sent]
        wanted = [entry_id for entry_id in self.acknowledged if entry_id in present]
        held = set(self.acknowledged)
        if wanted != [entry_id for entry_id in found.ids if entry_id in held]:
            told.append(f"{self.writer}: acknowledged facts are in another order")
        if found.snapshot_digest not in ("", found.stream_digest):
            told.append(f"{self.writer}: a start from a snapshot has another state than one from all of history")
        if found.ids and self.sent.get(found.ids[-1]) not in (None, found.digest):
            told.append(f"{self.writer}: the folded state differs from the live one at {found.ids[-1]}")
        return told


@dataclass(slots=True)
class Found:
    """What a new life found of its writer's facts, folded by a fresh processor: ids in order, and the state."""

    ids: list[str] = field(default_factory=list)
    digest: str = ""
    stream_digest: str = ""
    """Before the journal's surplus was folded."""
    snapshot_digest: str = ""
    """The same of another fresh processor, which began at the newest snapshot; empty where there is none."""
    problem: str = ""
    """Why the journal could not even be read."""


@dataclass(slots=True)
class Writer:
    """One life of a writer, from its replay on."""

    account: Account
    processor: Processor[LedgerState]
    committer: Committer
    found: Found
    random: random.Random
    snapshots: SnapshotStore | None = None
    """Kept by writers without a journal."""

    async def take_over(self) -> None:
        batch = self.processor.take_over(now_s=time.time())
        self._note_sent(batch.entries[0].id)
        epoch = await self.committer.commit_durably(batch)
        self.account.acknowledged.append(batch.entries[0].id)
        self.processor.started(writer_epoch=epoch)

    async def work(self, *, pause_s: float = 0.0) -> None:
        """Appends batches of a few facts, one after the other, for ever."""
        for number in itertools.count(1):
            await self.append(self.random.randint(1, BATCH_FACTS_MAX))
            if self.snapshots is not None and number % BATCHES_PER_SNAPSHOT == 0:
                await self.snapshots.save(self.processor.snapshot())
            await anyio.sleep(pause_s)

    async def append(self, count: int) -> None:
        """One batch, until it is durable."""
        for _ in range(count):
            deposit = Deposit(reason=self.random.randbytes(self.random.randint(8, 200)).hex())
            self.processor.receive(Delivery(input=deposit, now_s=time.time()))
            self._note_sent(self.processor.batch.entries[-1].id)
        batch = self.processor.take_batch()
        self.account.batches.append([entry.id for entry in batch.entries])
        began_s = time.monotonic()
        await self.committer.commit(batch)
        self.account.gaps_s.append(time.monotonic() - began_s)
        self.account.acknowledged += [entry.id for entry in batch.entries]

    def _note_sent(self, entry_id: str) -> None:
        self.account.sent[entry_id] = self.processor.state.digest


@asynccontextmanager
async def living(
    account: Account,
    bus: Bus,
    instance: str,
    *,
    seed: int,
    journal: Journal | None = None,
    keeps_snapshots: bool = False,
) -> AsyncIterator[Writer]:
    """A new life: history is read and folded, then the journal's surplus. What it found is not yet judged."""

    def new_processor() -> Processor[LedgerState]:
        return Processor(ledger(), None, writer=account.writer, instance=instance)

    processor, found = new_processor(), Found()
    await _replay(bus, processor, found)
    snapshots = SnapshotStore(bus, account.writer) if keeps_snapshots else None
    if snapshots is not None and await snapshots.found():
        async with AsyncExitStack() as stack:
            other, _, _ = await rebuilt(bus, new_processor, snapshots, stack=stack, follow=_ignore, log=log)
        found.snapshot_digest = other.state.digest or NOTHING_FOLDED
    committer: Committer = DirectCommitter(bus, processor)
    if journal is not None:
        surplus = [entry.id for entry in journal.entries if not processor.knows(entry.id)]
        committer = JournaledCommitter(bus, processor, journal, passed=_nothing_at_steps)
        await committer.recover()
        found.ids += [entry_id for entry_id in surplus if processor.knows(entry_id)]
    found.digest = processor.state.digest
    async with anyio.create_task_group() as tg:
        await committer.start(tg)
        yield Writer(account, processor, committer, found, random.Random(seed), snapshots)
        tg.cancel_scope.cancel()


async def _replay(bus: Bus, processor: Processor[LedgerState], found: Found) -> None:
    async with aclosing(bus.read(Stream.HISTORY, [processor.prefix], after_seq=0)) as reading:
        async for item in reading:
            if isinstance(item, CaughtUp):
                processor.stream_id = item.stream_id
                break
            skipped_count = processor.skipped_count
            processor.replay_one(item)
            if processor.skipped_count == skipped_count:
                found.ids.append(item.id)
    found.stream_digest = processor.state.digest or NOTHING_FOLDED


def _ignore(_: Stored) -> None:
    return None


async def _nothing_at_steps(step: object, what: object) -> None:
    return None


async def read_all(bus: Bus, filters: Sequence[str]) -> AsyncIterator[Stored]:
    """History up to now."""
    async with aclosing(bus.read(Stream.HISTORY, filters, after_seq=0)) as reading:
        async for item in reading:
            if isinstance(item, CaughtUp):
                return
            yield item


def oracle(history: Sequence[Stored]) -> list[str]:
    """What is wrong with a stream's chains, found without any of the code that folds them.

    Under each prefix the facts form one line: each names the hash of the one before it, so no place has two. Folds skip
    a fact that names another; the append check should not even have let it in, so here it is a problem.
    """
    told: list[str] = []
    last: dict[str, str] = {}
    seen: set[str] = set()
    for stored in history:
        tokens = stored.subject.split(".")
        writer = ".".join(tokens[2:4]) if tokens[2] == "node" else tokens[2]
        if stored.id in seen:
            told.append(f"{stored.id} is there twice")
        elif stored.previous_hash != last.get(writer, "0"):
            told.append(f"{stored.id} does not continue the facts before it")
        else:
            last[writer] = _hash_after(stored)
        seen.add(stored.id)
    return told


def _hash_after(stored: Stored) -> str:
    """Written anew from the words of `kit.processor.chain_hash`, so that a mistake there is found here."""
    parts = (stored.id.encode(), stored.subject.encode(), stored.body)
    text = stored.previous_hash.encode() + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.blake2b(text, digest_size=16).hexdigest()

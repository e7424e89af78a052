"""Stand-ins for node agents: hundreds in one process, which grant whatever is proposed and start nothing.

Each has its own prefix, chain and place in history, as a real one: one append in flight, and what comes meanwhile
leaves with the next (group commit). All share one connection and one reader of placement's facts. A proposal is
answered with one `LeaseGranted`, and all that turned ready since the last append with one `ReplicaReady`; those of a
gang turn ready at `GangCommitted`. A release is answered with `LeaseReleased`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import anyio
from anyio.abc import TaskGroup

from benchmarks.made_history import joined
from kit.bus import APPEND_ENTRIES_MAX, Bus, Entry, Stored, Stream
from kit.history import append_surely
from kit.processor import CHAIN_START, chain_hash
from schemas.catalogue import decode, encode
from schemas.history import WriterStarted
from schemas.messages import Fact, fact_subject, prefix_of, signal_subject, token_of
from schemas.nodes import Lease, LeaseGranted, LeaseReleased, NodeAlive, Ready, ReplicaReady
from schemas.placement import (
    CommandRejected,
    GangAbandoned,
    GangCommitted,
    PlacementFailed,
    PlacementProposed,
    ReleaseProposed,
    ReplicaProposal,
)
from schemas.units import MiB

APPENDS_IN_FLIGHT_MAX: Final = 32
"""Of all nodes together. The server takes about 2 ms for a batch and acknowledges what one connection sent when it has
handled all of it: 500 batches at once are answered after a second, when every sender has given up and asks again."""
SINGLES_MAX: Final = 3
"""So few facts leave one by one: an atomic batch takes the server 2 ms whatever is in it, a single append 0.2 ms while
other nodes append too (measured, 2.15.1), and a node's facts need not be stored together."""
RESIDUE_BYTES: Final = 640 * MiB
ALIVE_EVERY_S: Final = 2.0
TO_NODES: Final = (PlacementProposed, ReleaseProposed, GangCommitted, GangAbandoned)
FOLLOWED: Final = (*TO_NODES, PlacementFailed, CommandRejected)


@dataclass(slots=True)
class StandIn:
    """One node: pure, so that it can be driven without a bus. `take` hands over what is to be appended."""

    number: int
    now_s: Callable[[], float] = time.time
    last_seq: int = 0
    writer_epoch: int = 0
    is_appending: bool = False
    _last_hash: str = CHAIN_START
    _count: int = 0
    _facts: list[tuple[Fact, int]] = field(default_factory=list)
    """(fact, the sequence of what it answers)"""
    _ready: list[Ready] = field(default_factory=list)
    _held: dict[str, tuple[ReplicaProposal, ...]] = field(default_factory=dict)
    """{gang_id: what was granted for it and waits}"""

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def writer(self) -> str:
        return f"node.{self.name}"

    @property
    def has_news(self) -> bool:
        return bool(self._facts or self._ready)

    def join(self) -> None:
        self._facts.append((WriterStarted(instance="stand-in", at_s=self.now_s()), 0))
        self._facts.append((joined(self.number), 0))

    def receive(self, fact: Fact, seq: int) -> None:
        """What placement said to this node."""
        match fact:
            case PlacementProposed():
                self._grant(fact, seq)
                if fact.gang_id:
                    self._held[fact.gang_id] = (*self._held.get(fact.gang_id, ()), *fact.replicas)
                else:
                    self._start(fact.replicas)
            case GangCommitted():
                self._start(self._held.pop(fact.gang_id, ()))
            case GangAbandoned():
                for replica in self._held.pop(fact.gang_id, ()):
                    self._release(replica.replica_id, fact.reason, seq)
            case ReleaseProposed():
                self._release(fact.replica_id, fact.reason, seq)
            case _:
                return

    def take(self) -> tuple[list[Entry], list[Ready]]:
        """What is to be appended, at most one batch of it, and the replicas that are ready once it is stored."""
        facts, self._facts = self._facts[: APPEND_ENTRIES_MAX - 1], self._facts[APPEND_ENTRIES_MAX - 1 :]
        entries = [self._entry(fact, cause_seq) for fact, cause_seq in facts]
        ready: list[Ready] = []
        if not self._facts and self._ready:
            ready, self._ready = self._ready, []
            entries.append(self._entry(ReplicaReady(node=self.name, at_s=self.now_s(), replicas=tuple(ready)), 0))
        return entries, ready

    def _grant(self, proposed: PlacementProposed, seq: int) -> None:
        leases = tuple(
            Lease(
                replica_id=share.replica_id,
                shard_index=share.shard_index,
                gpu_uuid=share.gpu_uuid,
                request_bytes=share.request_bytes,
                granted_bytes=share.request_bytes,
                limit_bytes=share.limit_bytes,
                residue_bytes=RESIDUE_BYTES,
                lease_epoch=seq,
            )
            for replica in proposed.replicas
            for share in replica.shares
        )
        granted = LeaseGranted(
            node=self.name,
            at_s=self.now_s(),
            proposal_id=proposed.proposal_id,
            leases=leases,
            replicas=proposed.replicas,
            gang_id=proposed.gang_id,
            gang_hold_s=proposed.gang_hold_s,
        )
        self._facts.append((granted, seq))

    def _start(self, replicas: Sequence[ReplicaProposal]) -> None:
        self._ready += [
            Ready(
                replica_id=replica.replica_id,
                deployment_id=replica.deployment_id,
                model=replica.deployment.name,
                endpoint=f"http://10.0.0.1:{20_000 + self._count % 40_000}",
                wake_epoch=1,
                start_s=0.0,
                enforced_bytes=replica.shares[0].limit_bytes,
            )
            for replica in replicas
        ]

    def _release(self, replica_id: str, reason: str, seq: int) -> None:
        released = LeaseReleased(node=self.name, at_s=self.now_s(), replica_id=replica_id, reason=reason)
        self._facts.append((released, seq))

    def _entry(self, fact: Fact, cause_seq: int) -> Entry:
        subject, body, entry_id = fact_subject(self.writer, fact), encode(fact), f"{self.writer}:stand-in:{self._count}"
        entry = Entry(
            subject=subject,
            body=body,
            id=entry_id,
            cause_seq=cause_seq,
            cursor_seq=cause_seq,
            previous_hash=self._last_hash,
        )
        self._last_hash = chain_hash(self._last_hash, id=entry_id, subject=subject, body=body)
        self._count += 1
        return entry


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a stage has seen so far. Times are of `time.perf_counter`, when it was stored or read."""

    ready_count: int = 0
    released_count: int = 0
    refused_count: int = 0
    """`PlacementFailed` facts."""
    ready_at_s: dict[str, float] = field(default_factory=dict)
    """{model: its newest replica}"""
    failed_at_s: dict[str, float] = field(default_factory=dict)
    """{model: its newest explanation}"""
    last_ready_s: float = 0.0
    rejection: str = ""
    """Why placement did not take a command."""


class StandIns:
    """All of them, on one connection."""

    def __init__(self, bus: Bus, count: int) -> None:
        self._bus = bus
        self.nodes = {node.name: node for node in (StandIn(number) for number in range(count))}
        self.seen = Seen()
        self._changed = anyio.Event()
        self._in_flight = anyio.CapacityLimiter(APPENDS_IN_FLIGHT_MAX)

    async def join(self) -> None:
        """Returns when history holds that all have joined."""
        async with anyio.create_task_group() as tg:
            for node in self.nodes.values():
                node.join()
                self._wake(tg, node)

    async def serve(self) -> None:
        """Answers for ever."""
        async with anyio.create_task_group() as tg:
            tg.start_soon(self._say_alive)
            filters = [f"sublet.fact.placement.{token_of(kind)}{'.*' if kind.is_sharded else ''}" for kind in FOLLOWED]
            async with aclosing(self._bus.read(Stream.HISTORY, filters, after_seq=0)) as reader:
                async for item in reader:
                    if isinstance(item, Stored):
                        self._receive(tg, item)

    async def until(self, reached: Callable[[Seen], bool]) -> None:
        """Returns when it is so."""
        while not reached(self.seen):
            self._changed = anyio.Event()
            await self._changed.wait()

    def _receive(self, tg: TaskGroup, stored: Stored) -> None:
        fact = decode(stored.body)
        if isinstance(fact, PlacementFailed):
            self.seen.refused_count += 1
            self.seen.failed_at_s[fact.model] = time.perf_counter()
            self._changed.set()
            return
        if isinstance(fact, CommandRejected):
            self.seen.rejection = fact.message
            self._changed.set()
            return
        assert isinstance(fact, TO_NODES), fact
        node = self.nodes[fact.node]
        node.receive(fact, stored.seq)
        self._wake(tg, node)

    def _wake(self, tg: TaskGroup, node: StandIn) -> None:
        if not node.is_appending and node.has_news:
            node.is_appending = True
            tg.start_soon(self._append, node)

    async def _append(self, node: StandIn) -> None:
        """Until nothing is left; what came meanwhile goes with the next batch."""
        while node.has_news:
            async with self._in_flight:
                entries, ready = node.take()
                for part in _parts(entries):
                    node.last_seq = await append_surely(self._bus, prefix_of(node.writer), part, last_seq=node.last_seq)
            node.writer_epoch = node.writer_epoch or node.last_seq
            self._count(entries, ready)
        node.is_appending = False

    def _count(self, entries: Sequence[Entry], ready: Sequence[Ready]) -> None:
        seen, now_s = self.seen, time.perf_counter()
        seen.released_count += sum(1 for entry in entries if entry.subject.endswith(RELEASED))
        if ready:
            seen.ready_count += len(ready)
            seen.last_ready_s = now_s
            for one in ready:
                seen.ready_at_s[one.model] = now_s
        self._changed.set()

    async def _say_alive(self) -> None:
        while True:
            for message in self._alive():
                await self._bus.publish(signal_subject(message), encode(message))
            await anyio.sleep(ALIVE_EVERY_S)

    def _alive(self) -> Iterator[NodeAlive]:
        for node in self.nodes.values():
            yield NodeAlive(node=node.name, machine_id=f"machine-{node.number}", writer_epoch=node.writer_epoch)


def _parts(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """As they are to be appended."""
    step = 1 if len(entries) <= SINGLES_MAX else len(entries)
    for first in range(0, len(entries), step):
        yield entries[first : first + step]


RELEASED: Final = token_of(LeaseReleased)

"""What the run's own history says: every fact of the stream, and the residency of every replica at each of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from kit.bus import Bus, CaughtUp, Stored, Stream
from schemas.catalogue import UnreadableMessage, decode
from schemas.messages import Fact, Message
from schemas.nodes import (
    GpuOffer,
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    NodeJoined,
    ParkAbandoned,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    WakeRefused,
)
from schemas.placement import CommandRejected, PlacementFailed


@dataclass(slots=True, kw_only=True)
class Replica:
    """One lease, as the facts of its node tell it."""

    replica_id: str
    model: str
    gpu_uuid: str
    """Of its first shard, and so are the bytes: on the others they are the same."""
    share_bytes: int
    residue_bytes: int
    """Expected at first; measured from the first park on."""
    shard_count: int = 1
    is_ready: bool = False
    """Was started at least once."""
    is_resident: bool = False
    """Holds its share: from ready or awake until its park has proven the bytes free."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """Between two calls of `Tally.restart`."""

    wakes_s: list[float] = field(default_factory=list)
    """From the order at the node until one token was verified."""
    park_count: int = 0
    cold_start_count: int = 0
    failed_count: int = 0
    wake_refused_count: int = 0
    park_abandoned_count: int = 0
    resident_max_count: int = 0


@dataclass(slots=True)
class Tally:
    """A fold of node facts for figures. Not a service: it decides nothing."""

    gpus: dict[str, GpuOffer] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Why deployments could not be placed or started, newest last."""
    counts: Counts = field(default_factory=Counts)

    @property
    def ready_count(self) -> int:
        return sum(replica.is_ready for replica in self.replicas.values())

    @property
    def resident_count(self) -> int:
        return sum(replica.is_resident for replica in self.replicas.values())

    def restart(self) -> None:
        """Count anew from here."""
        self.counts = Counts(resident_max_count=self.resident_count)

    def fold(self, fact: Message) -> None:
        match fact:
            case NodeJoined():
                self.gpus.update({gpu.gpu_uuid: gpu for gpu in fact.gpus})
            case LeaseGranted():
                self._fold_granted(fact)
            case LeaseReleased():
                self.replicas.pop(fact.replica_id, None)
            case ReplicaReady():
                self._fold_ready(fact)
            case ReplicaResident():
                self.counts.wakes_s.append(fact.wake_s)
                self._set(fact.replica_id, is_resident=True)
            case ReplicaParked():
                self._fold_parked(fact)
            case ReplicaFailed():
                self.counts.failed_count += 1
                self.problems.append(f"{fact.model}: {fact.reason}")
                self._set(fact.replica_id, is_resident=False)
            case LeaseRefused() | CommandRejected() | PlacementFailed():
                self.problems.append(fact.message)
            case WakeRefused():
                self.counts.wake_refused_count += 1
            case ParkAbandoned():
                self.counts.park_abandoned_count += 1
            case _:
                return
        self.counts.resident_max_count = max(self.counts.resident_max_count, self.resident_count)

    def _fold_granted(self, fact: LeaseGranted) -> None:
        leases = {lease.replica_id: lease for lease in fact.leases if lease.shard_index == 0}
        for proposal in fact.replicas:
            lease = leases[proposal.replica_id]
            self.replicas[lease.replica_id] = Replica(
                replica_id=lease.replica_id,
                model=proposal.deployment.name,
                gpu_uuid=lease.gpu_uuid,
                share_bytes=lease.request_bytes,
                residue_bytes=lease.residue_bytes,
                shard_count=len(proposal.shares),
            )

    def _fold_ready(self, fact: ReplicaReady) -> None:
        for ready in fact.replicas:
            self.counts.cold_start_count += 1
            self._set(ready.replica_id, is_resident=True)
            if ready.replica_id in self.replicas:
                self.replicas[ready.replica_id].is_ready = True

    def _fold_parked(self, fact: ReplicaParked) -> None:
        self.counts.park_count += 1
        self._set(fact.replica_id, is_resident=False)
        replica = self.replicas.get(fact.replica_id)
        if replica is not None:
            replica.residue_bytes = fact.residues(replica.shard_count)[0]

    def _set(self, replica_id: str, *, is_resident: bool) -> None:
        if replica_id in self.replicas:
            self.replicas[replica_id].is_resident = is_resident

    def resident_possible_count(self, *, residues_count: bool) -> int:
        """How many replicas the GPUs hold at once where they are placed, at most, with the others' residues or not."""
        total = 0
        for gpu in self.gpus.values():
            here = [replica for replica in self.replicas.values() if replica.gpu_uuid == gpu.gpu_uuid]
            residue_bytes = {r.replica_id: r.residue_bytes if residues_count else 0 for r in here}
            free_bytes = gpu.allocatable_bytes - sum(residue_bytes.values())
            for more_bytes in sorted(r.share_bytes - residue_bytes[r.replica_id] for r in here):
                if more_bytes > free_bytes:
                    break
                free_bytes -= more_bytes
                total += 1
        return total


class History:
    """Follows the stream from its first fact on."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.stored: list[Stored] = []
        self.tally = Tally()

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """While the block runs; also over restarts of the server. An exception of the block stays what it is."""
        failure: Exception | None = None
        async with anyio.create_task_group() as tg:
            tg.start_soon(self._follow)
            try:
                yield
            except Exception as error:  # noqa: BLE001  (raised again below; the task group would wrap it)
                failure = error
            tg.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _follow(self) -> None:
        async for item in self._bus.read(Stream.HISTORY, ["sublet.fact.>"], after_seq=0):
            if isinstance(item, CaughtUp):
                continue
            self.stored.append(item)
            try:
                message = decode(item.body)
            except UnreadableMessage:
                continue
            if isinstance(message, Fact):
                self.tally.fold(message)

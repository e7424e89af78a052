"""A history of many replicas as their writers would have left it: chained, in order, with cursors; on a real server.

Every node joins, placement admits and proposes in rounds, the nodes grant, start and report ready, and placement,
swapper and autoscaler mark their progress as their shells do. One node's replicas then park and wake, again and again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kit.bus import Bus, Entry
from kit.processor import CHAIN_START, chain_hash
from schemas.catalogue import encode
from schemas.deployments import DeploymentSpec, EngineSpec, IsolationGrade, ShareSpec
from schemas.history import Progressed, WriterStarted
from schemas.messages import Fact, fact_subject, prefix_of
from schemas.nodes import (
    GpuOffer,
    Lease,
    LeaseGranted,
    NodeJoined,
    Ready,
    ReplicaDraining,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaWaking,
)
from schemas.placement import DeploymentAdmitted, PlacementProposed, ReplicaProposal, ShareProposal
from schemas.units import GiB

GPUS_PER_NODE: Final = 8
REPLICAS_PER_GPU: Final = 5
NODES_PER_ROUND: Final = 10
APPEND_MAX: Final = 400
"""Entries of one batch: as many as the shell commits at once."""
CLUSTER_WRITERS: Final = ("placement", "swapper", "autoscaler")
BUSY_NODE: Final = "node-0"


@dataclass(slots=True)
class Writer:
    """One prefix: its chain and its place."""

    bus: Bus
    name: str
    last_seq: int = 0
    last_hash: str = CHAIN_START
    count: int = 0
    entries: list[Entry] = field(default_factory=list)

    def add(self, fact: Fact, *, cursor_seq: int) -> None:
        subject, body, entry_id = fact_subject(self.name, fact), encode(fact), f"{self.name}:made:{self.count}"
        self.entries.append(
            Entry(
                subject=subject,
                body=body,
                id=entry_id,
                cause_seq=0,
                cursor_seq=cursor_seq,
                previous_hash=self.last_hash,
            )
        )
        self.last_hash = chain_hash(self.last_hash, id=entry_id, subject=subject, body=body)
        self.count += 1

    async def append(self) -> int:
        """The newest sequence of the stream."""
        for first in range(0, len(self.entries), APPEND_MAX):
            batch = self.entries[first : first + APPEND_MAX]
            self.last_seq = (await self.bus.append(prefix_of(self.name), batch, last_seq=self.last_seq)).last_seq
        self.entries.clear()
        return self.last_seq


@dataclass(slots=True)
class MadeHistory:
    """Fills a stream; goes on from where it is."""

    bus: Bus
    replica_count: int
    fact_count: int = 0
    _writers: dict[str, Writer] = field(default_factory=dict)
    _seq: int = 0

    @property
    def node_count(self) -> int:
        return -(-self.replica_count // (GPUS_PER_NODE * REPLICAS_PER_GPU))

    async def fill(self, *, cycle_count: int, said: Callable[[int], None] = lambda _: None) -> None:
        """Admitted, proposed, granted, started, ready, once each; then `cycle_count` parks and wakes on one node."""
        for name in CLUSTER_WRITERS:
            await self._append(name, [WriterStarted(instance="made", at_s=time.time())])
        for number in range(self.node_count):
            await self._append(
                f"node.node-{number}", [WriterStarted(instance="made", at_s=time.time()), joined(number)]
            )
        await self._mark_progress()
        for first in range(0, self.node_count, NODES_PER_ROUND):
            nodes = range(first, min(first + NODES_PER_ROUND, self.node_count))
            numbers = {node: list(self._replicas_of(node)) for node in nodes}
            await self._append(
                "placement",
                [
                    fact
                    for node in nodes
                    for number in numbers[node]
                    for fact in (admitted(number), proposed(number, node))
                ],
            )
            for node in nodes:
                facts = [
                    fact
                    for number in numbers[node]
                    for fact in (granted(number, node), started(number, node), ready(number, node))
                ]
                await self._append(f"node.node-{node}", facts)
            await self._mark_progress()
            said(self.fact_count)
        await self.cycle(cycle_count)
        await self._mark_progress()

    async def cycle(self, count: int) -> None:
        """So many times one replica of the busy node drains, parks, is woken and resident: five facts each."""
        here = list(self._replicas_of(0))
        for first in range(0, count, len(here)):
            numbers = here[: min(len(here), count - first)]
            await self._append(f"node.{BUSY_NODE}", [fact for number in numbers for fact in parked_and_woken(number)])

    def _replicas_of(self, node: int) -> Iterator[int]:
        per_node = GPUS_PER_NODE * REPLICAS_PER_GPU
        yield from range(node * per_node, min((node + 1) * per_node, self.replica_count))

    async def _append(self, name: str, facts: Sequence[Fact]) -> None:
        writer = self._writers.setdefault(name, Writer(self.bus, name))
        for fact in facts:
            writer.add(fact, cursor_seq=self._seq if name in CLUSTER_WRITERS else 0)
        self._seq = await writer.append()
        self.fact_count += len(facts)

    async def _mark_progress(self) -> None:
        for name in CLUSTER_WRITERS:
            await self._append(name, [Progressed(at_s=time.time())])


def gpu_of(number: int, node: int) -> str:
    return f"GPU-{node}-{number % GPUS_PER_NODE}"


def names(number: int, node: int = 0) -> dict[str, object]:
    return {
        "node": f"node-{node}",
        "at_s": time.time(),
        "replica_id": f"r-{number}",
        "deployment_id": f"d-{number}",
        "model": f"model-{number}",
    }


def spec(number: int) -> DeploymentSpec:
    return DeploymentSpec(
        name=f"model-{number}",
        engine=EngineSpec(weights_bytes=8 * GiB),
        share=ShareSpec(request_bytes=10 * GiB),
    )


def joined(node: int) -> NodeJoined:
    offers = tuple(
        GpuOffer(
            gpu_uuid=f"GPU-{node}-{index}",
            index=index,
            name="NVIDIA H100 80GB HBM3",
            capacity_bytes=80 * GiB,
            reserve_bytes=2 * GiB,
            grade=IsolationGrade.WATCHED,
            grade_reason="made for a benchmark",
            link_bytes_per_s=50e9,
            is_software=True,
        )
        for index in range(GPUS_PER_NODE)
    )
    return NodeJoined(
        node=f"node-{node}",
        at_s=time.time(),
        machine_id=f"machine-{node}",
        gpus=offers,
        host_budget_bytes=1024 * GiB,
        holder_url=f"http://10.0.{node // 250}.{node % 250}:8090",
        label="software GPU",
    )


def admitted(number: int) -> DeploymentAdmitted:
    return DeploymentAdmitted(
        at_s=time.time(),
        inbox_seq=0,
        command_id=f"c-{number}",
        tenant="default",
        deployment_id=f"d-{number}",
        revision_count=1,
        deployment=spec(number),
    )


def proposal(number: int, node: int) -> ReplicaProposal:
    share = ShareProposal(
        replica_id=f"r-{number}",
        shard_index=0,
        gpu_uuid=gpu_of(number, node),
        request_bytes=10 * GiB,
        limit_bytes=10 * GiB,
    )
    return ReplicaProposal(
        replica_id=f"r-{number}",
        deployment_id=f"d-{number}",
        tenant="default",
        deployment=spec(number),
        shares=(share,),
    )


def proposed(number: int, node: int) -> PlacementProposed:
    return PlacementProposed(
        at_s=time.time(),
        proposal_id=f"p-{number}",
        node=f"node-{node}",
        replicas=(proposal(number, node),),
        reason="tightest fit: 7.8 GiB left to promise",
    )


def granted(number: int, node: int) -> LeaseGranted:
    lease = Lease(
        replica_id=f"r-{number}",
        shard_index=0,
        gpu_uuid=gpu_of(number, node),
        request_bytes=10 * GiB,
        granted_bytes=10 * GiB,
        limit_bytes=10 * GiB,
        residue_bytes=GiB // 2,
        lease_epoch=number + 1,
    )
    return LeaseGranted(
        node=f"node-{node}",
        at_s=time.time(),
        proposal_id=f"p-{number}",
        leases=(lease,),
        replicas=(proposal(number, node),),
    )


def started(number: int, node: int) -> ReplicaStarting:
    return ReplicaStarting(
        node=f"node-{node}",
        at_s=time.time(),
        replica_id=f"r-{number}",
        deployment_id=f"d-{number}",
        model=f"model-{number}",
        wake_epoch=1,
    )


def ready(number: int, node: int) -> ReplicaReady:
    one = Ready(
        replica_id=f"r-{number}",
        deployment_id=f"d-{number}",
        model=f"model-{number}",
        endpoint=f"http://10.0.0.1:{20_000 + number % 40_000}",
        wake_epoch=1,
        start_s=12.5,
        enforced_bytes=10 * GiB,
    )
    return ReplicaReady(node=f"node-{node}", at_s=time.time(), replicas=(one,))


def parked_and_woken(number: int) -> tuple[Fact, ...]:
    of = names(number)
    return (
        ReplicaDraining(**of, reason="idle longer than its warm window"),  # type: ignore[arg-type]
        ReplicaParked(
            **of,  # type: ignore[arg-type]
            wake_epoch=2,
            residue_bytes=GiB // 2,
            host_bytes=8 * GiB,
            copied_bytes=0,
            park_s=0.02,
            drain_s=0.1,
            reason="idle longer than its warm window",
        ),
        ReplicaWaking(**of, wake_epoch=2),  # type: ignore[arg-type]
        ReplicaWaking(**of, wake_epoch=2, is_reserved=True),  # type: ignore[arg-type]
        ReplicaResident(
            **of,  # type: ignore[arg-type]
            wake_epoch=2,
            endpoint="http://10.0.0.1:20000",
            copied_bytes=8 * GiB,
            reserve_s=0.01,
            restore_s=0.7,
            verify_s=0.02,
            wake_s=0.73,
        ),
    )

"""What a start reads: with one filter or several, it comes to the state that a fold of all that matches gives."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from kit.bus import CaughtUp, Entry, Reading, Stored, Stream
from kit.bus_memory import MemoryBus, MemoryServer
from kit.processor import CHAIN_START, Processor, chain_hash
from kit.rebuild import read_filters, rebuilt
from kit.service import digest
from schemas.autoscaler import ReplicasDecided
from schemas.catalogue import encode
from schemas.messages import Fact, fact_subject, prefix_of
from schemas.placement import DeploymentRetired
from tests.unit.kit.toy import ToyState, toy

pytestmark = pytest.mark.anyio


class Writer:
    """One prefix on a bus."""

    def __init__(self, bus: MemoryBus, name: str) -> None:
        self._bus, self._name = bus, name
        self._last_seq, self._last_hash, self._count = 0, CHAIN_START, 0

    async def append(self, fact: Fact, *, cursor_seq: int = 0) -> int:
        subject, body, entry_id = fact_subject(self._name, fact), encode(fact), f"{self._name}:x:{self._count}"
        entry = Entry(
            subject=subject,
            body=body,
            id=entry_id,
            cause_seq=0,
            cursor_seq=cursor_seq,
            previous_hash=self._last_hash,
        )
        self._last_hash = chain_hash(self._last_hash, id=entry_id, subject=subject, body=body)
        self._count += 1
        self._last_seq = (await self._bus.append(prefix_of(self._name), [entry], last_seq=self._last_seq)).last_seq
        return self._last_seq


def decided(number: int) -> ReplicasDecided:
    return ReplicasDecided(at_s=1.0, deployment_id="d", model=f"m{number}", replica_count=1, reason="x")


def retired(number: int) -> DeploymentRetired:
    return DeploymentRetired(
        at_s=1.0, inbox_seq=number, command_id=f"c{number}", tenant="t", deployment_id="d", model=f"m{number}"
    )


@pytest.mark.parametrize("name", ["node.a", "autoscaler"])
async def test_a_rebuild_reads_all_that_concerns_a_writer_in_order_and_goes_on(name: str) -> None:
    server = MemoryServer()
    bus = MemoryBus(server)
    own, placement, other = Writer(bus, name), Writer(bus, "placement"), Writer(bus, "swapper")
    for number in range(10):
        cursor_seq = await placement.append(retired(number))
        await other.append(decided(100 + number))
        await own.append(decided(number), cursor_seq=cursor_seq)
    await placement.append(retired(10))

    def new() -> Processor[ToyState]:
        return Processor(toy(), None, writer=name, instance="i")

    async with AsyncExitStack() as stack:
        processor, reading, _ = await rebuilt(
            bus, new, None, stack=stack, follow=lambda _: None, log=logging.getLogger("x")
        )
        await placement.append(retired(11))
        live = [item async for item in _first(reading, processor)]

    expected = new()
    expected.replay(
        stored
        for stored in server.stored(Stream.HISTORY)
        if stored.subject.startswith((f"sublet.fact.{name}.", "sublet.fact.placement."))
    )
    assert digest(processor.state) == digest(expected.state)
    assert [f"m{number}:x" for number in range(10)] == processor.state.decided
    assert processor.skipped_count == 0
    assert [item.seq for item in live] == [32]
    assert len(read_filters(processor)) == (2 if name == "node.a" else 1)


async def _first(reading: Reading, processor: Processor[ToyState]) -> AsyncIterator[Stored]:
    """The first live message that concerns the writer."""
    async for item in reading:
        if isinstance(item, CaughtUp):
            continue
        assert isinstance(item, Stored)
        if processor.concerns(item.subject):
            yield item
            return

"""The bus in one process passes the suite, under asyncio and trio."""

import anyio
import pytest

from kit.bus import AppendRefused, AppendUnknown, Bus, BusError, HistoryGone, Stream
from kit.bus_memory import AppendFault, MemoryBus, MemoryServer
from kit.history import append_surely
from tests.conformance.bus.bus_suite import (
    ALL_FACTS,
    PREFIX,
    Connect,
    Inbox,
    entries,
    ids,
    read_to_end,
    taken,
)
from tests.conformance.bus.snapshot_suite import SnapshotSuite


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


@pytest.fixture
async def server(anyio_backend: str) -> MemoryServer:
    return MemoryServer(anyio.current_time)


class TestMemoryBus(SnapshotSuite):
    @pytest.fixture
    def connect(self, server: MemoryServer) -> Connect:
        async def connect(name: str) -> Bus:
            return MemoryBus(server, name)

        return connect


pytestmark = pytest.mark.anyio


async def test_a_lost_acknowledgement_is_found_out(server: MemoryServer) -> None:
    bus = MemoryBus(server)
    server.append_faults.extend([AppendFault.LOSE_REQUEST, AppendFault.LOSE_ACK])

    last_seq = await append_surely(bus, PREFIX, entries("a", "b"), last_seq=0)

    assert last_seq == 2
    assert ids(server.stored(Stream.HISTORY)) == ["a", "b"]


async def test_a_full_stream_refuses(server: MemoryServer) -> None:
    server.append_faults.append(AppendFault.REFUSE)

    with pytest.raises(AppendRefused, match="storage"):
        await MemoryBus(server).append(PREFIX, entries("a"), last_seq=0)


async def test_fleeting_messages_are_lost_and_doubled_by_the_seed() -> None:
    async def received(seed: int) -> list[bytes]:
        bus, inbox = MemoryBus(MemoryServer(loss_fraction=0.3, duplicate_fraction=0.3, seed=seed)), Inbox()
        async with bus.subscribe("sublet.signal.a", inbox):
            for number in range(50):
                await bus.publish("sublet.signal.a", str(number).encode())
        return [message.body for message in inbox.received]

    once = await received(1)

    assert once == await received(1)
    assert once != await received(2)
    assert len(set(once)) < 50
    assert len(once) > len(set(once))


async def test_while_the_server_is_away_nothing_accepted_is_lost(server: MemoryServer) -> None:
    bus, inbox, calls = MemoryBus(server), Inbox(), []

    async def back() -> None:
        calls.append("back")

    bus.on_reconnect(back)
    reading = bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)
    await bus.append(PREFIX, entries("a"), last_seq=0)
    async with bus.subscribe("sublet.signal.a", inbox):
        server.stop()
        assert not bus.is_connected
        await bus.publish("sublet.signal.a", b"dropped")
        with pytest.raises(AppendUnknown):
            await bus.append(PREFIX, entries("b"), last_seq=1)
        with pytest.raises(BusError):
            await bus.last(PREFIX)
        await server.restart()

    assert calls == ["back"]
    assert inbox.received == []
    assert ids(await taken(reading, 2)) == ["a", "caught up"]
    await reading.aclose()


async def test_a_trimmed_history_is_gone_for_who_is_behind(server: MemoryServer) -> None:
    bus = MemoryBus(server)
    await bus.append(PREFIX, entries("a", "b", "c"), last_seq=0)
    server.trim(Stream.HISTORY, below_seq=3)

    assert ids((await read_to_end(bus, Stream.HISTORY, ALL_FACTS, after_seq=2))[0]) == ["c"]
    with pytest.raises(HistoryGone):
        await read_to_end(bus, Stream.HISTORY, ALL_FACTS, after_seq=1)


async def test_a_stream_made_anew_is_gone_for_who_read_the_old_one(server: MemoryServer) -> None:
    reading = MemoryBus(server).read(Stream.HISTORY, ALL_FACTS, after_seq=0)
    await taken(reading, 1)
    server.recreate(Stream.HISTORY)

    with pytest.raises(HistoryGone):
        await taken(reading, 1)

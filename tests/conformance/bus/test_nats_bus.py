"""The bus over NATS passes the suite, on asyncio and uvloop, and keeps what it promises when the server dies."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

from kit.bus import AppendUnknown, Bus, CaughtUp, HistoryGone, Stored, Stream
from kit.bus_nats import NatsBus
from kit.history import append_surely
from kit.nats_server import NatsServer, ensure_streams
from tests.conformance.bus.bus_suite import ALL_FACTS, PREFIX, Connect, Inbox, entries, ids, taken
from tests.conformance.bus.snapshot_suite import SnapshotSuite

pytestmark = [pytest.mark.nats, pytest.mark.anyio]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


class TestNatsBus(SnapshotSuite):
    pytestmark: ClassVar = [pytest.mark.nats, pytest.mark.anyio]

    @pytest.fixture
    async def connect(self, nats_url: str) -> AsyncIterator[Connect]:
        async with AsyncExitStack() as stack:

            async def connect(name: str) -> Bus:
                return await stack.enter_async_context(NatsBus(nats_url, name=name))

            yield connect


@pytest.fixture
async def server(own_nats_server: NatsServer, anyio_backend: object) -> NatsServer:
    async with NatsBus(own_nats_server.url) as bus:
        await ensure_streams(bus)
    return own_nats_server


async def test_a_killed_server_costs_no_fact_and_no_reader_a_duplicate(server: NatsServer) -> None:
    """Three times SIGKILL under a writer at full speed: all that was acknowledged is there, once, in order."""
    acknowledged: list[str] = []
    seen: list[Stored] = []
    is_over = anyio.Event()

    async def write(bus: Bus) -> None:
        last_seq = 0
        while not is_over.is_set():
            batch = entries(*(f"{len(acknowledged) + part}" for part in range(1 + len(acknowledged) % 3)))
            last_seq = await append_surely(bus, PREFIX, batch, last_seq=last_seq)
            acknowledged.extend(entry.id for entry in batch)

    async def more_acknowledged(count: int) -> None:
        """At full speed for a while, and for as long as a slow disk needs."""
        before_count = len(acknowledged)
        await anyio.sleep(0.4)
        with anyio.fail_after(60):
            while len(acknowledged) < before_count + count:
                await anyio.sleep(0.01)

    async def follow(bus: Bus) -> None:
        async with aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
            async for item in reading:
                seen.extend([item] if isinstance(item, Stored) else [])

    async with (
        NatsBus(server.url, name="writer") as writer,
        NatsBus(server.url, name="reader") as reader,
        anyio.create_task_group() as tg,
    ):
        tg.start_soon(write, writer)
        tg.start_soon(follow, reader)
        for _ in range(3):
            await more_acknowledged(20)
            server.kill()
            await anyio.sleep(0.1)
            await server.start_async()
        await more_acknowledged(20)
        is_over.set()
        with anyio.fail_after(60):
            while len(seen) < len(acknowledged):
                await anyio.sleep(0.02)
        await anyio.sleep(0.1)
        tg.cancel_scope.cancel()

    assert len(acknowledged) > 50
    assert [stored.id for stored in seen] == acknowledged
    assert [stored.seq for stored in seen] == list(range(1, len(seen) + 1))


async def test_everything_works_again_soon_after_the_servers_return(server: NatsServer) -> None:
    calls, inbox = [], Inbox()

    async def back() -> None:
        calls.append("back")

    async with NatsBus(server.url) as bus, NatsBus(server.url) as other:
        bus.on_reconnect(back)
        async with (
            bus.subscribe("sublet.signal.a", inbox),
            aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading,
        ):
            await taken(reading, 1)
            server.kill()
            with pytest.raises(AppendUnknown):
                await bus.append(PREFIX, entries("a"), last_seq=0)
            was_connected = bus.is_connected
            await other.publish("sublet.signal.a", b"dropped")
            await server.start_async()

            with anyio.fail_after(15):
                await append_surely(other, PREFIX, entries("a"), last_seq=0)
                assert ids([await reading.__anext__()]) == ["a"]
                while not bus.is_connected:
                    await anyio.sleep(0.01)
                await other.publish("sublet.signal.a", b"new")
                await inbox.until(1)

    assert [message.body for message in inbox.received] == [b"new"]
    assert not was_connected
    assert calls == ["back"]


async def test_a_command_sent_while_the_server_is_away_is_stored_once(server: NatsServer) -> None:
    async with NatsBus(server.url) as bus:
        server.kill()
        async with anyio.create_task_group() as tg:

            async def send() -> None:
                await bus.publish_stored("sublet.in.acme.deploy", b"x", id="c-1")

            tg.start_soon(send)
            await anyio.sleep(0.3)
            await server.start_async()
        await bus.publish_stored("sublet.in.acme.deploy", b"x", id="c-1")

        async with aclosing(bus.read(Stream.INBOX, ["sublet.in.>"], after_seq=0)) as reading:
            assert ids(await taken(reading, 2)) == ["c-1", "caught up"]


async def stop_process(pid: int) -> None:
    """SIGSTOP, and all of its threads stand still."""
    os.kill(pid, signal.SIGSTOP)
    with anyio.fail_after(60):
        while thread_states(pid) != {"T"}:
            await anyio.sleep(0.001)


def thread_states(pid: int) -> set[str]:
    stats = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


async def test_a_silent_server_is_noticed_and_a_read_goes_on_where_it_was(server: NatsServer) -> None:
    """SIGSTOP: the connection stands, nothing moves. Then it goes on, and nothing is delivered twice."""
    async with NatsBus(server.url) as bus, aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
        await bus.append(PREFIX, entries("a"), last_seq=0)
        assert ids(await taken(reading, 2)) == ["a", "caught up"]
        await stop_process(server.pid)
        try:
            with pytest.raises(AppendUnknown):
                await bus.append(PREFIX, entries("b"), last_seq=1)
            with anyio.move_on_after(1.0):
                await reading.__anext__()
        finally:
            os.kill(server.pid, signal.SIGCONT)

        assert await append_surely(bus, PREFIX, entries("b"), last_seq=1) == 2
        await bus.append(PREFIX, entries("c"), last_seq=2)
        assert ids(await taken(reading, 2)) == ["b", "c"]


async def test_a_lost_consumer_is_replaced_without_skipping_or_repeating(server: NatsServer) -> None:
    async with NatsBus(server.url) as bus, aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
        await bus.append(PREFIX, entries("a"), last_seq=0)
        await taken(reading, 2)
        for name in (await bus.api("CONSUMER.NAMES.SUBLET"))["consumers"]:
            await bus.api(f"CONSUMER.DELETE.SUBLET.{name}")
        await bus.append(PREFIX, entries("b"), last_seq=1)

        assert ids(await taken(reading, 1)) == ["b"]


async def test_a_stream_made_anew_is_gone_for_who_read_the_old_one(server: NatsServer) -> None:
    async with NatsBus(server.url) as bus, aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
        await taken(reading, 1)
        await bus.api("STREAM.DELETE.SUBLET")
        await ensure_streams(bus)

        with pytest.raises(HistoryGone):
            await taken(reading, 1)


async def test_a_trimmed_history_is_gone_for_who_is_behind_but_an_expiring_stream_is_not(server: NatsServer) -> None:
    async with NatsBus(server.url) as bus:
        await bus.append(PREFIX, entries("a", "b", "c"), last_seq=0)
        for number in range(3):
            await bus.publish_stored("sublet.dead.placement", b"", id=str(number))
        for stream in ("SUBLET", "DEAD"):
            await bus.api(f"STREAM.PURGE.{stream}", {"seq": 3})

        async with aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=2)) as reading:
            assert ids(await taken(reading, 2)) == ["c", "caught up"]
        async with aclosing(bus.read(Stream.DEAD, ["sublet.dead.>"], after_seq=0)) as reading:
            assert ids(await taken(reading, 2)) == ["2", "caught up"]
        with pytest.raises(HistoryGone):
            await taken(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=1), 1)


async def test_a_read_started_before_its_stream_exists_waits_for_it(own_nats_server: NatsServer) -> None:
    async with NatsBus(own_nats_server.url) as bus, anyio.create_task_group() as tg:
        found: list[Stored | CaughtUp] = []

        async def read() -> None:
            async with aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
                found.extend(await taken(reading, 1))

        tg.start_soon(read)
        await anyio.sleep(0.1)
        await ensure_streams(bus)

    assert ids(found) == ["caught up"]

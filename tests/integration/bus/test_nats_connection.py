"""The layer over nats-py: how it connects, fails and closes; and that nats-py still has what it uses."""

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from nats.aio.client import Client

from kit.bus import BusError, NoAnswer, Received
from kit.bus_nats import NatsBus
from kit.nats_server import NatsServer, ServerConfig
from tests.fixtures.nats import binary

pytestmark = [pytest.mark.nats, pytest.mark.anyio]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


def keep(_: Received) -> None:
    return


async def until(is_true: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not is_true():
            await anyio.sleep(0.01)


async def test_an_address_where_nobody_listens_is_an_error_that_names_it(tmp_path: Path) -> None:
    with NatsServer(tmp_path, ServerConfig(store_directory=tmp_path / "store"), binary=binary()) as server:
        url = server.url
    with anyio.fail_after(30), pytest.raises(BusError, match=url):
        async with NatsBus(url, connect_timeout_s=0.5):
            pass
    await nothing_is_left()


async def test_a_server_that_starts_later_is_waited_for(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, ServerConfig(store_directory=tmp_path / "store"), binary=binary())
    server.start()
    server.stop()

    async def start_later() -> None:
        await anyio.sleep(0.3)
        await server.start_async()

    try:
        async with anyio.create_task_group() as tg:
            tg.start_soon(start_later)
            async with NatsBus(server.url) as bus:
                assert bus.is_connected
    finally:
        server.stop()


async def nothing_is_left() -> None:
    """No task but the test's own, after the loop had a chance to end them."""
    ours = {asyncio.current_task()}
    with anyio.fail_after(30):
        while {task for task in asyncio.all_tasks() if "nats" in repr(task.get_coro())} - ours:
            await anyio.sleep(0.01)


async def test_closing_leaves_nothing_behind(own_nats_server: NatsServer) -> None:
    before = asyncio.all_tasks()
    async with NatsBus(own_nats_server.url) as bus, bus.subscribe("sublet.signal.a", keep):
        client = bus._client
        await bus.publish("sublet.signal.a", b"")

    assert asyncio.all_tasks() <= before
    assert not bus.is_connected
    assert client._transport._io_writer.transport.is_closing()  # type: ignore[union-attr]


async def test_closing_in_a_cancelled_scope_leaves_nothing_behind(own_nats_server: NatsServer) -> None:
    before = asyncio.all_tasks()
    with anyio.CancelScope() as scope:
        async with NatsBus(own_nats_server.url) as bus:
            scope.cancel()
            await anyio.sleep(1)

    assert asyncio.all_tasks() <= before
    assert bus._client._transport._io_writer.transport.is_closing()  # type: ignore[union-attr]


async def test_closing_while_the_server_is_away_leaves_nothing_behind(own_nats_server: NatsServer) -> None:
    before = asyncio.all_tasks()
    with anyio.fail_after(60):
        async with NatsBus(own_nats_server.url) as bus:
            own_nats_server.kill()
            await until(lambda: not bus.is_connected)

    assert asyncio.all_tasks() <= before


async def test_what_was_published_before_closing_arrives(own_nats_server: NatsServer) -> None:
    received: list[Received] = []
    async with NatsBus(own_nats_server.url) as bus, bus.subscribe("sublet.signal.a", received.append):
        async with NatsBus(own_nats_server.url) as other:
            for _ in range(1000):
                await other.publish("sublet.signal.a", b"x" * 1000)
        await until(lambda: len(received) == 1000)


async def test_whoever_waits_when_the_bus_closes_gets_an_error(own_nats_server: NatsServer) -> None:
    async with anyio.create_task_group() as tg, NatsBus(own_nats_server.url) as bus:

        async def ask() -> None:
            with pytest.raises(NoAnswer):
                await bus.request("sublet.query.a", b"", timeout_s=60)

        async with bus.subscribe("sublet.query.a", keep):
            tg.start_soon(ask)
            await until(lambda: bool(bus._connection._questions))
    assert not bus._connection._questions


async def test_a_cancelled_question_is_forgotten(own_nats_server: NatsServer) -> None:
    async with NatsBus(own_nats_server.url) as bus, bus.subscribe("sublet.query.a", keep):
        with anyio.move_on_after(0.05):
            await bus.request("sublet.query.a", b"", timeout_s=60)
        assert not bus._connection._questions


async def test_a_receiver_that_fails_does_not_end_the_connection(
    own_nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[Received] = []

    def fail_once(message: Received) -> None:
        received.append(message)
        if len(received) == 1:
            raise ValueError("a bug")

    async with NatsBus(own_nats_server.url) as bus, bus.subscribe("sublet.signal.a", fail_once):
        await bus.publish("sublet.signal.a", b"1")
        await bus.publish("sublet.signal.a", b"2")
        await until(lambda: len(received) == 2)

    assert "a receiver failed" in caplog.text


async def test_an_error_after_which_nats_py_would_close_for_good_is_survived(own_nats_server: NatsServer) -> None:
    """A frame above the server's limit: it says `Maximum Payload Violation` and ends the connection."""
    received: list[Received] = []
    async with NatsBus(own_nats_server.url) as bus, bus.subscribe("sublet.signal.a", received.append):
        await bus.publish("sublet.signal.b", b"x" * (2 * 1024 * 1024))
        await until(lambda: not bus.is_connected)
        await until(lambda: bus.is_connected)
        await bus.publish("sublet.signal.a", b"")
        await until(lambda: len(received) == 1)


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0\r\n", "a\tb"])
async def test_a_subject_cannot_carry_a_command(own_nats_server: NatsServer, subject: str) -> None:
    async with NatsBus(own_nats_server.url) as bus:
        with pytest.raises(ValueError, match="not a subject"):
            await bus.publish(subject, b"")
        with pytest.raises(ValueError, match="not a subject"):
            async with bus.subscribe(subject, keep):
                pass


async def test_a_header_cannot_carry_another(own_nats_server: NatsServer) -> None:
    async with NatsBus(own_nats_server.url) as bus:
        with pytest.raises(ValueError, match="line break"):
            await bus.publish("sublet.signal.a", b"", traceparent="00\r\nNats-Rollup: all")


def test_nats_py_has_the_private_names_that_the_transport_uses() -> None:
    """When this fails after an update, read `kit.bus_nats._Client` against the new nats-py before changing the list."""
    client = Client()
    for name in (
        "_flusher_task", "_ping_interval_task", "_pongs", "_process_op_err", "_ps", "_reading_task",
        "_reconnection_task", "_sid", "_status", "_subs", "_transport",
    ):  # fmt: skip
        assert hasattr(client, name), name
    assert list(inspect.signature(Client._process_err).parameters) == ["self", "err_msg"]
    assert "await self._ps.parse(b)" in inspect.getsource(Client._read_loop)
    assert "except errors.ProtocolError" in inspect.getsource(Client._read_loop)

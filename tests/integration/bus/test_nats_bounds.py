"""What the bus keeps and how often it asks, while the server, a stream or a reader is slow or away."""

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from kit.bus import NoAnswer, Received, Stored, Stream
from kit.bus_nats import PENDING_BYTES_MAX, WRITE_BYTES_MAX, NatsBus
from kit.nats_reading import PULL_MESSAGES
from kit.nats_server import NatsServer, ensure_streams
from tests.conformance.bus.bus_suite import ALL_FACTS, PREFIX, entries

pytestmark = [pytest.mark.nats, pytest.mark.anyio]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def bus(own_nats_server: NatsServer, anyio_backend: object) -> AsyncIterator[NatsBus]:
    async with NatsBus(own_nats_server.url) as made:
        yield made


class Counting:
    """Counts the questions of a bus."""

    def __init__(self, bus: NatsBus) -> None:
        self.count = 0
        self._ask = bus._connection.ask
        bus._connection.ask = self.ask  # type: ignore[method-assign]

    async def until(self, count: int) -> None:
        with anyio.fail_after(60):
            while self.count < count:
                await anyio.sleep(0.01)

    async def ask(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        return await self._ask(*arguments, **named)


async def test_a_server_that_does_not_read_fails_questions_instead_of_filling_the_memory(
    own_nats_server: NatsServer, bus: NatsBus
) -> None:
    body = b"x" * 200_000
    failed: list[str] = []

    async def ask() -> None:
        with pytest.raises(NoAnswer) as told:
            await bus.request("sublet.query.acme.placement.ps", body, timeout_s=0.5)
        failed.append(str(told.value))

    os.kill(own_nats_server.pid, signal.SIGSTOP)
    try:
        async with anyio.create_task_group() as tg:
            for _ in range(150):
                tg.start_soon(ask)
        transport = bus._client._transport._io_writer.transport  # type: ignore[union-attr]
        waiting_bytes = transport.get_write_buffer_size()
    finally:
        os.kill(own_nats_server.pid, signal.SIGCONT)

    assert waiting_bytes <= PENDING_BYTES_MAX + WRITE_BYTES_MAX + len(body)
    assert any("does not read" in text for text in failed)

    # It reads again, and all goes on over the same connection.
    received: list[Received] = []
    with anyio.fail_after(60):
        async with bus.subscribe("sublet.signal.a", received.append):
            while not received:
                await bus.publish("sublet.signal.a", b"")
                await anyio.sleep(0.01)


async def test_a_message_that_no_stream_takes_yet_is_sent_again_with_growing_pauses(bus: NatsBus) -> None:
    """The server answers 503 at once: without pauses this would be thousands of attempts."""
    asked = Counting(bus)
    async with anyio.create_task_group() as tg:

        async def send() -> None:
            await bus.publish_stored("sublet.in.acme.deploy", b"x", id="c-1")

        began_s = time.monotonic()
        tg.start_soon(send)
        await asked.until(5)
        waited_s = time.monotonic() - began_s
        await ensure_streams(bus)

    assert waited_s >= 0.7  # After 0, 0.05, 0.15, 0.35 and 0.75 s, and on a busy host later.
    info = await bus.api(f"STREAM.INFO.{Stream.INBOX}")
    assert info["state"]["messages"] == 1


async def test_a_read_of_a_stream_that_is_not_there_looks_for_it_with_pauses(bus: NatsBus) -> None:
    asked, began_s = Counting(bus), time.monotonic()
    async with anyio.create_task_group() as tg:

        async def read() -> None:
            async with aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
                await reading.__anext__()

        tg.start_soon(read)
        await asked.until(8)
        tg.cancel_scope.cancel()

    assert time.monotonic() - began_s >= 0.5  # After 0, 0.05, 0.15, 0.35 and 0.6 s, and on a busy host later.


async def test_a_slow_reader_holds_the_server_back_and_misses_nothing(bus: NatsBus) -> None:
    """nats-py drops what its queue has no room for; here no more is asked for than fits."""
    count = 5 * PULL_MESSAGES
    await ensure_streams(bus)
    last_seq = 0
    for part in range(5):
        batch = entries(*(f"{part}-{number}" for number in range(PULL_MESSAGES)))
        last_seq = (await bus.append(PREFIX, batch, last_seq=last_seq)).last_seq

    waiting_max, seqs = 0, []
    with anyio.fail_after(60):
        async with aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
            async for item in reading:
                if not isinstance(item, Stored):
                    break
                seqs.append(item.seq)
                if len(seqs) % 500 == 1:
                    await anyio.sleep(0.05)
                waiting_max = max(waiting_max, len(reading._buffer))

    assert seqs == list(range(1, count + 1))
    assert waiting_max <= 2 * PULL_MESSAGES + 1

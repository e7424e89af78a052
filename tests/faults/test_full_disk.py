"""No room left: it is told at once and in one sentence, nothing acknowledged is lost, and all goes on by itself."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from benchmarks.lazy_mount import LazyMount, why_not
from benchmarks.ledger import Deposit, LedgerState, ledger, oracle, read_all
from kit.bus import AppendFull, Bus, Entry, Stream
from kit.bus_memory import MemoryBus, MemoryServer
from kit.bus_nats import NatsBus
from kit.history import HOLD_AFTER_S
from kit.journal import Journal
from kit.nats_server import (
    NatsServer,
    NatsServerError,
    ServerConfig,
    ensure_streams,
    file_store_limit_bytes,
    stream_configs,
)
from kit.processor import Processor
from kit.runner import Runner
from kit.service import digest
from kit.telemetry import Tracer
from tests.fixtures.nats import binary

pytestmark = pytest.mark.anyio
needs_mount = pytest.mark.skipif(why_not() is not None, reason=f"a small disk {why_not()}")
MiB = 1024**2
DEPOSIT = "x" * 20_000


def offer(runner: Runner[LedgerState], count: int) -> None:
    for _ in range(count):
        runner.offer(Deposit(reason=DEPOSIT))


async def until(is_so: Callable[[], Any], *, within_s: float = 60.0) -> None:
    with anyio.fail_after(within_s):
        while not is_so():
            await anyio.sleep(0.01)


@asynccontextmanager
async def starting(bus: Bus, *, writer: str, journal: Journal | None = None) -> AsyncIterator[Runner[LedgerState]]:
    runner = Runner(
        ledger(),
        None,
        bus,
        writer=writer,
        instance="i",
        tracer=Tracer(None, None, root_ratio=0.0),
        needs_lease=False,
        journal=journal,
    )
    async with anyio.create_task_group() as tg:
        tg.start_soon(runner.run)
        yield runner
        tg.cancel_scope.cancel()


@asynccontextmanager
async def running(bus: Bus, *, writer: str = "w", journal: Journal | None = None) -> AsyncIterator[Runner[LedgerState]]:
    async with starting(bus, writer=writer, journal=journal) as runner:
        await until(lambda: runner.status.is_ready)
        yield runner


async def is_history_equal(bus: Bus, runner: Runner[LedgerState]) -> bool:
    """A fold of the stream by a new processor, compared with the live state."""
    assert runner.processor is not None
    history = [stored async for stored in read_all(bus, [runner.processor.prefix])]
    fold = Processor(ledger(), None, writer=runner.processor.writer, instance="judge")
    fold.replay(history)
    return not oracle(history) and digest(fold.state) == digest(runner.processor.state)


async def make_history(bus: NatsBus) -> None:
    """The stream of facts only: another one has 256 MiB set aside for it."""
    config = next(config for config in stream_configs() if config["name"] == Stream.HISTORY)
    await bus.api(f"STREAM.CREATE.{Stream.HISTORY}", config)


async def fill(bus: NatsBus, size_bytes: int) -> None:
    """A stream of somebody else's that takes so much of the store."""
    await bus.api("STREAM.CREATE.FILLER", {"name": "FILLER", "subjects": ["filler"], "storage": "file"})
    for number in range(size_bytes // (256 * 1024)):
        await bus.publish_stored("filler", bytes(256 * 1024), id=f"filler-{number}")


@pytest.mark.nats
async def test_a_full_store_is_told_at_once_and_after_it_has_room_all_goes_on_without_a_restart(tmp_path: Path) -> None:
    config = ServerConfig(store_directory=tmp_path / "store", max_file_store_bytes=6 * MiB)
    async with NatsServer(tmp_path / "nats", config, binary=binary()) as server, NatsBus(server.url) as bus:
        await make_history(bus)
        await fill(bus, 4 * MiB)
        async with running(bus) as runner:
            status = runner.status
            began_s = time.monotonic()
            offer(runner, 200)
            await until(lambda: status.problem)
            refused_s = time.monotonic() - began_s
            offer(runner, 5)
            await anyio.sleep(1.5)

            assert refused_s < HOLD_AFTER_S, "not by silence"
            assert "store is full" in status.problem
            assert "raise max_file_store" in status.problem
            stored_count = (await bus.api("STREAM.INFO.SUBLET"))["state"]["messages"]
            assert stored_count < 200

            async with starting(bus, writer="late") as late:
                await until(lambda: "store is full" in late.status.problem)  # A start says so too.

            await bus.api("STREAM.DELETE.FILLER")
            assert runner.processor is not None
            state = runner.processor.state
            await until(lambda: not status.problem and state.fact_count == 205)
            offer(runner, 1)
            await until(lambda: status.appended_count == 206)

            assert status.rebuilt_count == 0
            assert await is_history_equal(bus, runner)


async def append_for_ever(bus: Bus, stored: list[int]) -> None:
    stored.append(0)
    while True:
        one = Entry(
            subject="sublet.fact.w.x",
            body=bytes(64 * 1024),
            id=f"w:i:{len(stored)}",
            cause_seq=0,
            cursor_seq=0,
            previous_hash="0",
        )
        stored.append((await bus.append("sublet.fact.w.>", [one], last_seq=stored[-1])).last_seq)


@needs_mount
@pytest.mark.nats
async def test_the_limit_that_we_write_is_reached_before_the_disk_is_full(tmp_path: Path) -> None:
    with LazyMount(tmp_path / "disk", names="ordered", capacity_bytes=16 * MiB) as disk:
        store = disk.path / "store"
        store.mkdir()
        limit_bytes = file_store_limit_bytes(store)
        assert 4 * MiB < limit_bytes <= 0.7 * 16 * MiB
        config = ServerConfig(store_directory=store, max_file_store_bytes=limit_bytes)
        async with NatsServer(tmp_path / "nats", config, binary=binary()) as server, NatsBus(server.url) as bus:
            await make_history(bus)
            stored: list[int] = []
            with pytest.raises(AppendFull, match="store is full"):
                await append_for_ever(bus, stored)
            assert stored[-1] == (await bus.api("STREAM.INFO.SUBLET"))["state"]["last_seq"]
        assert disk.used_bytes() < 0.8 * 16 * MiB


@needs_mount
@pytest.mark.nats
async def test_a_disk_that_others_filled_is_told_and_after_the_servers_restart_nothing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below its own limit the server says nothing and stays silent when there is room again: it must be restarted."""
    monkeypatch.setattr("kit.history.HOLD_AFTER_S", 1.0)
    with LazyMount(tmp_path / "disk", names="ordered") as disk:
        config = ServerConfig(store_directory=disk.path / "store")
        async with NatsServer(tmp_path / "nats", config, binary=binary()) as server, NatsBus(server.url) as bus:
            await make_history(bus)
            async with running(bus) as runner:
                offer(runner, 5)
                await until(lambda: runner.status.appended_count == 5)
                disk.limit(disk.used_bytes() + 500_000)
                for _ in range(50):
                    offer(runner, 1)
                    await anyio.sleep(0.01)
                await until(lambda: runner.status.problem)
                assert "history cannot be written" in runner.status.problem
                assert "its disk not full" in runner.status.problem

                disk.limit(None)
                server.kill()
                await server.start_async()
                await until(lambda: runner.status.appended_count == 55)
                assert "" == runner.status.problem
                assert runner.status.rebuilt_count == 0
                assert await is_history_equal(bus, runner)


@needs_mount
async def test_a_journal_without_room_begins_nothing_and_goes_on_by_itself(tmp_path: Path) -> None:
    with LazyMount(tmp_path / "disk") as disk, closing(Journal(disk.path / "journal")) as journal:
        bus = MemoryBus(MemoryServer(now=time.time))
        async with running(bus, writer="node.a", journal=journal) as runner:
            disk.limit(disk.used_bytes() + 50_000)
            offer(runner, 10)
            await until(lambda: runner.status.problem)
            assert runner.status.problem == f"the disk of {journal.path} is full: free some space on it"
            assert 0 == runner.status.appended_count, "nothing of the batch counts, so nothing that follows may begin"

            disk.limit(None)
            await until(lambda: runner.status.appended_count == 10)
            assert "" == runner.status.problem
            assert runner.status.rebuilt_count == 0
            await until(lambda: len(journal.entries) >= 10)
            assert await is_history_equal(bus, runner)


@pytest.mark.nats
async def test_a_store_too_small_for_the_streams_is_one_sentence(tmp_path: Path) -> None:
    config = ServerConfig(store_directory=tmp_path / "store", max_file_store_bytes=6 * MiB)
    async with NatsServer(tmp_path / "nats", config, binary=binary()) as server, NatsBus(server.url) as bus:
        with pytest.raises(NatsServerError, match=r"no room for stream DEAD.*max_file_store"):
            await ensure_streams(bus)

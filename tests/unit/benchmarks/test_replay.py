"""Live state against a replay of the stream, and the mark by which a running service tells where it is."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import anyio
import msgspec
import pytest

from benchmarks.replay import SETTINGS, NotThereYet, Replayable, load, replayed_digest
from kit.bus import Entry, Stored, Stream
from kit.bus_memory import MemoryBus, MemoryServer
from kit.outcomes import Effect, Input
from kit.processor import CHAIN_START, chain_hash
from kit.runner import Runner
from kit.service import Service
from kit.serving import ConnectionSettings, StateMark, health_server
from kit.telemetry import Tracer
from schemas.catalogue import encode
from schemas.messages import fact_subject
from schemas.placement import DeploymentRetired
from tests.unit.kit.toy import ToyState, toy

pytestmark = pytest.mark.anyio


@dataclass(slots=True)
class World:
    """A memory server with one service running, its health server, and a writer of placement's facts."""

    server: MemoryServer
    runner: Runner[ToyState]
    port: int
    last_hash: str = CHAIN_START
    last_seq: int = 0

    def history(self) -> list[Stored]:
        return list(self.server.stored(Stream.HISTORY))

    async def retire(self, *models: str) -> None:
        bus = MemoryBus(self.server)
        for number in itertools.count(self.last_seq + 1):
            if not models:
                return
            model, models = models[0], models[1:]
            fact = DeploymentRetired(
                at_s=0.0, inbox_seq=number, command_id=f"c{number}", tenant="t", deployment_id=f"d-{model}", model=model
            )
            subject, body = fact_subject("placement", fact), encode(fact)
            entry = Entry(
                subject=subject,
                body=body,
                id=f"placement:x:{number}",
                cause_seq=0,
                cursor_seq=0,
                previous_hash=self.last_hash,
            )
            self.last_hash = chain_hash(self.last_hash, id=entry.id, subject=subject, body=body)
            self.last_seq = (await bus.append("sublet.fact.placement.>", [entry], last_seq=self.last_seq)).last_seq

    async def mark(self) -> StateMark:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}/digest") as response,
        ):
            assert 200 == response.status, await response.text()
            return msgspec.json.decode(await response.read(), type=StateMark)

    async def until_decided(self, count: int) -> None:
        with anyio.fail_after(60):
            while self.runner.processor is None or len(self.runner.processor.state.decided) < count:
                await anyio.sleep(0.01)


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    async def perform(effect: Effect, traceparent: str) -> Input | None:
        return None

    server = MemoryServer()
    runner = Runner(
        toy(),
        None,
        MemoryBus(server, "one"),
        writer="autoscaler",
        instance="one",
        tracer=Tracer(None, None, root_ratio=0.0),
        perform=perform,
    )
    async with health_server(runner, ConnectionSettings()) as port, anyio.create_task_group() as tg:
        tg.start_soon(runner.run)
        with anyio.fail_after(60):
            while not runner.status.is_ready:
                await anyio.sleep(0.01)
        yield World(server, runner, port)
        tg.cancel_scope.cancel()


def service() -> Replayable:
    return Replayable(service=toy(), settings=None)


async def test_a_replay_from_nothing_gives_the_live_state() -> None:
    async with running() as world:
        await world.retire("a", "b", "c")
        await world.until_decided(3)

        mark = await world.mark()

        assert "autoscaler" == mark.writer
        assert replayed_digest(service(), world.history(), mark) == mark.digest


async def test_a_replay_stops_where_the_service_was_when_it_told_its_mark() -> None:
    async with running() as world:
        await world.retire("a")
        await world.until_decided(1)
        mark = await world.mark()
        await world.retire("b")
        await world.until_decided(2)

        assert (await world.mark()).digest != mark.digest
        assert replayed_digest(service(), world.history(), mark) == mark.digest


async def test_a_fold_that_does_something_else_than_the_live_one_is_found() -> None:
    async with running() as world:
        await world.retire("a", "b")
        await world.until_decided(2)
        mark = await world.mark()
        forgetful: Service[ToyState] = toy()
        del forgetful.folds[DeploymentRetired]

        replayed = replayed_digest(Replayable(service=forgetful, settings=None), world.history(), mark)

        assert replayed != mark.digest


async def test_history_that_does_not_reach_the_mark_yet_is_told_apart_from_a_difference() -> None:
    async with running() as world:
        await world.retire("a")
        await world.until_decided(1)
        mark = await world.mark()

        for shorter in (world.history()[:-1], []):
            with pytest.raises(NotThereYet):
                replayed_digest(service(), shorter, mark)


async def test_a_service_that_reads_history_still_tells_no_mark() -> None:
    runner = Runner(
        toy(),
        None,
        MemoryBus(MemoryServer(), "one"),
        writer="autoscaler",
        instance="one",
        tracer=Tracer(None, None, root_ratio=0.0),
    )
    async with (
        health_server(runner, ConnectionSettings()) as port,
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/digest") as response,
    ):
        assert 503 == response.status


@pytest.mark.parametrize("name", SETTINGS)
def test_every_log_processing_service_can_be_replayed(name: str) -> None:
    replayable = load(name, {"node": "here"} if name == "nodeagent" else {})

    assert name == replayable.service.name
    assert replayable.service.folds

"""The model of a kill is right: a real process that gets SIGKILL at a point, on a real server, leaves the same history
and has done the same work as the simulated one on the in-memory bus.
"""

import signal
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from kit.bus import Bus, CaughtUp, Entry, Stored, Stream
from kit.bus_memory import MemoryBus, MemoryServer
from kit.bus_nats import NatsBus
from kit.nats_server import NatsServer, ensure_streams
from kit.outcomes import Effect, Input
from kit.processor import CHAIN_START
from schemas.autoscaler import ReplicasDecided
from schemas.catalogue import decode, encode
from schemas.messages import fact_subject
from schemas.placement import DeploymentRetired
from tests.faults import virtual_time
from tests.faults.mortal import Member, Point
from tests.fixtures.nats import own_nats_server
from tests.unit.kit.toy import Work, WorkDone, toy

__all__ = ["own_nats_server"]

pytestmark = [pytest.mark.nats]
POINTS = [Point("handled", "placement_deployment_retired_v1"), Point("committed", "autoscaler_replicas_decided_v1")]
"""Nothing is durable yet; and: all is durable, and nothing that follows from it has left."""
PLACEMENT = "sublet.fact.placement.>"
AUTOSCALER = "sublet.fact.autoscaler.>"


async def retire(bus: Bus) -> None:
    fact = DeploymentRetired(at_s=0.0, inbox_seq=1, command_id="c1", tenant="t", deployment_id="d-a", model="a")
    entry = Entry(
        subject=fact_subject("placement", fact),
        body=encode(fact),
        id="placement:x:1",
        cause_seq=0,
        cursor_seq=0,
        previous_hash=CHAIN_START,
    )
    await bus.append(PLACEMENT, [entry], last_seq=0)


async def told(bus: Bus) -> list[str]:
    """What the toy service has in history: its starts and its decisions."""
    found = []
    async for item in bus.read(Stream.HISTORY, [AUTOSCALER], after_seq=0):
        if isinstance(item, CaughtUp):
            break
        found.append(_describe(item))
    return found


def _describe(stored: Stored) -> str:
    fact = decode(stored.body)
    return f"{fact.model}:{fact.reason}" if isinstance(fact, ReplicasDecided) else type(fact).__name__


def modelled(point: Point) -> tuple[list[str], list[str]]:
    """History and work, with a simulated kill."""
    performed: list[str] = []

    async def perform(effect: Effect, traceparent: str) -> Input:
        assert isinstance(effect, Work)
        performed.append(effect.model)
        return WorkDone(model=effect.model)

    async def story() -> list[str]:
        server = MemoryServer(now=anyio.current_time)
        member = Member(
            server=server,
            service=toy(),
            settings=None,
            writer="autoscaler",
            clock=anyio.current_time,
            perform=perform,
            kills=(point,),
        )
        async with anyio.create_task_group() as tg:
            tg.start_soon(member.live)
            await anyio.sleep(1.0)
            await retire(MemoryBus(server))
            await anyio.sleep(10.0)
            tg.cancel_scope.cancel()
        assert [point] == member.killed_at
        return await told(MemoryBus(server))

    return virtual_time.run(story), performed


def lived(server: NatsServer, folder: Path, point: Point, *, fact_count: int) -> tuple[list[str], list[str]]:
    """History and work, with SIGKILL."""

    def start(step: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.faults.process_to_kill", server.url, str(folder), step, point.kind]
        return subprocess.Popen(command)

    async def until_started(bus: Bus, count: int) -> None:
        with anyio.fail_after(60):
            while (await told(bus)).count("WriterStarted") < count:
                await anyio.sleep(0.1)

    async def story() -> list[str]:
        async with NatsBus(server.url) as bus:
            await ensure_streams(bus)
            first = start(point.step)
            await until_started(bus, 1)
            await retire(bus)
            assert -signal.SIGKILL == await anyio.to_thread.run_sync(first.wait, 60)
            second = start("never")
            try:
                await until_started(bus, 2)
                with anyio.move_on_after(60):
                    while len(await told(bus)) < fact_count:
                        await anyio.sleep(0.1)
                await anyio.sleep(0.5)  # For what should not come.
                return await told(bus)
            finally:
                second.kill()
                second.wait()

    found = anyio.run(story)
    work = folder / "performed"
    return found, work.read_text().split() if work.exists() else []


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_process_that_is_killed_leaves_what_the_model_says(
    own_nats_server: NatsServer, tmp_path: Path, point: Point
) -> None:
    history, work = modelled(point)

    assert (history, work) == lived(own_nats_server, tmp_path, point, fact_count=len(history))

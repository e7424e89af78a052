"""The real-time shell over the in-memory bus: order of commit and release, restarts, take-over, queries."""

import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from kit.bus import Entry, Stored, Stream
from kit.bus_memory import MemoryBus, MemoryServer
from kit.journal import Journal
from kit.outcomes import Effect, Input
from kit.processor import CHAIN_START, chain_hash
from kit.runner import Runner
from kit.service import Service
from kit.telemetry import Tracer
from schemas.catalogue import decode, encode
from schemas.gateways import ModelWanted
from schemas.messages import fact_subject, query_subject, signal_subject
from schemas.placement import DeploymentRetired
from schemas.queries import DeploymentList, ListDeployments, QueryRefused
from tests.unit.kit.toy import ToyState, Work, WorkDone, toy

pytestmark = pytest.mark.anyio
SILENT = Tracer(None, None, root_ratio=0.0)


class World:
    """A memory server with a placement writer, and runners of the toy service."""

    def __init__(self) -> None:
        self.server = MemoryServer(now=time.time)
        self.bus = MemoryBus(self.server)
        self._hash = CHAIN_START
        self.last_seq = 0
        self._numbers = itertools.count(1)
        self.performed: list[str] = []

    async def retire(self, model: str) -> None:
        number = next(self._numbers)
        fact = DeploymentRetired(
            at_s=0.0, inbox_seq=number, command_id=f"c{number}", tenant="t", deployment_id=f"d-{model}", model=model
        )
        subject, body = fact_subject("placement", fact), encode(fact)
        entry = Entry(
            subject=subject, body=body, id=f"placement:x:{number}", cause_seq=0, cursor_seq=0, previous_hash=self._hash
        )
        self._hash = chain_hash(self._hash, id=entry.id, subject=subject, body=body)
        self.last_seq = (await self.bus.append("sublet.fact.placement.>", [entry], last_seq=self.last_seq)).last_seq

    async def append_raw(self, body: bytes) -> None:
        """A fact of placement's, with these bytes."""
        number = next(self._numbers)
        subject = "sublet.fact.placement.x"
        entry = Entry(
            subject=subject, body=body, id=f"placement:x:{number}", cause_seq=0, cursor_seq=0, previous_hash=self._hash
        )
        self._hash = chain_hash(self._hash, id=entry.id, subject=subject, body=body)
        self.last_seq = (await self.bus.append("sublet.fact.placement.>", [entry], last_seq=self.last_seq)).last_seq

    async def perform(self, effect: Effect, traceparent: str) -> Input | None:
        assert isinstance(effect, Work)
        self.performed.append(effect.model)
        return WorkDone(model=effect.model)

    @asynccontextmanager
    async def running(
        self,
        instance: str,
        *,
        journal: Journal | None = None,
        needs_lease: bool = False,
        service: Service[ToyState] | None = None,
        **options: Any,
    ) -> AsyncIterator[Runner[ToyState]]:
        """`options`: more for the runner. Left when it is ready."""
        runner = self.runner(instance, journal=journal, needs_lease=needs_lease, service=service, **options)
        async with anyio.create_task_group() as tg:
            tg.start_soon(runner.run)
            with anyio.fail_after(60):
                while not runner.status.is_ready:
                    await anyio.sleep(0.01)
            yield runner
            tg.cancel_scope.cancel()

    def runner(
        self, instance: str, *, needs_lease: bool = False, service: Service[ToyState] | None = None, **options: Any
    ) -> Runner[ToyState]:
        return Runner(
            service or toy(),
            None,
            MemoryBus(self.server, instance),
            writer="autoscaler",
            instance=instance,
            tracer=SILENT,
            perform=self.perform,
            needs_lease=needs_lease,
            **options,
        )

    def facts(self) -> list[str]:
        own = [s for s in self.server.stored(Stream.HISTORY) if s.subject.startswith("sublet.fact.autoscaler.")]
        return [name for s in own if (name := self._describe(s))]

    @staticmethod
    def _describe(stored: Stored) -> str:
        fact = decode(stored.body)
        return f"{fact.model}:{fact.reason}" if hasattr(fact, "reason") else ""  # type: ignore[attr-defined]

    async def until_facts(self, count: int) -> list[str]:
        with anyio.fail_after(60):
            while len(self.facts()) < count:
                await anyio.sleep(0.01)
        return self.facts()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal")) as opened:
        yield opened


async def test_a_fact_leads_to_a_decision_then_to_an_effect_then_to_its_result(world: World) -> None:
    async with world.running("one"):
        await world.retire("a")

        assert ["a:after 1", "a:done"] == await world.until_facts(2)
    assert ["a"] == world.performed


async def test_history_is_read_before_anything_is_decided_anew(world: World) -> None:
    async with world.running("one"):
        await world.retire("a")
        await world.until_facts(2)

    async with world.running("two") as runner:
        await world.retire("b")
        facts = await world.until_facts(4)
        assert runner.processor is not None
        assert ["a", "b"] == runner.processor.state.retired

    assert ["a:after 1", "a:done", "b:after 2", "b:done"] == facts
    assert ["a", "b"] == world.performed


async def test_what_arrived_while_nobody_ran_is_handled_by_the_next_instance(world: World) -> None:
    await world.retire("a")

    async with world.running("one"):
        assert ["a:after 1", "a:done"] == await world.until_facts(2)


async def test_a_signal_starts_a_timer_that_comes_back_as_an_input(world: World) -> None:
    async with world.running("one"):
        wanted = ModelWanted(gateway="g", deployment_id="d", model="a", replica_id="r")
        await world.bus.publish(signal_subject(wanted), encode(wanted))

        assert ["a:reminded"] == await world.until_facts(1)


async def test_a_query_is_answered_from_acknowledged_state(world: World) -> None:
    async with world.running("one"):
        await world.retire("a")
        await world.until_facts(2)
        subject = query_subject("t", ListDeployments).replace("placement", "autoscaler")
        answer = await world.bus.request(subject, encode(ListDeployments()), timeout_s=2)

    assert ("a:after 1", "a:done") == msgspec.json.decode(answer, type=DeploymentList).labels


async def test_a_query_that_cannot_be_read_gets_one_sentence(world: World) -> None:
    async with world.running("one"):
        subject = query_subject("t", ListDeployments).replace("placement", "autoscaler")
        answer = await world.bus.request(subject, b"{", timeout_s=2)

    assert "cannot be read" in msgspec.json.decode(answer, type=QueryRefused).error


async def test_a_foreign_message_under_the_own_prefix_makes_the_writer_rebuild_and_go_on(world: World) -> None:
    """Somebody published garbage straight into history: nothing is lost, the garbage is put aside with the reason."""
    async with world.running("one") as runner:
        await world.retire("a")
        await world.until_facts(2)
        await world.bus.publish_stored("sublet.fact.autoscaler.junk", b"{not json", id="junk")
        with anyio.fail_after(60):
            while runner.status.rebuilt_count == 0 or not runner.status.is_ready:
                await anyio.sleep(0.01)
        await world.retire("b")

        readable = [s for s in world.server.stored(Stream.HISTORY) if b"not json" not in s.body]
        with anyio.fail_after(60):
            while len([s for s in readable if b'"b"' in s.body]) < 3:
                await anyio.sleep(0.01)
                readable = [s for s in world.server.stored(Stream.HISTORY) if b"not json" not in s.body]
    (dead,) = world.server.stored(Stream.DEAD)
    assert b"not a JSON object" in dead.body


async def test_a_fact_in_an_unknown_version_makes_the_service_not_ready_and_nothing_is_decided(world: World) -> None:
    async with world.running("one") as runner:
        await world.append_raw(b'{"type": "placement.deployment_retired.v99"}')
        with anyio.fail_after(60):
            while runner.status.is_ready:
                await anyio.sleep(0.01)
        await world.retire("a")
        await anyio.sleep(0.05)

        assert "upgrade this service first" in runner.status.why_not
        assert [] == world.facts()


async def test_a_second_instance_stands_by_until_the_first_is_gone(world: World) -> None:
    async with world.running("one", needs_lease=True):
        standby = Runner(
            toy(),
            None,
            MemoryBus(world.server, "two"),
            writer="autoscaler",
            instance="two",
            tracer=SILENT,
            perform=world.perform,
        )
        async with anyio.create_task_group() as tg:
            tg.start_soon(standby.run)
            await world.retire("a")
            await world.until_facts(2)

            assert not standby.status.is_ready
            assert "standing by" in standby.status.why_not
            tg.cancel_scope.cancel()


async def test_a_journaled_writer_decides_while_the_stream_is_away_and_uploads_in_order(
    world: World, journal: Journal
) -> None:
    async with world.running("one", journal=journal) as runner:
        world.server.stop()
        runner.offer(WorkDone(model="x"))
        runner.offer(WorkDone(model="y"))
        with anyio.fail_after(60):
            while len([e for e in journal.entries if _reason(e)]) < 2:
                await anyio.sleep(0.01)
        assert ["x:done", "y:done"] == [d for e in journal.entries if (d := _reason(e))]
        await world.server.restart()

        assert ["x:done", "y:done"] == await world.until_facts(2)


async def test_what_only_the_journal_holds_is_part_of_the_state_after_a_restart(world: World, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    async with world.running("one", journal=journal) as runner:
        world.server.stop()
        runner.offer(WorkDone(model="x"))
        with anyio.fail_after(60):
            while not [e for e in journal.entries if _reason(e)]:
                await anyio.sleep(0.01)
    journal.close()
    await world.server.restart()

    with closing(Journal(tmp_path / "journal")) as reopened:
        async with world.running("two", journal=reopened) as reborn:
            assert reborn.processor is not None
            assert ["x:done"] == reborn.processor.state.decided
            assert ["x:done"] == await world.until_facts(1)


def _reason(entry: Entry) -> str:
    fact = decode(entry.body)
    return f"{fact.model}:{fact.reason}" if hasattr(fact, "reason") else ""  # type: ignore[attr-defined]


async def test_a_clock_that_is_set_back_does_not_hold_up_timers(world: World) -> None:
    ahead_s = 3600.0
    async with world.running("one", clock=lambda: time.time() + ahead_s) as runner:
        first = ModelWanted(gateway="g", deployment_id="d", model="a", replica_id="r")
        await world.bus.publish(signal_subject(first), encode(first))
        assert ["a:reminded"] == await world.until_facts(1)
        before_s = runner.now_s()

        ahead_s = 0.0

        assert before_s - 1 < runner.now_s()
        second = ModelWanted(gateway="g", deployment_id="d", model="b", replica_id="r")
        await world.bus.publish(signal_subject(second), encode(second))
        assert ["a:reminded", "b:reminded"] == await world.until_facts(2)

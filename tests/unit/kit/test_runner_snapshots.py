"""The real-time shell and its snapshots: when it takes them, what it starts from, and what it refuses to go on with."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from kit.bus import Stream
from kit.bus_memory import MemoryBus
from kit.errors import InvariantBroken
from kit.journal import Journal
from kit.machine import Machine, kept_machine_id
from kit.outcomes import Context, Outcome
from kit.runner import Runner
from kit.service import Service, digest
from kit.shell_settings import ShellSettings
from kit.snapshot_store import SnapshotStore
from kit.steps import Step
from schemas.catalogue import encode
from schemas.messages import order_subject
from schemas.orders import ParkOrdered
from tests.unit.kit.test_runner import World
from tests.unit.kit.toy import ToyState, decided, toy

pytestmark = pytest.mark.anyio
SHELL = ShellSettings(snapshot_every_count=1000)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal")) as opened:
        yield opened


def state_of(runner: Runner[ToyState]) -> ToyState:
    assert runner.processor is not None
    return runner.processor.state


async def lived(world: World, instance: str, *models: str, shell: ShellSettings = SHELL) -> bytes:
    """One life that ends cleanly; the digest of its last state."""
    async with world.running(instance, shell=shell) as runner:
        expected_count = len(world.facts()) + 2 * len(models)
        for model in models:
            await world.retire(model)
        await world.until_facts(expected_count)
        await settled(runner)
    return digest(state_of(runner))


async def settled(runner: Runner[ToyState]) -> None:
    """Until it has heard of all that it wrote."""
    processor = runner.processor
    assert processor is not None
    with anyio.fail_after(60):
        while processor.read_seq < processor.last_seq:
            await anyio.sleep(0.01)


async def kept(world: World) -> list[int]:
    return [m.position.last_seq for m in await SnapshotStore(MemoryBus(world.server), "autoscaler").found()]


async def test_a_start_after_a_clean_end_reads_only_what_came_later(world: World) -> None:
    last = await lived(world, "one", "a", "b")
    await world.retire("c")

    async with world.running("two", shell=SHELL) as runner:
        assert runner.status.replayed_count == 1
        await world.until_facts(6)
        await settled(runner)
        state = state_of(runner)

    assert ["a", "b", "c"] == state.retired
    assert sorted(state.decided) == sorted(["a:after 1", "a:done", "b:after 2", "b:done", "c:after 3", "c:done"])
    assert last != digest(state)
    assert world.performed == ["a", "b", "c"]


async def test_a_start_from_a_snapshot_and_one_from_zero_give_the_same_state(world: World) -> None:
    await lived(world, "one", "a", "b")
    async with world.running("two", shell=SHELL) as restored:
        state = digest(state_of(restored))
        await settled(restored)

    async with world.running("three") as folded:
        assert folded.status.replayed_count > restored.status.replayed_count
        assert digest(state_of(folded)) == state


async def test_a_snapshot_is_taken_after_so_many_inputs(world: World) -> None:
    async with world.running("one", shell=ShellSettings(snapshot_every_count=4)) as runner:
        for model in "abcdef":
            await world.retire(model)
        await world.until_facts(12)
        with anyio.fail_after(60):
            while runner.status.snapshot_count < 2:
                await world.bus.publish("sublet.signal.gateways_model_wanted_v1", b"")
                await world.retire("more")
                await anyio.sleep(0.01)

    assert len(await kept(world)) >= 2


async def until_killed(world: World) -> None:
    """A life that takes snapshots and ends without a clean end."""
    is_dying = False

    async def at_step(step: Step, what: object) -> None:
        if is_dying and step is Step.HANDLED:
            raise RuntimeError("as a kill")

    runner = world.runner("one", shell=ShellSettings(snapshot_every_count=4), at_step=at_step)
    async with anyio.create_task_group() as tg:
        tg.start_soon(runner.run)
        for model in "abcdef":
            await world.retire(model)
        await world.until_facts(12)
        with anyio.fail_after(60):
            while runner.status.snapshot_count < 1:
                await world.retire("more")
                await anyio.sleep(0.01)
        is_dying = True
        await world.retire("last")


async def test_a_killed_instance_is_followed_from_its_newest_snapshot(world: World) -> None:
    with pytest.RaisesGroup(RuntimeError, flatten_subgroups=True):
        await until_killed(world)
    count = len(world.server.stored(Stream.HISTORY))

    async with world.running("two", shell=SHELL) as restored:
        assert 0 < restored.status.replayed_count < count
        await settled(restored)
        restored_state = digest(state_of(restored))

    async with world.running("three") as folded:
        assert digest(state_of(folded)) == restored_state


async def test_a_damaged_snapshot_gives_way_to_the_one_before(world: World) -> None:
    await lived(world, "one", "a")
    await lived(world, "two", "b")
    first_seq = (await kept(world))[1]
    newest = (await SnapshotStore(world.bus, "autoscaler").found())[0]
    await world.bus.publish_stored(f"sublet.snapshot.autoscaler.chunk.{newest.slot}.0", b"rubbish", id="x")

    async with world.running("three", shell=SHELL) as runner:
        assert ["a", "b"] == state_of(runner).retired
        history = world.server.stored(Stream.HISTORY)
        assert runner.status.replayed_count <= len([s for s in history if s.seq > first_seq])


@pytest.mark.parametrize("what", ["version", "stream", "beyond"])
async def test_a_snapshot_that_does_not_fit_means_a_fold_from_zero(world: World, what: str) -> None:
    await lived(world, "one", "a")
    service = toy()
    if what == "version":
        service.state_version = 2
    else:
        kept_history = [] if what == "stream" else world.server.stored(Stream.HISTORY)[:1]
        held = world.server.streams[Stream.HISTORY]
        if what == "stream":
            world.server.recreate(Stream.HISTORY)
        else:
            held.stored.clear()
            held.stored.extend(kept_history)
            held.last_seq = 1

    async with world.running("two", shell=SHELL, service=service) as runner:
        assert (["a"] if what == "version" else []) == state_of(runner).retired


async def test_history_may_be_trimmed_below_a_snapshot(world: World) -> None:
    await lived(world, "one", "a", "b")
    [newest] = await SnapshotStore(world.bus, "autoscaler").found()
    world.server.trim(Stream.HISTORY, below_seq=world.last_seq)
    assert world.last_seq < newest.position.last_seq

    async with world.running("two", shell=SHELL) as runner:
        await world.retire("c")
        await world.until_facts(len(world.facts()) + 2)
        assert ["a", "b", "c"] == state_of(runner).retired


async def test_trimmed_history_without_a_snapshot_is_not_ready_with_one_sentence(world: World) -> None:
    await lived(world, "one", "a")
    world.server.trim(Stream.HISTORY, below_seq=3)
    world.server.recreate(Stream.SNAPSHOTS)
    runner = world.runner("two", shell=SHELL)

    async with anyio.create_task_group() as tg:
        tg.start_soon(runner.run)
        with anyio.fail_after(60):
            while "trimmed" not in runner.status.why_not and "starts at" not in runner.status.why_not:
                await anyio.sleep(0.01)
        tg.cancel_scope.cancel()

    assert not runner.status.is_ready
    assert "no snapshot of autoscaler can be used (there is none): restore the stream SNAPSHOTS" in (
        runner.status.why_not
    )


async def test_a_journaled_writer_takes_snapshots_of_what_the_stream_holds(world: World, journal: Journal) -> None:
    async with world.running("one", journal=journal, shell=SHELL) as runner:
        await world.retire("a")
        await world.until_facts(2)
        await settled(runner)
    world.server.stop()
    left = [entry.id for entry in journal.entries]
    await world.server.restart()

    async with world.running("two", journal=journal, shell=SHELL) as again:
        assert ["a:after 1", "a:done"] == state_of(again).decided
        assert again.status.replayed_count == 0
        assert again.status.skipped_count == 0
        assert left
        await world.retire("b")
        await world.until_facts(4)


async def test_another_machine_is_refused_with_one_sentence_and_may_take_over_on_purpose(
    world: World, tmp_path: Path
) -> None:
    here, there = (Machine(machine_id=kept_machine_id(tmp_path / name)) for name in ("here", "there"))
    assert kept_machine_id(tmp_path / "here") == here.machine_id != there.machine_id
    async with world.running("one", machine=here, shell=SHELL) as first:
        await settled(first)
    runner = world.runner("two", machine=there, shell=SHELL)
    async with anyio.create_task_group() as tg:
        tg.start_soon(runner.run)
        with anyio.fail_after(60):
            while "last written by" not in runner.status.why_not:
                await anyio.sleep(0.01)
        tg.cancel_scope.cancel()

    assert f"set take_over_from to {here.machine_id}" in runner.status.why_not
    async with world.running("three", machine=here):
        pass
    on_purpose = Machine(machine_id=there.machine_id, take_over_from=here.machine_id)
    async with world.running("four", machine=on_purpose):
        pass
    async with world.running("five", machine=there):
        pass


async def test_a_broken_invariant_stops_the_instance(world: World) -> None:
    def check(state: ToyState) -> None:
        assert "b" not in state.retired, "b is retired"

    service = toy()
    service.check_invariants = check
    runner = world.runner("one", service=service, shell=ShellSettings(check_every_count=1))

    with pytest.RaisesGroup(pytest.RaisesExc(InvariantBroken, match="b is retired"), flatten_subgroups=True):
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tg:
                tg.start_soon(runner.run)
                await world.retire("a")
                await world.until_facts(2)
                await world.retire("b")


def obeying() -> Service[ToyState]:
    service = toy()

    @service.on(ParkOrdered)
    def parked(state: ToyState, order: ParkOrdered, ctx: Context) -> Sequence[Outcome]:
        return [decided(order.replica_id, ctx, "ordered")]

    return service


async def test_an_order_that_waited_past_its_deadline_is_dropped_and_counted(world: World) -> None:
    def order(replica_id: str, deadline_ms: int) -> ParkOrdered:
        return ParkOrdered(
            node="autoscaler", writer_epoch=1, deadline_ms=deadline_ms, replica_id=replica_id, wake_epoch=1
        )

    async with world.running("one", service=obeying()) as runner:
        for sent in (order("late", 0), order("in-time", 10_000)):
            await world.bus.publish(order_subject(sent), encode(sent))
        assert ["in-time:ordered"] == await world.until_facts(1)
        assert runner.status.refused_order_count == 1

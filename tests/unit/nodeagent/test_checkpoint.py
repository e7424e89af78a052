"""An engine of several processes under the driver's checkpoint: all of it moves, or none of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from schemas.deployments import DeploymentSpec, EngineSpec, ShareSpec
from schemas.holders import EngineView
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB
from services.nodeagent.mover import wire
from services.nodeagent.mover.checkpoint import Checkpoint
from services.nodeagent.mover.checkpointer_client import CheckpointerClient, CheckpointProblem
from services.nodeagent.mover.driver import Broken, Standing, StillParked, StillResident, SwapTarget
from services.nodeagent.mover.kept_support import KeptSupport

pytestmark = pytest.mark.anyio

TARGET = SwapTarget(
    replica=ReplicaProposal(
        replica_id="r",
        deployment_id="d",
        tenant="default",
        deployment=DeploymentSpec(
            name="m", engine=EngineSpec(weights_bytes=GiB), share=ShareSpec(request_bytes=2 * GiB, gpu_count=2)
        ),
        shares=tuple(
            ShareProposal(
                replica_id="r", shard_index=index, gpu_uuid=f"GPU-{index}", request_bytes=GiB, limit_bytes=GiB
            )
            for index in range(2)
        ),
    ),
    lease_epoch=3,
    engine=EngineView(
        replica_id="r", lease_epoch=3, pid=1, started_ticks=1, port=1, is_gated=False, is_alive=True, exit_code=None,
        namespace="sublet-r", log_path="/nowhere",
    ),
    endpoint="http://r",
    timeout_s=5.0,
)  # fmt: skip
NEXT = {
    wire.Lock: ("running", "locked"),
    wire.Save: ("locked", "checkpointed"),
    wire.Load: ("checkpointed", "locked"),
    wire.Unlock: ("locked", "running"),
}


class Processes:
    """What a checkpointer answers about processes; a step may be told to fail for some of them."""

    def __init__(self, *pids: int) -> None:
        self.states = dict.fromkeys(pids, "running")
        self.done: list[tuple[str, int]] = []
        self.failing: dict[tuple[type[wire.Ask], int], str] = {}
        self.free_bytes = 8 * GiB
        self.on_lock: Callable[[int], None] = lambda _: None
        self.pids = frozenset({99})

    async def ask(self, question: wire.Question, kind: type[msgspec.Struct], *, timeout_s: float) -> Any:
        match question:
            case wire.States():
                away = GiB * list(self.states.values()).count("checkpointed")
                return wire.Told(
                    states={pid: self.states[pid] for pid in question.pids if pid in self.states},
                    away_bytes={"GPU-0": away} if away else {},
                    free_bytes={"GPU-0": self.free_bytes} if away else {},
                )
            case wire.Lock() | wire.Save() | wire.Load() | wire.Unlock():
                return self._step(question)
            case _:
                return wire.Done()

    def _step(self, question: wire.Lock | wire.Save | wire.Load | wire.Unlock) -> Any:
        if (type(question), question.pid) in self.failing:
            raise CheckpointProblem("NotReady", self.failing[type(question), question.pid])
        before, after = NEXT[type(question)]
        assert before == self.states[question.pid], "a step out of order leaves a process that nobody can save"
        self.states[question.pid] = after
        self.done.append((type(question).__name__, question.pid))
        if isinstance(question, wire.Lock):
            self.on_lock(question.pid)
        return wire.Moved(size_bytes=GiB, move_s=0.1)

    def driver(self) -> Checkpoint:
        client = cast(CheckpointerClient, self)
        return Checkpoint(client, lock_timeout_s=1.0, members=lambda _: tuple(self.states))


def steps(processes: Processes) -> list[str]:
    """Kinds of steps in order, repeats left out."""
    kinds = [kind for kind, _ in processes.done]
    return [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]


async def test_all_are_locked_before_any_is_saved_and_all_are_back_before_any_goes_on() -> None:
    processes = Processes(11, 12, 13)
    driver = processes.driver()

    parked = await driver.park(TARGET)
    assert Standing.PARKED is await driver.standing(TARGET)
    woken = await driver.wake(TARGET)

    assert ["Lock", "Save", "Load", "Unlock"] == steps(processes)
    assert (3 * GiB, 3 * GiB) == (parked.copied_bytes, woken.copied_bytes)
    assert Standing.RESIDENT is await driver.standing(TARGET)


async def test_when_one_cannot_be_locked_all_go_on() -> None:
    processes = Processes(11, 12, 13)
    processes.failing[wire.Lock, 12] = "running work did not end"

    with pytest.raises(StillResident, match="pid 12: running work did not end"):
        await processes.driver().park(TARGET)

    assert {"running"} == set(processes.states.values())
    assert "Save" not in steps(processes)


async def test_when_one_cannot_be_saved_the_others_come_back_and_all_go_on() -> None:
    processes = Processes(11, 12, 13)
    processes.failing[wire.Save, 12] = "no"

    with pytest.raises(StillResident, match="could not be saved"):
        await processes.driver().park(TARGET)

    assert {"running"} == set(processes.states.values())


async def test_when_one_cannot_be_brought_back_none_goes_on() -> None:
    """Half an engine would wait for the other half for ever."""
    processes = Processes(11, 12)
    await processes.driver().park(TARGET)
    processes.failing[wire.Load, 11] = "no"

    with pytest.raises(Broken):
        await processes.driver().wake(TARGET)

    assert "Unlock" not in steps(processes)


async def test_a_process_that_came_up_while_the_others_were_locked_is_locked_too() -> None:
    processes = Processes(11)

    def fork(pid: int) -> None:
        processes.states.setdefault(12, "running")

    processes.on_lock = fork

    await processes.driver().park(TARGET)

    assert {11: "checkpointed", 12: "checkpointed"} == processes.states


async def test_without_room_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.nodeagent.mover.checkpoint.FREE_DEADLINE_S", 0.05)
    processes = Processes(11, 12)
    await processes.driver().park(TARGET)
    processes.free_bytes = GiB

    with pytest.raises(StillParked) as refused:
        await processes.driver().wake(TARGET)

    assert GiB == refused.value.short_by_bytes
    assert {"checkpointed"} == set(processes.states.values())


@pytest.mark.parametrize("states", [("locked", "running"), ("checkpointed", "locked"), ("checkpointed", "running")])
async def test_a_step_that_was_interrupted_is_finished_in_either_direction(states: tuple[str, str]) -> None:
    for is_park, end in ((True, "checkpointed"), (False, "running")):
        processes = Processes(11, 12)
        processes.states = dict(zip((11, 12), states, strict=True))
        driver = processes.driver()
        assert Standing.BETWEEN is await driver.standing(TARGET)

        await (driver.park(TARGET) if is_park else driver.wake(TARGET))

        assert {end} == set(processes.states.values())


async def test_one_that_the_driver_gave_up_breaks_the_engine() -> None:
    processes = Processes(11, 12)
    processes.states[12] = "failed"

    with pytest.raises(Broken, match="given it up"):
        await processes.driver().standing(TARGET)


async def test_an_engine_without_a_gpu_process_cannot_be_parked_this_way() -> None:
    with pytest.raises(Broken, match="none of its processes uses a GPU"):
        await Processes().driver().park(TARGET)


class Told:
    """A checkpointer that is asked what its driver can do."""

    def __init__(self, *, is_supported: bool) -> None:
        self.pids: frozenset[int] = frozenset()
        self.is_supported = is_supported
        self.asked_count = 0

    async def ask(self, question: wire.Question, kind: type[msgspec.Struct], *, timeout_s: float) -> Any:
        assert isinstance(question, wire.Supports)
        self.asked_count += 1
        return wire.Supported(is_supported=self.is_supported, has_custom_storage=True, reason="as the test says")


async def lives(tmp_path: Path, *told: Told, boots: tuple[str, ...]) -> list[bool]:
    """What each life of an agent finds, the first of them on a host that it does not know."""
    found = []
    for client, boot in zip(told, boots, strict=True):
        (tmp_path / "boot").write_text(boot)
        kept = KeptSupport(tmp_path / "state" / "kept.json", of_the_host=(tmp_path / "boot", tmp_path / "no driver"))
        driver = Checkpoint(cast(CheckpointerClient, client), lock_timeout_s=1.0, kept=kept)
        found.append((await driver.support(["GPU-0"]))["GPU-0"].is_supported)
    return found


async def test_a_returning_agent_does_not_wait_for_what_the_driver_has_said_in_this_boot(tmp_path: Path) -> None:
    first, second, third = Told(is_supported=True), Told(is_supported=True), Told(is_supported=False)

    assert [True, True, False] == await lives(tmp_path, first, second, third, boots=("one", "one", "two"))
    assert [1, 0, 1] == [first.asked_count, second.asked_count, third.asked_count]


async def test_a_no_of_the_driver_is_asked_for_again(tmp_path: Path) -> None:
    first, second = Told(is_supported=False), Told(is_supported=True)

    assert [False, True] == await lives(tmp_path, first, second, boots=("one", "one"))


async def test_a_checkpointer_that_runs_is_asked(tmp_path: Path) -> None:
    first, second = Told(is_supported=True), Told(is_supported=True)
    second.pids = frozenset({99})

    assert [True, True] == await lives(tmp_path, first, second, boots=("one", "one"))
    assert 1 == second.asked_count

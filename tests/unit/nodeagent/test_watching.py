"""The node agent's eyes, over the virtual driver: what they report of GPUs that change, and what is nobody's."""

import threading
from collections.abc import Callable, Mapping

import anyio
import pytest

from devices.api import GpuCondition, GpuDescription, NotReady
from devices.profiles import profile
from devices.virtual import VirtualGpu, VirtualHost, VirtualInventory
from kit.outcomes import Input
from schemas.units import GiB, MiB
from services.nodeagent.gpu_inputs import GpuBack, GpuFaultSeen, GpuGone, GpuMeasured
from services.nodeagent.holder_client import HolderProblem
from services.nodeagent.watching import GpuWatch, foreign_bytes
from tests.unit.nodeagent.builders import gpu

pytestmark = pytest.mark.anyio
FIRST, SECOND = "GPU-0", "GPU-1"


class Eyes:
    """A host of two GPUs, and a watch over it."""

    def __init__(self) -> None:
        self.host = VirtualHost([VirtualGpu(uuid=uuid, profile=profile("h100-80")) for uuid in (FIRST, SECOND)])
        self.inventory = VirtualInventory(self.host)
        self.offered: tuple[str, ...] | None = (FIRST, SECOND)
        self.ours: frozenset[int] = frozenset()
        self.reported: list[Input] = []

    def watch(self, *, every_s: float = 0.01, answer_s: float = 5.0, inventory: object = None) -> GpuWatch:
        return GpuWatch(
            inventory or self.inventory,  # type: ignore[arg-type]
            every_s=every_s,
            offered=lambda: self.offered,
            our_pids=self._our_pids,
            probe=self._probe,
            report=self.reported.append,
            answer_s=answer_s,
        )

    async def _our_pids(self) -> frozenset[int]:
        return self.ours

    async def _probe(self) -> tuple:  # type: ignore[type-arg]
        return tuple(gpu(index) for index in range(2))

    def seen(self, kind: type[Input]) -> list[Input]:
        return [each for each in self.reported if isinstance(each, kind)]


async def test_a_look_tells_how_each_gpu_is() -> None:
    eyes = Eyes()
    eyes.host.set_condition(SECOND, GpuCondition(temperature_c=91, is_too_hot=True, ecc_error_count=2))
    eyes.host.set_utilization(SECOND, 0.5)

    await eyes.watch().look()

    well, hot = eyes.seen(GpuMeasured)
    assert (
        GpuMeasured(
            gpu_uuid=FIRST, used_bytes=0, foreign_bytes=0, temperature_c=40, is_too_hot=False, ecc_error_count=0
        )
        == well
    )
    assert (
        GpuMeasured(
            gpu_uuid=SECOND,
            used_bytes=0,
            foreign_bytes=0,
            utilization_fraction=0.5,
            temperature_c=91,
            is_too_hot=True,
            ecc_error_count=2,
        )
        == hot
    )


async def test_a_node_that_was_not_looked_at_yet_is_not_measured() -> None:
    eyes = Eyes()
    eyes.offered = None

    await eyes.watch().look()

    assert [] == eyes.reported


async def test_a_lost_gpu_is_gone_and_one_that_is_not_offered_is_back() -> None:
    eyes = Eyes()
    eyes.offered = (FIRST,)
    eyes.host.lose_gpu(FIRST)

    await eyes.watch().look()

    assert [GpuGone(gpu_uuid=FIRST)] == eyes.seen(GpuGone)
    assert not eyes.seen(GpuBack), "the probe names it by another uuid"


async def test_whoever_is_back_comes_with_its_whole_offer() -> None:
    eyes = Eyes()
    eyes.offered = ()
    eyes.host = VirtualHost([VirtualGpu(uuid="gpu-0", profile=profile("h100-80"))])
    eyes.inventory = VirtualInventory(eyes.host)

    await eyes.watch().look()

    assert [GpuBack(gpu=gpu(0))] == eyes.reported


class Silent(VirtualInventory):
    """A driver that refuses one question."""

    def process_bytes(self, gpu_uuid: str) -> Mapping[int, int | None]:
        if gpu_uuid == FIRST:
            raise NotReady(call="nvmlDeviceGetComputeRunningProcesses", code="Timeout")
        return super().process_bytes(gpu_uuid)


async def test_a_refused_question_is_no_answer_and_no_zero() -> None:
    eyes = Eyes()

    await eyes.watch(inventory=Silent(eyes.host)).look()

    silent, well = eyes.seen(GpuMeasured)
    assert isinstance(silent, GpuMeasured)
    assert ("nvmlDeviceGetComputeRunningProcesses: Timeout", None) == (silent.problem, silent.foreign_bytes)
    assert isinstance(well, GpuMeasured)
    assert ("", 0) == (well.problem, well.foreign_bytes)


class Hanging(VirtualInventory):
    """A driver that does not come back."""

    def __init__(self, host: VirtualHost, wait: Callable[[], object]) -> None:
        super().__init__(host)
        self._wait = wait

    def gpus(self) -> tuple[GpuDescription, ...]:
        self._wait()
        return super().gpus()


@pytest.mark.processes
async def test_a_driver_that_hangs_holds_up_nobody_and_is_told() -> None:
    eyes, released = Eyes(), threading.Event()

    with anyio.fail_after(30):
        await eyes.watch(answer_s=0.05, inventory=Hanging(eyes.host, lambda: released.wait(30))).look()
    released.set()

    problems = [each.problem for each in eyes.seen(GpuMeasured) if isinstance(each, GpuMeasured)]
    assert ["NVML: NO_ANSWER (within 0.05 s)"] * 2 == problems


@pytest.mark.processes
async def test_error_reports_are_passed_on_while_looks_go_on() -> None:
    eyes = Eyes()
    eyes.host.lose_gpu(FIRST)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(eyes.watch().run)
        with anyio.fail_after(30):
            while not (eyes.seen(GpuFaultSeen) and eyes.seen(GpuGone)):
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()

    assert GpuFaultSeen(gpu_uuid=FIRST, code=79) == eyes.seen(GpuFaultSeen)[0]


async def test_without_the_holder_nothing_is_measured() -> None:
    """Whose processes are whose is not known then, and our own engines must not count as strangers."""
    eyes = Eyes()

    async def away() -> frozenset[int]:
        raise HolderProblem("the holder does not answer", status=0)

    eyes._our_pids = away  # type: ignore[method-assign]
    with pytest.raises(HolderProblem):
        await eyes.watch().look()

    assert [] == eyes.reported


# --- Whose bytes ------------------------------------------------------------------------------------------------------


def bytes_of(by_pid: dict[int, int | None], *, ours: set[int], used_bytes: int = 0, dead: int = 0) -> int | None:
    return foreign_bytes(by_pid, ours, used_bytes=used_bytes, is_alive=lambda pid: pid != dead)


def test_what_others_use_is_foreign() -> None:
    assert 3 * GiB == bytes_of({1: 5 * GiB, 2: GiB, 3: 2 * GiB}, ours={1})


def test_who_ended_since_it_was_listed_uses_nothing() -> None:
    assert 2 * GiB == bytes_of({1: 5 * GiB, 2: GiB, 3: 2 * GiB}, ours={1}, dead=2)


def test_a_stranger_of_unknown_size_is_what_is_left_of_the_whole() -> None:
    assert 4 * GiB == bytes_of({1: 5 * GiB, 2: None}, ours={1}, used_bytes=9 * GiB)


def test_nobody_is_a_stranger_where_only_our_own_sizes_are_unknown() -> None:
    assert 0 == bytes_of({1: None}, ours={1}, used_bytes=9 * GiB)


def test_strangers_among_unknown_sizes_cannot_be_told() -> None:
    assert bytes_of({1: None, 2: None}, ours={1}, used_bytes=9 * MiB) is None

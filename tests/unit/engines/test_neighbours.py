"""The board on which engines of one GPU see each other, and steps that take longer because of it."""

import asyncio
import struct
import tempfile
import time
from pathlib import Path

import pytest

from engines.model.sharing import Demand, Sharing
from engines.model.timing import StepCost
from engines.neighbours import FILE_BYTES, FORGOTTEN_NS, SLOT, SLOT_COUNT, Neighbours, board_path
from engines.pacing import GpuPace
from engines.process import Log

WORK = Demand(compute_fraction=0.25, memory_fraction=0.75)


class Clock:
    def __init__(self) -> None:
        self.now_ns = 10**12

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def engines(tmp_path: Path, clock: Clock, count: int) -> list[Neighbours]:
    return [Neighbours(tmp_path / "board", now_ns=clock) for _ in range(count)]


def test_an_engine_sees_the_steps_of_others_and_not_its_own(tmp_path: Path, clock: Clock) -> None:
    one, other, third = engines(tmp_path, clock, 3)
    one.publish(WORK, for_s=0.01)

    assert (one.busy(), other.busy()) == ([], [WORK])
    third.publish(WORK, for_s=0.01)
    assert len(other.busy()) == 2


def test_what_a_killed_engine_left_runs_out(tmp_path: Path, clock: Clock) -> None:
    killed, other = engines(tmp_path, clock, 2)
    killed.publish(WORK, for_s=0.01)
    clock.pass_s(0.016)

    assert other.busy() == []


def test_an_engine_that_rests_is_not_busy(tmp_path: Path, clock: Clock) -> None:
    one, other = engines(tmp_path, clock, 2)
    one.publish(WORK, for_s=1.0)
    one.rest()

    assert other.busy() == []


def test_slots_of_the_dead_are_used_again(tmp_path: Path, clock: Clock) -> None:
    for engine in engines(tmp_path, clock, SLOT_COUNT):
        engine.publish(WORK, for_s=0.01)
    late, watcher = engines(tmp_path, clock, 2)
    late.publish(WORK, for_s=0.01)
    assert len(watcher.busy()) == SLOT_COUNT  # there was no slot for it; it runs on unseen

    clock.pass_s(FORGOTTEN_NS / 1e9 + 1)
    late.publish(WORK, for_s=0.01)
    assert watcher.busy() == [WORK]


def test_an_engine_whose_slot_was_taken_gets_another(tmp_path: Path, clock: Clock) -> None:
    idle, new, watcher = engines(tmp_path, clock, 3)
    idle.publish(WORK, for_s=0.01)
    clock.pass_s(FORGOTTEN_NS / 1e9 + 1)
    new.publish(WORK, for_s=0.01)
    idle.publish(WORK, for_s=0.01)

    assert watcher.busy() == [WORK, WORK]


@pytest.mark.parametrize("offset", [0, 8, 16, 24])
def test_a_damaged_board_is_read_as_nothing_wrong(tmp_path: Path, clock: Clock, offset: int) -> None:
    one, watcher = engines(tmp_path, clock, 2)
    one.publish(WORK, for_s=0.01)
    with (tmp_path / "board").open("r+b") as file:
        for slot in range(SLOT_COUNT):
            file.seek(slot * SLOT.size + offset)
            file.write(struct.pack("=d", float("nan")))
    found = watcher.busy()

    assert all(0 <= demand.compute_fraction <= 1 and 0 <= demand.memory_fraction <= 1 for demand in found)
    assert len(found) <= 1
    one.publish(WORK, for_s=0.01)


def test_a_file_that_is_too_short_is_made_longer(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "board").write_bytes(b"x")
    engines(tmp_path, clock, 1)

    assert (tmp_path / "board").stat().st_size == FILE_BYTES


def test_the_board_lies_with_the_software_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTGPU_DIR", str(tmp_path))

    assert board_path("GPU-1") == tmp_path / "engines-GPU-1"


def test_elsewhere_it_lies_in_a_directory_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOFTGPU_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = board_path("GPU-1")

    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.rmdir()
    path.parent.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        board_path("GPU-1")


def pace_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *gpu_uuids: str) -> GpuPace:
    monkeypatch.setenv("SOFTGPU_DIR", str(tmp_path))
    pace = GpuPace(Sharing())
    pace.join(gpu_uuids, Log(engine="test"))
    return pace


def spent_s(pace: GpuPace, cost: StepCost) -> float:
    """By the model."""
    begun_s = time.perf_counter()
    return asyncio.run(pace.spend(cost, begun_s)) - begun_s


def test_a_step_beside_a_busy_neighbour_takes_twice_as_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = pace_at(tmp_path, monkeypatch, "GPU-1")
    cost = StepCost(host_s=0.002, device_s=0.03, compute_s=0.01, memory_s=0.03)
    assert spent_s(pace, cost) == pytest.approx(0.032)
    assert pace.slowed_s == 0

    other = Neighbours(board_path("GPU-1"))
    other.publish(WORK, for_s=5.0)
    assert spent_s(pace, cost) == pytest.approx(0.062)
    assert pace.slowed_s == pytest.approx(0.03)
    other.close()
    assert spent_s(pace, cost) == pytest.approx(0.032)
    pace.close()


def test_a_step_on_several_gpus_is_as_slow_as_on_the_busiest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = pace_at(tmp_path, monkeypatch, "GPU-1", "GPU-2")
    cost = StepCost(host_s=0.002, device_s=0.03, compute_s=0.01, memory_s=0.03)
    assert spent_s(pace, cost) == pytest.approx(0.032)

    other = Neighbours(board_path("GPU-2"))
    other.publish(WORK, for_s=5.0)
    assert spent_s(pace, cost) == pytest.approx(0.062)
    other.close()
    pace.close()


def test_a_step_is_over_when_the_clock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = pace_at(tmp_path, monkeypatch, "GPU-1")
    begun_s = time.perf_counter()
    spent_s(pace, StepCost(host_s=0.0, device_s=0.03, compute_s=0.0, memory_s=0.03))

    assert time.perf_counter() - begun_s >= 0.03


def test_without_a_board_an_engine_runs_as_if_alone_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pace = pace_at(tmp_path / "missing", monkeypatch, "GPU-1")

    assert not pace.sees_neighbours
    assert "other engines on this GPU are not seen" in capfd.readouterr().out
    assert spent_s(pace, StepCost(0.0, 0.001, 0.0, 0.001)) == pytest.approx(0.001)
    pace.rest()
    pace.close()

"""The training job as a process: steps, checkpoints, kills, and no step lost over sleep and wake."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import softgpu
from engines.training.progress import beginning
from tests.unit.engines.running import (
    SMALL_CONTEXT_BYTES,
    Engine,
    GiB,
    MiB,
    software_host,
    training,
    used_bytes,
)


@pytest.fixture(params=["phantom", "real bytes"])
def host(request: pytest.FixtureRequest) -> Iterator[softgpu.Host]:
    is_phantom = request.param == "phantom"
    context_bytes = 500 * MiB if is_phantom else SMALL_CONTEXT_BYTES
    total_bytes = 80 * GiB if is_phantom else 512 * MiB
    with software_host(phantom=is_phantom, total_bytes=total_bytes, context_bytes=context_bytes) as host:
        yield host


@pytest.fixture
def phantom() -> Iterator[softgpu.Host]:
    with software_host(phantom=True) as host:
        yield host


def job(host: softgpu.Host, directory: Path, *extra: str, step_s: float = 0.005) -> Engine:
    memory_bytes = 10 * GiB if host.status()["is_phantom"] else 100 * MiB
    return training(host, directory, *extra, memory_bytes=memory_bytes, step_s=step_s)


def steps(engine: Engine) -> int:
    count: int = engine.get("/sublet/state").json["steps"]
    return count


def digest_after(step_count: int) -> str:
    progress = beginning("job", seed=1)
    for _ in range(step_count):
        progress = progress.next()
    return progress.digest.hex()


def test_it_fills_its_budget_and_steps(host: softgpu.Host, tmp_path: Path) -> None:
    with job(host, tmp_path).ready() as engine:
        state = engine.until(lambda state: state["steps"] >= 3)

        assert state["budget_bytes"] - 2 * MiB < used_bytes(host) <= state["budget_bytes"]
        assert state["held_bytes"] == used_bytes(host)
        assert (state["device"], state["state"]) == ("software GPU", "resident")
        metrics = engine.get("/metrics").body.decode()
        assert re.search(r'sublet_training_steps_total\{model_name="job"\} [1-9]', metrics)
        assert engine.get("/health").status == 200


def test_no_step_is_lost_over_sleep_and_wake(host: softgpu.Host, tmp_path: Path) -> None:
    """The next step after waking checks that it finds what the last one before sleeping left."""
    with job(host, tmp_path).ready() as engine:
        for turn in range(1, 4):
            engine.until(lambda state, wanted=turn * 3: state["steps"] >= wanted)  # type: ignore[misc]
            slept = engine.post("/sleep").json
            assert slept["copied_bytes"] == slept["freed_bytes"] > 0
            assert used_bytes(host) == engine.get("/sublet/state").json["context_bytes"]
            assert engine.get("/is_sleeping").json == {"is_sleeping": True}
            assert steps(engine) == slept["steps"]
            woken = engine.post("/wake_up").json
            assert woken["steps"] == slept["steps"]
            assert woken["copied_bytes"] == slept["copied_bytes"]
        engine.until(lambda state: state["steps"] > slept["steps"])
        assert engine.terminate() == 0
    newest = json.loads(max(tmp_path.iterdir()).read_bytes())
    assert newest["digest_hex"] == digest_after(newest["step_count"])


def test_a_killed_job_resumes_from_its_newest_checkpoint(host: softgpu.Host, tmp_path: Path) -> None:
    with job(host, tmp_path, "--checkpoint-every", "5").ready() as engine:
        engine.until(lambda state: state["checkpointed_steps"] >= 10)
    with job(host, tmp_path, "--checkpoint-every", "5") as engine:
        resumed = engine.wait_for("ready")["resumed_steps"]
        assert resumed >= 10
        assert resumed % 5 == 0
        engine.until(lambda state: state["steps"] > resumed)


def test_a_broken_checkpoint_is_passed_over(phantom: softgpu.Host, tmp_path: Path) -> None:
    with job(phantom, tmp_path, "--checkpoint-every", "5").ready() as engine:
        engine.until(lambda state: state["checkpointed_steps"] >= 10)
    newest = max(tmp_path.glob("step-*.json"))
    newest.write_bytes(newest.read_bytes()[:-10])
    with job(phantom, tmp_path) as engine:
        resumed = engine.wait_for("ready")["resumed_steps"]
        assert 0 < resumed < int(newest.stem.removeprefix("step-"))
        assert engine.wait_for("checkpoint not usable")["file"] == newest.name


def test_sigterm_finishes_the_step_writes_a_checkpoint_and_loses_none(phantom: softgpu.Host, tmp_path: Path) -> None:
    with job(phantom, tmp_path, "--checkpoint-every", "1000", step_s=0.1).ready() as engine:
        seen = engine.until(lambda state: state["steps"] >= 2)["steps"]
        assert engine.terminate() == 0
        written = engine.wait_for("checkpoint written")["steps"]
        assert written >= seen
    with job(phantom, tmp_path) as engine:
        assert engine.wait_for("ready")["resumed_steps"] == written


def test_sigterm_while_asleep_keeps_the_steps(phantom: softgpu.Host, tmp_path: Path) -> None:
    with job(phantom, tmp_path).ready() as engine:
        engine.until(lambda state: state["steps"] >= 3)
        slept = engine.post("/sleep").json
        assert engine.terminate() == 0
        assert engine.wait_for("checkpoint written")["steps"] == slept["steps"]


def test_a_wake_without_room_stays_asleep_and_loses_no_step(tmp_path: Path) -> None:
    with software_host(phantom=True) as host, training(host, tmp_path / "a", memory_bytes=45 * GiB).ready() as engine:
        slept = engine.post("/sleep").json
        with training(host, tmp_path / "b", memory_bytes=50 * GiB).ready():
            refused = engine.post("/wake_up")
            assert refused.status == 500
            assert 0 < refused.json["free_bytes"] < 50 * GiB
            assert engine.get("/sublet/state").json["state"] == "asleep"
        assert engine.post("/wake_up").json["steps"] == slept["steps"]
        engine.until(lambda state: state["steps"] > slept["steps"])


def test_a_start_without_room_fails_with_a_clear_line(tmp_path: Path) -> None:
    with (
        software_host(phantom=True) as host,
        training(host, tmp_path / "a", memory_bytes=50 * GiB).ready(),
        training(host, tmp_path / "b", memory_bytes=50 * GiB) as second,
    ):
        assert second.wait() == 1
        assert second.wait_for("CUDA out of memory")["free_bytes"] > 0


def test_a_lost_gpu_fails_the_job_but_it_answers(tmp_path: Path) -> None:
    with software_host(phantom=True) as host, training(host, tmp_path).ready() as engine:
        host.set_lost(0)
        engine.wait_for("job failed")

        assert engine.get("/health").status == 503
        assert engine.post("/sleep").status == 503
        assert engine.get("/sublet/state").json["state"] == "failed"


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_job(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with (
        software_host(phantom=True) as host,
        training(host, blocked / "inside", "--checkpoint-every", "2").ready() as engine,
    ):
        engine.wait_for("checkpoint not written")
        engine.until(lambda state: state["steps"] > 4)

"""Engines as processes on one software GPU: they slow each other down, and a killed one slows nobody."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import softgpu
from tests.unit.engines.running import MISTRAL_BYTES, Engine, GiB, simulated, software_host, training

# Steps of several milliseconds, so that they overlap for certain.
SCALE = 1.0


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    with software_host(phantom=True) as host:
        yield host


def metric(engine: Engine, name: str) -> float:
    found = re.search(rf"^{name}{{[^}}]*}} (\S+)$", engine.get("/metrics").body.decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def slowed_s(engine: Engine) -> float:
    return metric(engine, "sublet_engine_neighbour_seconds_total")


def test_two_engines_slow_each_other_down_until_one_is_killed(host: softgpu.Host) -> None:
    with simulated(host, time_scale=SCALE) as one, simulated(host, time_scale=SCALE) as other:
        one.ready()
        other.ready()
        assert one.complete(max_tokens=20).status == 200
        assert slowed_s(one) == 0

        stream = other.open_stream("hello", max_tokens=2000)
        other.until(lambda state: state["running"] == 1 and state["steps"] > 1)
        assert one.complete(max_tokens=20).status == 200
        # Twenty steps of 7 ms each wait about as long as they work.
        before_s = slowed_s(one)
        assert before_s > 0.04
        assert slowed_s(other) > 0.04

        other.kill()
        stream.close()
        one.complete(max_tokens=1)  # what the killed one published has run out by then
        before_s = slowed_s(one)
        one.complete(max_tokens=20)
        assert slowed_s(one) == before_s


def test_training_is_slower_while_an_engine_works(host: softgpu.Host, tmp_path: Path) -> None:
    with (
        simulated(host, time_scale=SCALE) as engine,
        training(host, tmp_path, step_s=0.02) as job,
    ):
        engine.ready()
        job.ready().until(lambda state: state["steps"] >= 3)
        name = "sublet_training_neighbour_seconds_total"
        assert metric(job, name) == 0
        assert job.get("/sublet/state").json["gpu_sharing"] == "time-sliced"

        engine.complete(max_tokens=40)
        assert metric(job, name) > 0.04


def test_a_pool_that_is_too_small_preempts_and_all_answers_are_whole(host: softgpu.Host) -> None:
    memory_bytes = MISTRAL_BYTES + 600 * 1024**2 + GiB // 8
    with simulated(host, memory_bytes=memory_bytes) as engine:
        tokens_max = engine.ready().get("/sublet/state").json["context_tokens_max"]
        output = tokens_max // 3
        with ThreadPoolExecutor(8) as clients:
            answers = list(
                clients.map(lambda n: engine.complete(f"hello {n}", max_tokens=output, ignore_eos=True), range(8))
            )

        assert [answer.json["usage"]["completion_tokens"] for answer in answers] == [output] * 8
        assert metric(engine, "vllm:num_preemptions_total") > 0
        state = engine.get("/sublet/state").json
        assert state["preemptions"] > 0
        assert state["kv_used_bytes"] == 0

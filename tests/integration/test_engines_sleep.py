"""Sleep, wake and budgets of the simulated engine, on a software GPU: with phantom memory and with real bytes."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

import softgpu
from tests.unit.engines.running import (
    MISTRAL_BYTES,
    SMALL_CONTEXT_BYTES,
    Engine,
    GiB,
    MiB,
    simulated,
    software_host,
    used_bytes,
)


@dataclass(frozen=True)
class World:
    """A GPU host, and engines of a size that suits it."""

    host: softgpu.Host
    weights_bytes: int
    memory_bytes: int

    def engine(self, *, memory_bytes: int | None = None, time_scale: float = 0.05) -> Engine:
        return simulated(
            self.host,
            model="small-model",
            weights_bytes=self.weights_bytes,
            memory_bytes=memory_bytes or self.memory_bytes,
            time_scale=time_scale,
        )


@pytest.fixture(params=["phantom", "real bytes"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "phantom":
        with software_host(phantom=True) as host:
            yield World(host, MISTRAL_BYTES, 24 * GiB)
    else:
        with software_host(phantom=False, total_bytes=512 * MiB, context_bytes=SMALL_CONTEXT_BYTES) as host:
            yield World(host, 96 * MiB + 12345, 200 * MiB)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[World, Engine]]:
    """One host and engine for all tests that leave it fit to be woken: a start takes longer than most of them."""
    with software_host(phantom=True) as host:
        world = World(host, MISTRAL_BYTES, 24 * GiB)
        with world.engine().ready() as engine:
            yield world, engine


@pytest.fixture
def awake(shared: tuple[World, Engine]) -> Engine:
    """The shared engine, resident, with its whole budget, idle."""
    world, engine = shared
    assert engine.post("/wake_up").status == 200
    resize(engine, world.memory_bytes)
    engine.until(lambda state: state["in_flight"] == 0)
    return engine


@pytest.fixture
def host_bytes(shared: tuple[World, Engine]) -> Callable[[], int]:
    """What is in use on the shared engine's GPU."""
    return lambda: used_bytes(shared[0].host)


@pytest.fixture
def phantom() -> Iterator[World]:
    with software_host(phantom=True) as host:
        yield World(host, MISTRAL_BYTES, 24 * GiB)


def ask(engine: Engine) -> int:
    return engine.complete(model="small-model").status


def held(engine: Engine) -> int:
    size: int = engine.get("/sublet/state").json["held_bytes"]
    return size


def test_sleep_copies_nothing_frees_all_but_the_context_and_wake_brings_it_back(world: World) -> None:
    with world.engine().ready() as engine:
        before = engine.complete(model="small-model").json["choices"]
        resident_bytes = used_bytes(world.host)
        state = engine.get("/sublet/state").json

        slept = engine.post("/sleep?level=1").json
        assert slept["copied_bytes"] == 0
        assert slept["freed_bytes"] == resident_bytes - used_bytes(world.host)
        assert used_bytes(world.host) == state["context_bytes"] == held(engine)
        assert engine.get("/is_sleeping").json == {"is_sleeping": True}
        assert engine.get("/sublet/state").json["state"] == "asleep"
        assert engine.get("/health").status == 200

        woken = engine.post("/wake_up").json
        assert woken["copied_bytes"] == state["weights_bytes"]
        assert min(woken["map_s"], woken["copy_s"], woken["verify_s"], woken["wake_s"]) > 0
        assert engine.get("/is_sleeping").json == {"is_sleeping": False}
        assert engine.get("/sublet/state").json["kv_bytes"] == state["kv_bytes"]
        assert engine.complete(model="small-model").json["choices"] == before


def test_updated_weights_are_sealed_by_the_next_sleep_alone_and_come_back(world: World) -> None:
    with world.engine().ready() as engine:
        first = engine.get("/sublet/weights").json
        updated = engine.post("/sublet/weights").json
        assert (1, 2) == (first["weights_generation"], updated["weights_generation"])
        assert first["digest"] != updated["digest"]

        for copied_bytes in (engine.get("/sublet/state").json["weights_bytes"], 0):
            assert engine.post("/sleep").json["copied_bytes"] == copied_bytes
            assert engine.get("/sublet/weights").error["code"] == "model_asleep"
            assert engine.post("/wake_up").status == 200
            assert engine.get("/sublet/weights").json == {
                "weights_generation": 2,
                "digest": updated["digest"],
            }
        assert ask(engine) == 200


def test_real_bytes_are_verified_over_the_whole_range_and_phantom_ones_are_not(world: World) -> None:
    is_phantom = world.host.status()["is_phantom"]
    with world.engine() as engine:
        assert engine.wait_for("ready")["is_bulk_checked"] is not is_phantom


def test_the_budget_is_kept(world: World) -> None:
    with world.engine().ready() as engine:
        ask(engine)

        assert held(engine) <= world.memory_bytes
        assert used_bytes(world.host) <= world.memory_bytes
        assert world.memory_bytes - used_bytes(world.host) < world.memory_bytes // 32


def test_sleeping_and_waking_twice_is_as_good_as_once(awake: Engine) -> None:
    awake.post("/sleep")
    again = awake.post("/sleep")
    assert (again.status, again.json["freed_bytes"]) == (200, 0)
    awake.post("/wake_up")
    again = awake.post("/wake_up")
    assert (again.status, again.json["copied_bytes"]) == (200, 0)
    assert ask(awake) == 200


def test_weights_and_kv_memory_can_wake_one_after_the_other(awake: Engine) -> None:
    awake.post("/sleep")
    assert awake.post("/wake_up?tags=weights").json["copied_bytes"] > MISTRAL_BYTES
    assert awake.get("/is_sleeping").json == {"is_sleeping": True}
    assert awake.post("/wake_up?tags=kv_cache").json["copied_bytes"] == 0
    assert awake.get("/is_sleeping").json == {"is_sleeping": False}
    assert ask(awake) == 200


def test_half_awake_it_can_be_put_to_sleep_again(awake: Engine, host_bytes: Callable[[], int]) -> None:
    awake.post("/sleep")
    awake.post("/wake_up?tags=weights")

    assert awake.post("/sleep").json["freed_bytes"] > MISTRAL_BYTES
    assert host_bytes() == awake.get("/sublet/state").json["context_bytes"]


def test_sglang_s_routes_release_and_resume_the_same_memory(awake: Engine, host_bytes: Callable[[], int]) -> None:
    awake.post("/sleep")
    awake.post("/wake_up")  # What an engine lets go for good at its first park is no part of this.
    before = host_bytes()

    released = awake.post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
    asleep = host_bytes()
    answers = [awake.post("/resume_memory_occupation", {"tags": [tag]}) for tag in ("weights", "kv_cache")]

    assert [(200, None)] * 3 == [(answer.status, answer.json) for answer in (released, *answers)]
    assert asleep < before == host_bytes()
    assert "resident" == awake.get("/sublet/state").json["state"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tags": ["weights"]}, "weights and kv_cache together"),
        ({"tags": ["graphs"]}, "unknown tags"),
        ({"tags": 1}, "invalid request body"),
    ],
)
def test_a_release_that_cannot_be_done_is_refused_in_sglang_s_words(
    awake: Engine, body: dict[str, object], words: str
) -> None:
    refused = awake.post("/release_memory_occupation", body)

    assert 400 == refused.status
    assert words in refused.error["message"]


def test_level_0_only_stops_serving(awake: Engine, host_bytes: Callable[[], int]) -> None:
    ask(awake)
    before_bytes = host_bytes()
    assert awake.post("/sleep?level=0").json["freed_bytes"] == 0
    assert awake.get("/is_sleeping").json == {"is_sleeping": True}
    assert before_bytes - host_bytes() in {0, 2 * MiB}  # the workspace goes after two idle seconds
    assert ask(awake) == 503
    awake.post("/wake_up")
    assert ask(awake) == 200


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_asleep_every_request_gets_an_openai_error_at_once(
    shared: tuple[World, Engine], route: str, is_stream: bool
) -> None:
    _, engine = shared
    body = {"model": "small-model", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "input": "a"}
    engine.post("/sleep")
    answer = engine.post(route, body | {"stream": is_stream})

    assert (answer.status, answer.error["code"]) == (503, "model_asleep")
    assert answer.headers["Retry-After"] == "1"


def test_sleep_waits_for_what_runs(awake: Engine) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(awake.complete, model="small-model", max_tokens=8000)
        awake.until(lambda state: state["in_flight"] == 1)

        assert awake.post("/sleep").status == 200
        assert asked.result().json["usage"]["completion_tokens"] == 8000


@pytest.mark.parametrize("query", ["wait=false", "mode=abort", "timeout_s=0"])
def test_sleep_can_abort_what_runs(awake: Engine, query: str) -> None:
    before_count = awake.get("/sublet/state").json["steps"]
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(awake.complete, model="small-model", max_tokens=30_000)
        stream = pool.submit(awake.complete, "other", model="small-model", max_tokens=30_000, stream=True)
        awake.until(lambda state: state["running"] == 2 and state["steps"] > before_count + 4)

        assert awake.post(f"/sleep?{query}").status == 200
        assert (whole.result().status, whole.result().error["code"]) == (503, "aborted_by_sleep")
        assert stream.result().events[-2]["error"]["code"] == "aborted_by_sleep"
        assert stream.result().events[-1] == "[DONE]"


def test_a_caller_who_hangs_up_does_not_stop_a_sleep(awake: Engine) -> None:
    line_count = len(awake.lines)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(awake.complete, model="small-model", max_tokens=10_000)
        awake.until(lambda state: state["in_flight"] == 1)
        connection = awake.connection()
        connection.request("POST", "/sleep")
        awake.until(lambda state: state["transition"] == "sleeping")
        connection.close()

        awake.wait_for("asleep", after=line_count)
        assert asked.result().status == 200


@pytest.mark.parametrize("query", ["level=2", "level=x", "wait=perhaps", "mode=keep", "timeout_s=-1"])
def test_a_wrong_sleep_is_refused_in_words(awake: Engine, query: str) -> None:
    answer = awake.post(f"/sleep?{query}")

    assert (answer.status, answer.error["param"]) == (400, query.partition("=")[0])
    assert ask(awake) == 200


def test_a_wrong_wake_is_refused_in_words(awake: Engine) -> None:
    assert awake.post("/wake_up?tags=all").error["param"] == "tags"


# ---- out of memory ----


def test_a_start_without_room_fails_with_a_clear_line(phantom: World) -> None:
    with phantom.engine(memory_bytes=60 * GiB).ready(), phantom.engine() as second:
        assert second.wait() == 1
        line = second.wait_for("CUDA out of memory")
        assert line["requested_bytes"] > line["free_bytes"] > 0


def test_a_budget_that_does_not_hold_the_weights_fails_with_the_least_that_would(phantom: World) -> None:
    with phantom.engine(memory_bytes=10 * GiB) as engine:
        assert engine.wait() == 1
        line = engine.wait_for("memory budget too small for context, weights and KV cache")
        assert line["minimum_bytes"] > MISTRAL_BYTES


def test_a_wake_without_room_stays_asleep_and_works_later(world: World) -> None:
    total_bytes = world.host.status()["devices"][0]["total_bytes"]
    with world.engine().ready() as engine:
        engine.post("/sleep")
        asleep_bytes = used_bytes(world.host)
        taken_bytes = total_bytes - asleep_bytes - world.weights_bytes // 2
        with world.engine(memory_bytes=taken_bytes).ready() as neighbour:
            with_neighbour_bytes = used_bytes(world.host)
            refused = engine.post("/wake_up")
            assert refused.status == 500
            assert "out of memory" in refused.json["error"]
            assert refused.json["free_bytes"] == total_bytes - with_neighbour_bytes
            assert used_bytes(world.host) == with_neighbour_bytes
            assert engine.get("/sublet/state").json["state"] == "asleep"
            assert neighbour.complete(model="small-model").status == 200
        assert engine.post("/wake_up").status == 200
        assert ask(engine) == 200


def test_without_room_for_a_step_requests_get_500_and_the_engine_lives(phantom: World) -> None:
    with phantom.engine().ready() as engine:
        phantom.host.set_fault("cuMemCreate", times=1, code="CUDA_ERROR_OUT_OF_MEMORY")
        answer = engine.complete(model="small-model")

        assert (answer.status, answer.error["code"]) == (500, "out_of_memory")
        assert answer.error["message"].startswith("CUDA out of memory. Tried to allocate")
        assert ask(engine) == 200


def test_a_lost_gpu_fails_requests_and_health_but_answers(phantom: World) -> None:
    with phantom.engine().ready() as engine:
        phantom.host.set_lost(0)

        assert ask(engine) == 503
        assert engine.get("/health").status == 503
        state = engine.get("/sublet/state").json
        assert state["state"] == "failed"
        assert state["failure"]


# ---- budget ----


def resize(engine: Engine, memory_bytes: int) -> dict[str, int]:
    answer: dict[str, int] = engine.post("/sublet/budget", {"memory_bytes": memory_bytes}).json
    return answer


def test_a_budget_shrinks_and_grows_the_kv_memory(world: World) -> None:
    smaller_bytes = world.memory_bytes - world.memory_bytes // 5
    with world.engine().ready() as engine:
        whole_bytes = engine.get("/sublet/state").json["kv_bytes"]
        small = resize(engine, smaller_bytes)
        assert smaller_bytes - world.memory_bytes // 32 < small["memory_bytes"] <= smaller_bytes
        assert used_bytes(world.host) <= smaller_bytes
        assert ask(engine) == 200
        large = resize(engine, world.memory_bytes)
        assert large["short_by_bytes"] == 0
        assert large["kv_bytes"] == whole_bytes
        assert held(engine) == used_bytes(world.host) <= world.memory_bytes


def test_memory_in_use_goes_back_when_its_request_ends(awake: Engine, host_bytes: Callable[[], int]) -> None:
    floor_bytes = 16 * GiB
    connection = awake.open_stream("x", model="small-model", max_tokens=30_000)
    awake.until(lambda state: state["kv_used_bytes"] > 3 * GiB)
    shrunk = resize(awake, floor_bytes)
    assert shrunk["memory_bytes"] > shrunk["target_bytes"] == floor_bytes

    connection.close()
    awake.until(lambda state: state["held_bytes"] <= floor_bytes)
    assert host_bytes() <= floor_bytes


def test_growing_takes_what_there_is_and_says_what_is_missing(shared: tuple[World, Engine], awake: Engine) -> None:
    world, _ = shared
    with world.engine(memory_bytes=50 * GiB).ready():
        grown = resize(awake, 40 * GiB)

        assert grown["short_by_bytes"] > 0
        assert 24 * GiB < grown["memory_bytes"] < 40 * GiB
        assert ask(awake) == 200


def test_asleep_a_budget_is_for_the_next_wake(awake: Engine, host_bytes: Callable[[], int]) -> None:
    awake.post("/sleep")
    resize(awake, 20 * GiB)
    assert host_bytes() < GiB
    awake.post("/wake_up")
    assert 19 * GiB < host_bytes() <= 20 * GiB


@pytest.mark.parametrize(("body", "code"), [({"memory_bytes": GiB}, "budget_too_small"), ({}, "invalid_request_body")])
def test_a_wrong_budget_is_refused(awake: Engine, body: dict[str, int], code: str) -> None:
    answer = awake.post("/sublet/budget", body)

    assert (answer.status, answer.error["code"]) == (400, code)


@pytest.mark.parametrize("first", [lambda engine: engine.post("/sleep"), lambda engine: resize(engine, 20 * GiB)])
def test_changes_at_the_same_time_end_one_after_the_other(
    awake: Engine, host_bytes: Callable[[], int], first: Callable[[Engine], object]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        changes: list[Future[Any]] = [
            pool.submit(first, awake),
            pool.submit(awake.post, "/sleep"),
            pool.submit(awake.post, "/wake_up"),
            pool.submit(resize, awake, 22 * GiB),
        ]
        for change in changes:
            change.result()
    awake.post("/wake_up")

    assert ask(awake) == 200
    assert host_bytes() <= 24 * GiB

"""How real engines are asked, against stand-ins that answer with the bodies that those programs document."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
import pytest
from aiohttp import web

from schemas.deployments import EngineKind, WorkloadKind
from services.nodeagent.engine_client import EngineClient, EngineProblem

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

VLLM_METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="chat"}} {running}.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="chat"}} {waiting}.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="chat"}} 0.25
"""
SGLANG_METRICS = """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{{model_name="chat",tp_rank="0",pid="9"}} {running}.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{{model_name="chat",tp_rank="0",pid="9"}} {waiting}.0
# TYPE sglang:token_usage gauge
sglang:token_usage{{model_name="chat"}} 0.1
"""
NIM_1_METRICS = """# TYPE num_requests_running gauge
num_requests_running{{model_name="chat"}} {running}
# TYPE num_requests_waiting gauge
num_requests_waiting{{model_name="chat"}} {waiting}
# TYPE num_request_max gauge
num_request_max{{model_name="chat"}} 2048
"""
LLAMA_METRICS = """# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing {running}
# HELP llamacpp:requests_deferred Number of requests deferred.
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred {waiting}
"""
LLAMA_LOADING = '{"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}'
MODELS = '{"object": "list", "data": [{"id": "chat", "object": "model"}]}'

Answers = dict[str, tuple[int, str]]
"""{route: status and body}; changed while the stand-in runs."""


def ready(kind: EngineKind, *, running: int = 0, waiting: int = 0) -> Answers:
    """What an engine of this kind answers when it serves."""
    count = {"running": running, "waiting": waiting}
    match kind:
        case EngineKind.VLLM:
            sleeping = (200, '{"is_sleeping":false}')
            return {
                "/health": (200, ""),
                "/metrics": (200, VLLM_METRICS.format(**count)),
                "/is_sleeping": sleeping,
            }
        case EngineKind.SGLANG:
            return {"/health": (200, ""), "/metrics": (200, SGLANG_METRICS.format(**count))}
        case EngineKind.NIM:
            told = '{"object":"health.response","message":"Service is ready."}'
            return {"/v1/health/ready": (200, told), "/v1/metrics": (200, NIM_1_METRICS.format(**count))}
        case EngineKind.LLAMA_SERVER:
            return {"/health": (200, '{"status": "ok"}'), "/metrics": (200, LLAMA_METRICS.format(**count))}
        case _:
            return {"/v1/models": (200, MODELS), "/metrics": (200, VLLM_METRICS.format(**count))}


REAL = [kind for kind in EngineKind if kind not in (EngineKind.SIMULATED, EngineKind.TRAINING)]


@contextlib.asynccontextmanager
async def engine(answers: Mapping[str, tuple[int, str]], bodies: list[Any] | None = None) -> AsyncIterator[str]:
    """Its address."""

    async def answer(request: web.Request) -> web.Response:
        if bodies is not None and request.can_read_body:
            bodies.append((request.path, await request.json()))
        status, text = answers.get(request.path, (404, '{"detail":"Not Found"}'))
        return web.Response(status=status, text=text)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def asking(answers: Mapping[str, tuple[int, str]], bodies: list[Any] | None = None) -> AsyncIterator[Any]:
    async with engine(answers, bodies) as endpoint:
        client = EngineClient()
        try:
            yield client, endpoint
        finally:
            await client.close()


@pytest.mark.parametrize("kind", REAL)
async def test_in_flight_is_what_runs_and_what_waits(kind: EngineKind) -> None:
    async with asking(ready(kind, running=2, waiting=3)) as (client, endpoint):
        state = await client.state(endpoint, kind)

    assert ("resident", 5) == (state.state, state.in_flight)


@pytest.mark.parametrize("kind", REAL)
async def test_one_that_loads_is_waited_for(kind: EngineKind) -> None:
    """Until its server is up nobody answers; until its model is loaded it answers 503."""
    answers: Answers = dict.fromkeys(ready(kind), (503, LLAMA_LOADING))
    async with asking(answers) as (client, endpoint):
        assert "loading" == (await client.state(endpoint, kind)).state
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.wait_until_ready, endpoint, kind)
            await anyio.wait_all_tasks_blocked()
            answers |= ready(kind)


async def test_one_that_says_whether_it_is_healthy_is_not_asked_for_its_models() -> None:
    """Some list their models long before they can answer for one."""
    answers = ready(EngineKind.OPENAI) | {"/health": (503, "")}
    async with asking(answers) as (client, endpoint):
        assert "loading" == (await client.state(endpoint, EngineKind.OPENAI)).state
        answers["/health"] = (200, "")
        assert "resident" == (await client.state(endpoint, EngineKind.OPENAI)).state


@pytest.mark.parametrize("kind", REAL)
async def test_one_that_nobody_can_reach_is_not_taken_for_idle(kind: EngineKind) -> None:
    client = EngineClient()
    with pytest.raises(EngineProblem, match="does not answer"):
        await client.state("http://127.0.0.1:1", kind)
    await client.close()


@pytest.mark.parametrize("kind", REAL)
async def test_a_drain_ends_when_its_last_request_has_ended(kind: EngineKind) -> None:
    answers = ready(kind, running=1)
    async with asking(answers) as (client, endpoint):
        assert not await client.wait_until_idle(endpoint, timeout_s=0.05, kind=kind)
        answers |= ready(kind)
        assert await client.wait_until_idle(endpoint, timeout_s=20, kind=kind)


@pytest.mark.parametrize(
    "metrics", [(404, "Not Found"), (200, ""), (200, 'vllm:num_requests_running{engine="0"} 0.0\n')]
)
async def test_one_that_does_not_tell_what_it_does_is_never_idle(metrics: tuple[int, str]) -> None:
    """No data is not zero: what might be busy must not be parked."""
    answers = ready(EngineKind.OPENAI) | {"/metrics": metrics}
    async with asking(answers) as (client, endpoint):
        state = await client.state(endpoint, EngineKind.OPENAI)
        is_idle = await client.wait_until_idle(endpoint, timeout_s=0.05, kind=EngineKind.OPENAI)

    assert state.in_flight is None
    assert not is_idle


async def test_vllm_is_asked_whether_it_sleeps() -> None:
    answers = ready(EngineKind.VLLM) | {"/is_sleeping": (200, '{"is_sleeping":true}')}
    async with asking(answers) as (client, endpoint):
        assert "asleep" == (await client.state(endpoint, EngineKind.VLLM)).state


async def test_vllm_without_its_sleep_mode_is_awake() -> None:
    answers = ready(EngineKind.VLLM)
    del answers["/is_sleeping"]
    async with asking(answers) as (client, endpoint):
        assert "resident" == (await client.state(endpoint, EngineKind.VLLM)).state


async def test_nim_passes_the_metrics_of_its_engine_on() -> None:
    for text in (VLLM_METRICS, SGLANG_METRICS):
        answers = ready(EngineKind.NIM) | {"/v1/metrics": (200, text.format(running=1, waiting=1))}
        async with asking(answers) as (client, endpoint):
            assert 2 == (await client.state(endpoint, EngineKind.NIM)).in_flight


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
async def test_one_token_is_asked_for_in_the_way_that_the_engine_knows(route: str) -> None:
    bodies: list[Any] = []
    async with asking({route: (200, "{}")}, bodies) as (client, endpoint):
        await client.verify(endpoint, "chat", WorkloadKind.INFERENCE, timeout_s=20)

    assert (route, "chat") == (bodies[-1][0], bodies[-1][1]["model"])


async def test_an_engine_that_gives_no_token_has_failed() -> None:
    async with asking({"/v1/completions": (500, '{"error": {"message": "CUDA error"}}')}) as (client, endpoint):
        with pytest.raises(EngineProblem, match="CUDA error"):
            await client.verify(endpoint, "chat", WorkloadKind.INFERENCE, timeout_s=20)
    async with asking({}) as (client, endpoint):
        with pytest.raises(EngineProblem):
            await client.verify(endpoint, "chat", WorkloadKind.INFERENCE, timeout_s=20)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (EngineKind.VLLM, (0.25, 3)),
        (EngineKind.SGLANG, (0.1, 3)),
        (EngineKind.LLAMA_SERVER, None),
        (EngineKind.NIM, None),
    ],
)
async def test_how_full_its_cache_is_and_who_waits_are_read_where_an_engine_tells_them(
    kind: EngineKind, told: tuple[float, int] | None
) -> None:
    client = EngineClient()
    async with engine(ready(kind, running=2, waiting=3)) as endpoint:
        load = await client.load(endpoint, kind)
    await client.close()

    assert told == (None if load is None else (load.kv_used_fraction, load.waiting_count))

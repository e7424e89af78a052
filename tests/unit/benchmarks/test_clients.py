"""The open-loop clients against a gateway of a few lines: what counts as answered, held, sent again, failed."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest
from aiohttp import web

from benchmarks.clients import Clients, Sent
from benchmarks.trace import Planned

pytestmark = [pytest.mark.anyio, pytest.mark.processes]
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
TOKEN = b'data: {"choices":[{"delta":{"content":"word "}}]}\n\n'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def planned(*dues_s: float, input_tokens: int = 3) -> list[Planned]:
    return [Planned(due_s=due_s, model="m", input_tokens=input_tokens, output_tokens=2) for due_s in dues_s]


async def stream(request: web.Request, *chunks: bytes, held_ms: int | None = 0) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream"}
    if held_ms is not None:
        headers["x-sublet-held-ms"] = str(held_ms)
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
    return response


@asynccontextmanager
async def gateway(answer: Answer) -> AsyncIterator[Clients]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield Clients(gateway_url=f"http://127.0.0.1:{runner.addresses[0][1]}", api_key="sk-test")
    finally:
        await runner.cleanup()


async def sent_to(answer: Answer, plan: list[Planned] | None = None) -> list[Sent]:
    async with gateway(answer) as clients:
        with anyio.fail_after(60):
            await clients.run(plan or planned(0.0))
    assert len(clients.requests) == clients.answered_count + clients.failures.total()
    return clients.requests


async def test_a_complete_answer_tells_how_long_it_was_held_and_when_its_first_token_came() -> None:
    bodies = []

    async def answer(request: web.Request) -> web.StreamResponse:
        bodies.append(msgspec.json.decode(await request.read()))
        assert "Bearer sk-test" == request.headers["Authorization"]
        return await stream(request, ROLE, TOKEN, TOKEN, DONE, held_ms=1250)

    (sent,) = await sent_to(answer)

    assert sent.is_answered
    assert (1.25, 2) == (sent.held_s, sent.token_count)
    assert sent.first_token_s is not None
    assert sent.first_token_s > 0
    assert ("m", True, 2) == (bodies[0]["model"], bodies[0]["stream"], bodies[0]["max_tokens"])
    assert "tok tok tok" == bodies[0]["messages"][0]["content"]


async def test_arrivals_do_not_wait_for_answers() -> None:
    """The first answer ends only when the last request has arrived."""
    arrived: list[int] = []
    all_there = anyio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        arrived.append(1)
        if len(arrived) == 20:
            all_there.set()
        await all_there.wait()
        return await stream(request, TOKEN, DONE)

    requests = await sent_to(answer, planned(*(index / 1000 for index in range(20))))

    assert all(sent.is_answered for sent in requests)


async def test_a_request_that_heard_heartbeats_was_held_until_its_first_token() -> None:
    """Headers were sent before the gateway could tell, so what the client saw counts."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await stream(request, b": waiting state=waking waited_s=0.1 eta_s=0.1\n\n", held_ms=None)
        await anyio.sleep(0.05)
        await response.write(TOKEN + DONE)
        return response

    (sent,) = await sent_to(answer)

    assert sent.is_answered
    assert sent.held_s == sent.first_token_s
    assert sent.held_s is not None
    assert sent.held_s >= 0.05


async def test_a_request_that_no_gateway_accepted_is_sent_again() -> None:
    attempts = []

    async def answer(request: web.Request) -> web.StreamResponse:
        attempts.append(1)
        if len(attempts) < 3:
            body = b'{"error":{"message":"not yet","code":"gateway_starting"}}'
            return web.Response(status=503, body=body, headers={"Retry-After": "0"})
        return await stream(request, TOKEN, DONE)

    (sent,) = await sent_to(answer)

    assert sent.is_answered
    assert 2 == sent.retry_count


@pytest.mark.parametrize(
    ("status", "body", "failure"),
    [
        (504, b'{"error":{"message":"late","code":"deadline_exceeded"}}', "deadline_exceeded"),
        (503, b'{"error":{"message":"no","code":"model_loading"}}', "model_loading"),
        (500, b"oops", "status 500"),
    ],
)
async def test_a_refusal_fails_with_its_code(status: int, body: bytes, failure: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    (sent,) = await sent_to(answer)

    assert failure == sent.failure
    assert not sent.is_cut


@pytest.mark.parametrize(
    ("chunks", "failure"),
    [
        ((TOKEN, b'data: {"error":{"message":"broke","code":"answer_broken"}}\n\n'), "answer_broken"),
        ((TOKEN,), "incomplete"),
        ((b"data: {nonsense\n\n", DONE), "unreadable"),
    ],
)
async def test_a_stream_without_its_end_is_no_answer(chunks: tuple[bytes, ...], failure: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await stream(request, *chunks)

    (sent,) = await sent_to(answer)

    assert failure == sent.failure


async def test_a_broken_connection_is_told_apart() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await stream(request, TOKEN)
        assert request.transport is not None
        request.transport.abort()
        return response

    (sent,) = await sent_to(answer)

    assert sent.is_cut
    assert sent.failure.startswith("cut (")

"""One request to a parked model, and one deployment, each give one connected trace across all services involved."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import anyio
import msgspec
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from services.local.settings import StackSettings
from services.local.stack import LocalStack, running

pytestmark = [pytest.mark.anyio, pytest.mark.nats]
TRACE_ID = "11112222333344445555666677778888"
TRACEPARENT = f"00-{TRACE_ID}-1234567812345678-01"
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Span:
    service: str
    name: str
    span_id: str
    parent_id: str


@dataclass(slots=True)
class Receiver:
    """A real OTLP/HTTP receiver."""

    endpoint: str = ""
    traces: dict[str, dict[str, Span]] = field(default_factory=dict)
    """{trace id: {span id: span}}"""

    async def take(self, request: web.Request) -> web.Response:
        export = ExportTraceServiceRequest.FromString(await request.read())
        for resource in export.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            service = attributes["service.name"].removeprefix("sublet-")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found = Span(service, span.name, span.span_id.hex(), span.parent_span_id.hex())
                    self.traces.setdefault(span.trace_id.hex(), {})[found.span_id] = found
        return web.Response()

    async def until(self, trace_id: str, services: set[str]) -> dict[str, Span]:
        """The trace, once all these services are in it and every parent has arrived."""
        with anyio.move_on_after(PATIENCE_S):
            while True:
                spans = self.traces.get(trace_id, {})
                if services <= {span.service for span in spans.values()} and len(orphans(spans)) <= 1:
                    break
                await anyio.sleep(0.1)
        return self.traces.get(trace_id, {})


def orphans(spans: dict[str, Span]) -> list[Span]:
    """Spans whose parent is not among them: one, the first, when the trace is connected."""
    return [span for span in spans.values() if span.parent_id not in spans]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


async def sublet(stack: LocalStack, *arguments: str) -> str:
    environment = {**os.environ, "SUBLET_CONTEXT": str(stack.context_path)}
    command = [sys.executable, "-m", "sublet", *arguments]
    done = await anyio.run_process(command, env=environment, check=False, stderr=subprocess.STDOUT)
    assert 0 == done.returncode, done.stdout.decode()
    return done.stdout.decode()


async def chat(stack: LocalStack, model: str) -> None:
    context = msgspec.json.decode(stack.context_path.read_bytes())
    headers = {"Authorization": f"Bearer {context['api_key']}", "traceparent": TRACEPARENT}
    body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
    url = f"{context['gateway_url'].removesuffix('/v1')}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        assert 200 == response.status, await response.text()


async def test_a_deployment_and_a_wake_are_one_connected_trace_each(tmp_path: Path) -> None:
    async with receiving() as receiver:
        settings = StackSettings(
            state_dir=tmp_path / "state",
            cold_start_s=0.1,
            environment={"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint},
            handles_signals=False,
        )
        async with running(settings) as stack:
            said = await sublet(stack, "deploy", "alpha", "--weights", "4GB", "--share", "0.2", "--debug")
            (deploy_trace,) = {t for t in receiver.traces if t in said} or {_trace_in(said)}
            deployed = await receiver.until(deploy_trace, {"placement", "nodeagent"})
            await sublet(stack, "park", "alpha")

            await chat(stack, "alpha")
            woken = await receiver.until(TRACE_ID, {"gateway", "swapper", "nodeagent"})

    assert {"placement", "nodeagent"} <= {span.service for span in deployed.values()}
    assert 1 == len(orphans(deployed)), deployed
    assert {"gateway", "swapper", "nodeagent"} <= {span.service for span in woken.values()}
    assert 1 == len(orphans(woken)), woken
    names = {span.name for span in woken.values()}
    assert {
        "gateway request",
        "hold",
        "upstream",
        "swapper ModelWanted",
        "nodeagent WakeOrdered",
        "wake by store",
        "verify",
    } <= names


def _trace_in(said: str) -> str:
    """The trace id that ``--debug`` prints."""
    words = said.replace("-", " ").split()
    return next(word for word in words if len(word) == 32 and set(word) <= set("0123456789abcdef"))

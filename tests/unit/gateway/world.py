"""A world around a real gateway process, in one event loop: history in memory, a holder and engines on real sockets."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from hashlib import sha256
from typing import Any, Self

import aiohttp
import msgspec
from aiohttp import web

from kit.bus import Bus, Entry, Received
from kit.bus_memory import MemoryBus, MemoryServer
from kit.processor import CHAIN_START, chain_hash
from kit.telemetry import tracer
from schemas.catalogue import decode, encode
from schemas.gateways import LoadSampled, ModelWanted
from schemas.holders import RouteLease, RouteLeaseWish
from schemas.messages import Fact, prefix_of, signal_subject
from services.gateway.main import RunningGateway, running
from services.gateway.settings import GatewaySettings
from tests.unit.gateway import fleet

KEY = "sk-acme"


class Historian:
    """Appends facts as their writers would: each chained to the one before it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._hashes: dict[str, str] = {}
        self._seqs: dict[str, int] = {}
        self._count = 0

    async def append(self, *facts: Fact) -> None:
        for fact in facts:
            writer = fact.writer if fact.writer != "node" else f"node.{fact.node}"  # type: ignore[attr-defined]
            await self.append_raw(writer, encode(fact))

    async def append_raw(self, writer: str, body: bytes, *, is_chained: bool = True) -> None:
        self._count += 1
        entry = Entry(
            subject=f"sublet.fact.{writer}.any.1" if writer == "placement" else f"sublet.fact.{writer}.any",
            body=body,
            id=f"{writer}:test:{self._count}",
            cause_seq=0,
            cursor_seq=0,
            previous_hash=self._hashes.get(writer, CHAIN_START) if is_chained else "another chain",
        )
        seq = (await self._bus.append(prefix_of(writer), [entry], last_seq=self._seqs.get(writer, 0))).last_seq
        self._seqs[writer] = seq
        if is_chained:
            self._hashes[writer] = chain_hash(entry.previous_hash, id=entry.id, subject=entry.subject, body=body)


async def serve(stack: AsyncExitStack, app: web.Application) -> str:
    """The base address of this app on a free port, until the stack unwinds."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


class Holder:
    """Grants route leases; `close` returns when every gateway has acknowledged."""

    def __init__(self, *, term_s: float = 1.0) -> None:
        self.term_s = term_s
        self.version = 1
        self.open: dict[str, str] = {}
        self.closed: set[str] = set()
        self.seen: dict[str, int] = {}
        self.is_up = True
        self.wish_count = 0
        self._changed = asyncio.Event()
        self.app = web.Application()
        self.app.router.add_post("/routes/lease", self._lease)

    def set_open(self, replica_id: str, endpoint: str) -> None:
        self.open[replica_id] = endpoint
        self.closed.discard(replica_id)
        self._turn()

    async def close(self, replica_id: str) -> None:
        self.open.pop(replica_id, None)
        self.closed.add(replica_id)
        self._turn()
        while any(version < self.version for version in self.seen.values()):
            await self._changed.wait()

    def _turn(self) -> None:
        self.version += 1
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _lease(self, request: web.Request) -> web.Response:
        self.wish_count += 1
        if not self.is_up:
            return web.Response(status=503)
        wish = msgspec.json.decode(await request.read(), type=RouteLeaseWish)
        self.seen[wish.gateway] = wish.seen_version
        self._wake()
        if wish.seen_version == self.version:
            try:
                async with asyncio.timeout(wish.wait_s):
                    while wish.seen_version == self.version:
                        await self._changed.wait()
            except TimeoutError:
                pass
        lease = RouteLease(
            version=self.version, open_ids=tuple(sorted(self.open)), closed_ids=tuple(sorted(self.closed)),
            endpoints=tuple(self.open[key] for key in sorted(self.open)), term_s=self.term_s,
        )  # fmt: skip
        return web.Response(body=encode(lease), content_type="application/json")


class Engine:
    """Answers like an engine, and misbehaves on demand. `gate` holds streams back after their first chunk."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.is_asleep = False
        self.cut_next_count = 0
        self.cuts_in_the_middle = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.first_gate = asyncio.Event()
        self.first_gate.set()
        self.arrived = asyncio.Event()
        self.was_cancelled = asyncio.Event()
        self.app = web.Application()
        self.app.router.add_post("/v1/chat/completions", self._chat)
        self.app.router.add_post("/v1/embeddings", self._embed)

    async def _embed(self, request: web.Request) -> web.Response:
        self.requests.append(msgspec.json.decode(await request.read()))
        return web.json_response({"object": "list", "data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        self.requests.append(body)
        self.headers.append(request.headers)
        self.arrived.set()
        if self.is_asleep:
            return web.json_response(
                {"error": {"message": "The engine is asleep.", "code": "model_asleep"}}, status=503
            )
        if self.cut_next_count:
            self.cut_next_count -= 1
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        try:
            await self.first_gate.wait()
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        head = {"id": "c", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "hello"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for text in ("hel", "lo"):
            choice = {"index": 0, "finish_reason": None, "delta": {"content": text}}
            await stream.write(_event({**head, "object": "chat.completion.chunk", "choices": [choice]}))
            await self.gate.wait()
            if self.cuts_in_the_middle:
                assert request.transport is not None
                request.transport.close()
                return stream
        if (body.get("stream_options") or {}).get("include_usage"):
            await stream.write(_event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
        await stream.write(b"data: [DONE]\n\n")
        return stream


def _event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class World:
    """Everything around one gateway, for the length of one test."""

    def __init__(self, gateway: RunningGateway, session: aiohttp.ClientSession, server: MemoryServer, bus: Bus) -> None:
        self.gateway = gateway
        self.session = session
        self.server = server
        """History, unless the test brought its own buses."""
        self.historian = Historian(bus)
        self.holder = Holder()
        self.engine = Engine()
        self.url = f"http://127.0.0.1:{gateway.port}"
        self.wanted: list[ModelWanted] = []
        self.sampled: list[LoadSampled] = []
        self.traceparents: list[str] = []
        self._news = asyncio.Event()

    def receive(self, received: Received) -> None:
        message = decode(received.body)
        if isinstance(message, ModelWanted):
            self.wanted.append(message)
            self.traceparents.append(received.traceparent)
        elif isinstance(message, LoadSampled):
            self.sampled.append(message)
        self._news.set()
        self._news = asyncio.Event()

    async def until_wanted(self, count: int = 1) -> None:
        async with asyncio.timeout(60):
            while len(self.wanted) < count:
                await self._news.wait()

    async def until(self, condition: Any) -> None:
        """For states of the gateway that have no event of their own."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.002)

    # --- What happens to the model ------------------------------------------------------------------------------------

    async def make_resident(self) -> None:
        await self.historian.append(fleet.resident(endpoint=self.engine.url))
        self.holder.set_open("r", self.engine.url)
        self.engine.is_asleep = False

    async def park(self, *, epoch: int = 1) -> None:
        await self.holder.close("r")
        self.engine.is_asleep = True
        await self.historian.append(fleet.parked(epoch=epoch))
        await self.until(lambda: self.state() == "parked")

    def state(self) -> str:
        routes = self.gateway.runtime.core.routes
        return routes.state_of(routes.deployments["d-m"])

    def is_routable(self) -> bool:
        routes = self.gateway.runtime.core.routes
        replica = routes.replicas.get("r")
        return replica is not None and routes.is_routable(replica, self.gateway.runtime.now_s())

    # --- What a client does -------------------------------------------------------------------------------------------

    def chat(self, *, stream: bool = False, headers: dict[str, str] | None = None, **body: Any) -> Any:
        content = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **body}
        return self.session.post(
            self.url + "/v1/chat/completions",
            data=msgspec.json.encode(content),
            headers={"Authorization": f"Bearer {KEY}", **(headers or {})},
        )

    def get(self, path: str, *, key: str = KEY) -> Any:
        return self.session.get(self.url + path, headers={"Authorization": f"Bearer {key}"} if key else {})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


@asynccontextmanager
async def world(
    *, buses: Callable[[str], AbstractAsyncContextManager[Bus]] | None = None, **settings: Any
) -> AsyncIterator[World]:
    """A gateway with one resident model `m` of the tenant `acme`, whose key is `KEY`."""
    server = MemoryServer(time.time)
    connect = buses or (lambda name: MemoryBus(server, name))
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        bus = await stack.enter_async_context(connect("gateway"))
        other = await stack.enter_async_context(connect("others"))
        chosen = GatewaySettings(**{"port": 0, "drain_s": 1.0, **settings})
        gateway = await stack.enter_async_context(running(chosen, bus, telemetry=tracer("gateway")))
        there = World(gateway, session, server, other)
        there.engine.url = await serve(stack, there.engine.app)
        holder_url = await serve(stack, there.holder.app)
        for kind in (ModelWanted, LoadSampled):
            await stack.enter_async_context(other.subscribe(signal_subject(kind), there.receive))
        await there.historian.append(
            fleet.joined(holder_url=holder_url),
            fleet.admitted(),
            fleet.key_added(sha256(KEY.encode()).hexdigest()),
            fleet.proposed(),
            fleet.granted(),
            fleet.ready(endpoint=there.engine.url),
        )
        there.holder.set_open("r", there.engine.url)
        await there.until(there.is_routable)
        yield there

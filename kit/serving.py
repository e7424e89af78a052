"""What every log-processing service does around its runner: connect, tell its health, stop on a signal."""

import hashlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
from aiohttp import web
from msgspec import Struct, json
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from kit import settings as kit_settings
from kit.bus import Bus
from kit.bus_nats import NatsBus
from kit.errors import NotReady
from kit.runner import Runner
from kit.service import digest
from kit.shell_settings import ShellSettings
from kit.telemetry import Tracer, configure_logging, tracer

SHUTDOWN_S: Final = 5.0
log = logging.getLogger("kit")


class ConnectionSettings(Struct, frozen=True, kw_only=True):
    """How a service reaches the bus and where it tells its health.

    Variables ``SUBLET_<SERVICE>_<NAME>`` or ``SUBLET_<NAME>``.
    """

    nats_url: str = "nats://127.0.0.1:4222"
    """Servers, with commas between several."""
    nkey_seed_file: str = ""
    """File with the seed of this service's NKey user; empty: no authentication, for tests."""
    health_host: str = "127.0.0.1"
    """Where ``/healthz``, ``/readyz`` and ``/metrics`` are served."""
    health_port: int = 0
    """0: a free one, written to the log."""


class StateMark(Struct, frozen=True, kw_only=True):
    """The durable part of a running service's state as one hash, and its place in history.

    Folding history for `writer` up to the own fact after which the chain hash is `last_hash`, and others' facts up to
    `cursor_seq`, gives a state with the same `digest`: replay equals what happened live.
    """

    writer: str
    writer_epoch: int
    cursor_seq: int
    last_hash: str
    digest: str


def digest_hex(state: Any) -> str:
    """Equal durable states give equal texts (`kit.service.digest`, hashed)."""
    return hashlib.blake2b(digest(state), digest_size=16).hexdigest()


def read_seed(path: str) -> str | None:
    """The NKey seed in a file, or None without a file. Raises `NotReady` with one sentence."""
    if not path:
        return None
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise NotReady(
            f"the NKey seed file {path} cannot be read ({error.strerror}); run the stack's set-up again"
        ) from error


@asynccontextmanager
async def connected(service: str, *, user: str = "") -> AsyncIterator[tuple[Bus, ConnectionSettings]]:
    """A connection as this service's user."""
    settings = kit_settings.load(ConnectionSettings, service=service, section="connection")
    seed = read_seed(settings.nkey_seed_file)
    async with NatsBus(settings.nats_url, nkey_seed=seed, name=user or service) as bus:
        yield bus, settings


def shell_settings(service: str) -> ShellSettings:
    """How this service's runner takes snapshots and checks itself."""
    return kit_settings.load(ShellSettings, service=service, section="shell")


def new_instance() -> str:
    """A name that no other instance has, for fact ids and the liveness lease."""
    return secrets.token_hex(6)


async def serve(
    runner: Runner[Any],
    connection: ConnectionSettings,
    telemetry: Tracer,
    *,
    beside: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
) -> None:
    """Run the service, its health server and whatever runs beside it, until SIGTERM or SIGINT."""
    async with anyio.create_task_group() as tg:
        tg.start_soon(_stop_on_signal, tg.cancel_scope)
        async with health_server(runner, connection):
            for task in beside:
                tg.start_soon(task)
            await runner.run()
    telemetry.shutdown()


async def _stop_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


@asynccontextmanager
async def health_server(runner: Runner[Any], connection: ConnectionSettings) -> AsyncIterator[int]:
    """Gives the port.

    `/healthz` answers while the process lives, `/readyz` when it decides, `/metrics` for Prometheus, and `/digest` with
    a `StateMark`. The last is no query on the bus, because tenants may ask those and it is about all of them.
    """

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        problem = runner.status.problem
        return web.Response(text=problem + "\n", status=503) if problem else web.Response(text="ready\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=_metrics(runner), content_type="text/plain")

    async def mark(_: web.Request) -> web.Response:
        processor = runner.processor
        if processor is None or not runner.status.is_ready:
            return web.Response(text=runner.status.why_not + "\n", status=503)
        body = StateMark(
            writer=processor.writer,
            writer_epoch=processor.writer_epoch,
            cursor_seq=processor.cursor_seq,
            last_hash=processor.last_hash,
            digest=digest_hex(processor.state),
        )
        return web.Response(body=json.encode(body), content_type="application/json")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/digest", mark)
    site_runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await site_runner.setup()
    try:
        site = web.TCPSite(site_runner, connection.health_host, connection.health_port)
        await site.start()
        port = int(site_runner.addresses[0][1])
        log.info("health server", extra={"port": port})
        yield port
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(SHUTDOWN_S):
            await site_runner.cleanup()


def _metrics(runner: Runner[Any]) -> bytes:
    """Plain integers kept by the runner, read when somebody asks."""
    registry = CollectorRegistry()
    for name, value, text in (
        ("sublet_ready", int(not runner.status.problem), "1 when the service decides and its facts can be stored"),
        ("sublet_handled_total", runner.status.handled_count, "inputs handled"),
        ("sublet_appended_total", runner.status.appended_count, "facts appended"),
        ("sublet_dropped_total", runner.status.dropped_count, "fleeting inputs dropped because the queue was full"),
        ("sublet_skipped_total", runner.status.skipped_count, "facts that no fold accepts"),
        ("sublet_refused_orders_total", runner.status.refused_order_count, "orders that were stale or came too late"),
        ("sublet_snapshots_total", runner.status.snapshot_count, "snapshots stored since the start"),
        ("sublet_replayed_facts", runner.status.replayed_count, "messages of history that the newest start read"),
        ("sublet_rebuilt_total", runner.status.rebuilt_count, "rebuilds after another instance wrote"),
    ):
        Gauge(name, text, registry=registry).set(value)
    return generate_latest(registry)


def run_main(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run a service's main under uvloop; problems that a person can mend are one sentence and exit code 2."""
    configure_logging()
    options = {"use_uvloop": os.environ.get("SUBLET_EVENT_LOOP", "uvloop") == "uvloop"}
    try:
        anyio.run(main, backend_options=options)
    except (kit_settings.SettingsError, NotReady) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def service_tracer(service: str, *, node: str = "") -> Tracer:
    return tracer(service, node=node)

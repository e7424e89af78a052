"""Puts the gateway together, and takes it apart when it is told to end."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from aiohttp import web

from kit import settings as kit_settings
from kit.bus import Bus
from kit.serving import connected, service_tracer
from kit.telemetry import Tracer
from services.gateway.leases import RouteLeases
from services.gateway.metrics import Metrics
from services.gateway.readiness import Facts
from services.gateway.runtime import Clock, Runtime
from services.gateway.server import SIGNAL_AGES_MAX, application
from services.gateway.serving import Serving
from services.gateway.settings import GatewaySettings
from services.gateway.signals import Signals
from services.gateway.upstream import Upstream
from services.gateway.view import HistoryView

log = logging.getLogger("gateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGateway:
    """A gateway that listens, for those who start it inside their own process."""

    gateway_id: str
    port: int
    """Where it listens, whatever the setting said."""
    runtime: Runtime
    view: HistoryView


def new_gateway_id() -> str:
    """A name that no process had before: a restarted gateway must not inherit an old one's route leases."""
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{time.time_ns() // 1_000_000:x}"


@asynccontextmanager
async def running(
    settings: GatewaySettings, bus: Bus, *, telemetry: Tracer, clock: Callable[[], float] | None = None
) -> AsyncIterator[RunningGateway]:
    """A gateway for the length of the block. At its end held requests are refused and running ones may finish."""
    clock = clock or Clock().now_s
    gateway_id = settings.gateway_id or new_gateway_id()
    signals = Signals(bus, queue_max=settings.signal_queue_max, timeout_s=settings.signal_timeout_s, clock=clock)
    runtime = Runtime(settings, gateway_id=gateway_id, signals=signals, clock=clock)
    view = HistoryView(bus, runtime)
    upstream = Upstream(settings)
    serving = Serving(
        settings,
        runtime=runtime,
        view=view,
        upstream=upstream,
        metrics=Metrics(runtime, models_max=settings.metric_models_max),
        tracer=telemetry,
    )
    try:
        async with asyncio.TaskGroup() as group:
            leases = RouteLeases(settings, runtime, upstream.session, group, gateway_id=gateway_id)
            runtime.on_nodes_changed = leases.follow

            def facts() -> Facts:
                return Facts(
                    view_problem=view.problem,
                    is_connected=bus.is_connected,
                    signal_age_s=None if signals.sent_s is None else clock() - signals.sent_s,
                    signal_age_s_max=SIGNAL_AGES_MAX * settings.sample_every_s,
                    lease_problems=leases.problems,
                    is_stopping=runtime.core.is_stopping,
                )

            bus.on_reconnect(runtime.reconnected)
            tasks = [group.create_task(signals.run()), group.create_task(view.run())]
            runtime.start()
            async with _listening(settings, application(serving, facts=facts), runtime) as port:
                yield RunningGateway(gateway_id=gateway_id, port=port, runtime=runtime, view=view)
            leases.follow({})
            for task in tasks:
                task.cancel()
    finally:
        runtime.close()
        await upstream.close()


@asynccontextmanager
async def _listening(settings: GatewaySettings, app: web.Application, runtime: Runtime) -> AsyncIterator[int]:
    """The HTTP server; gives its port. A client that leaves cancels its handler, and that its request upstream."""
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=settings.drain_s, keepalive_timeout=75.0
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port, reuse_port=settings.reuse_port or None, backlog=1024)
        await site.start()
        yield int(runner.addresses[0][1])
    finally:
        runtime.refuse_waiting()
        await runner.cleanup()


async def main() -> None:
    """Until SIGTERM or SIGINT."""
    settings = kit_settings.load(GatewaySettings, service="gateway")
    telemetry = service_tracer("gateway")
    try:
        async with connected("gateway") as (bus, _), running(settings, bus, telemetry=telemetry) as gateway:
            log.info("gateway runs", extra={"gateway_id": gateway.gateway_id, "port": gateway.port})
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    break
    finally:
        telemetry.shutdown()

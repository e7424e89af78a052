"""Puts the holder together, and takes it apart when it is told to end."""

import fcntl
import hashlib
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
from aiohttp import web

from kit import settings as kit_settings
from services.holder import cgroups, logs
from services.holder.broker import BrokerKeeper
from services.holder.core import first_version
from services.holder.engines import Engines
from services.holder.routes import Routes
from services.holder.server import control_app, lease_app
from services.holder.settings import HolderSettings

# For answers under way; the longest poll of a gateway lasts half a term.
_HTTP_END_S: Final = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A running one, for those who start it inside their own process."""

    holder_id: str
    port: int
    """Where gateways get their leases, whatever the setting said."""
    socket: Path
    engines: Engines
    routes: Routes
    broker: BrokerKeeper | None


class AlreadyRunning(Exception):
    """Another holder has this state folder."""


@asynccontextmanager
async def running(settings: HolderSettings) -> AsyncIterator[Holder]:
    """A holder for the length of the block; all its engines are stopped at the end. Call it from the main thread."""
    state_dir = _made(settings.state_dir)
    with _only_one(state_dir / "lock"):
        async with anyio.create_task_group() as tasks:
            routes = Routes(term_s=settings.term_s, born_version=_born_version(state_dir / "first-version"))
            name = hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]
            engines = Engines(
                state_dir=state_dir, cgroups=cgroups.find(settings.cgroup, holder_name=name), tasks=tasks,
                on_death=routes.close_soon,
            )  # fmt: skip
            if not await engines.end_remains():
                log.error("processes of a former holder do not end", extra={"state_dir": str(state_dir)})
            broker = BrokerKeeper(state_dir=state_dir, socket=settings.socket) if settings.has_broker else None
            tasks.start_soon(_keep_logs, engines, broker, settings)
            if broker is not None:
                tasks.start_soon(broker.run)
            holder_id = secrets.token_hex(8)
            try:
                async with _serving(
                    settings, holder_id=holder_id, engines=engines, routes=routes, broker=broker
                ) as port:
                    yield Holder(
                        holder_id=holder_id, port=port, socket=settings.socket, engines=engines, routes=routes,
                        broker=broker,
                    )  # fmt: skip
                    # While it still answers gateways, which are to learn that these routes are closed.
                    await routes.close_all()
            finally:
                with anyio.CancelScope(shield=True):
                    await engines.end(grace_s=settings.stop_grace_s)
                tasks.cancel_scope.cancel()


def _made(state_dir: str) -> Path:
    """The folder, by its only name: engines are found by it, and a link would give it two."""
    path = Path(state_dir).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def _born_version(path: Path) -> int:
    """Where versions begin in this life; kept in the file for the next."""
    try:
        former = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        former = None
    version = first_version(unix_ms=time.time_ns() // 1_000_000, former_first_version=former)
    new = path.with_suffix(".new")
    new.write_text(str(version), encoding="ascii")
    new.replace(path)
    return version


@contextmanager
def _only_one(lock_path: Path) -> Iterator[None]:
    """Raises `AlreadyRunning` while another holder has the lock; the kernel lets go of it however that one ends."""
    with lock_path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AlreadyRunning(f"another holder runs with {lock_path.parent}") from error
        yield


@asynccontextmanager
async def _serving(
    settings: HolderSettings, *, holder_id: str, engines: Engines, routes: Routes, broker: BrokerKeeper | None
) -> AsyncIterator[int]:
    """Both HTTP sides; gives the TCP port."""
    control = web.AppRunner(
        control_app(holder_id=holder_id, engines=engines, routes=routes, broker=broker),
        access_log=None, shutdown_timeout=_HTTP_END_S,
    )  # fmt: skip
    lease = web.AppRunner(lease_app(routes=routes, token=settings.token), access_log=None, shutdown_timeout=_HTTP_END_S)
    socket = settings.socket
    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)
    try:
        await control.setup()
        await lease.setup()
        # The mask and not a later chmod: nobody else may connect in between.
        mask = os.umask(0o177)
        try:
            await web.UnixSite(control, str(socket)).start()
        finally:
            os.umask(mask)
        await web.TCPSite(lease, settings.host, settings.port).start()
        yield int(lease.addresses[0][1])
    finally:
        with anyio.CancelScope(shield=True):
            await control.cleanup()
            await lease.cleanup()
        socket.unlink(missing_ok=True)


async def _keep_logs(engines: Engines, broker: BrokerKeeper | None, settings: HolderSettings) -> None:
    own = (broker.log_path,) if broker is not None else ()
    await logs.keep_bounded(lambda: (*engines.log_paths(), *own), bytes_max=settings.log_bytes_max)


async def main() -> None:
    """Until SIGTERM or SIGINT."""
    settings = kit_settings.load(HolderSettings, service="holder")
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with running(settings) as holder:
            log.info("holder runs", extra={"holder_id": holder.holder_id, "lease_port": holder.port})
            async for _ in signals:
                break

"""Puts the broker together, and takes it apart when it is told to end."""

import fcntl
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import anyio

from devices.api import Device, DeviceError, DeviceSettings
from kit import settings as kit_settings
from services.broker import numa
from services.broker.broker import Broker
from services.broker.gpu import Gpu
from services.broker.host_memory import HostMemory
from services.broker.pool import Pool
from services.broker.refusals import Refused
from services.broker.server import serving
from services.broker.settings import BrokerSettings, Hold

_FILL_EVERY_S: Final = 5.0
_LOST_CODE: Final = 70
"""Exit code when a GPU was lost."""

log = logging.getLogger(__name__)


class AlreadyRunning(Exception):
    """Another broker has this state folder."""


@asynccontextmanager
async def running(settings: BrokerSettings) -> AsyncIterator[Broker]:
    """A broker for the length of the block."""
    state_dir = _made(settings.state_dir)
    with _only_one(state_dir / "lock"):
        host = HostMemory(settings)
        image_count = host.start()
        gpus = _gpus(settings)
        log.info("broker runs", extra={"gpus": len(gpus), "adopted_images": image_count})
        try:
            async with anyio.create_task_group() as tasks:
                broker = Broker(gpus=gpus, host=host, tasks=tasks, find_gpus=lambda: _gpus(settings))
                tasks.start_soon(host.run)
                if settings.hold is Hold.ALL:
                    tasks.start_soon(_keep_all, broker)
                async with serving(
                    broker, engine_socket=settings.engine_socket, control_socket=settings.control_socket
                ):
                    yield broker
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                host.close(is_kept=settings.is_arena_kept)
                for gpu in gpus.values():
                    await gpu.close()


def _made(state_dir: str) -> Path:
    path = Path(state_dir)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _only_one(lock_path: Path) -> Iterator[None]:
    """Raises `AlreadyRunning` while another broker has the lock; the kernel lets go of it however that one ends."""
    with lock_path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AlreadyRunning(f"another broker runs with {lock_path.parent}") from error
        yield


def _gpus(settings: BrokerSettings) -> dict[str, Gpu]:
    """Those of this host that are wanted; none where there is no driver."""
    from devices.nvml import NvmlInventory

    try:
        inventory = NvmlInventory()
    except DeviceError as error:
        log.warning("this host shows no GPU", extra={"why": str(error)})
        return {}
    try:
        return {
            gpu.uuid: Gpu(
                gpu.uuid, open_device=lambda uuid: _open(uuid, settings), pool=lambda device: _pool(device, settings),
                numa_index=numa.node_of_pci(gpu.pci_bus_id), on_lost=_end_at_once,
            )
            for gpu in inventory.gpus()
            if not settings.gpu_uuids or gpu.uuid in settings.gpu_uuids
        }  # fmt: skip
    finally:
        inventory.close()


def _end_at_once(gpu_uuid: str) -> None:
    """A lost GPU breaks this process's context for good, and closing it may hang: end as a killed broker does.

    Engines on the other GPUs keep what they map, the images stay, and the holder starts the next broker.
    """
    log.error("a GPU is lost; the broker ends, to be started again without it", extra={"gpu": gpu_uuid})
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(_LOST_CODE)


def _open(gpu_uuid: str, settings: BrokerSettings) -> Device:
    from devices.cuda import CudaDevice

    return CudaDevice(gpu_uuid, settings=DeviceSettings(chunk_bytes=settings.piece_bytes_max))


def _pool(device: Device, settings: BrokerSettings) -> Pool:
    memory = device.memory()
    is_all = settings.hold is Hold.ALL
    capacity_bytes = memory.free_bytes - settings.reserve_bytes if is_all else memory.capacity_bytes
    granularity_bytes = device.granularity_bytes
    return Pool(
        capacity_bytes=max(0, capacity_bytes) // granularity_bytes * granularity_bytes,
        granularity_bytes=granularity_bytes,
        piece_bytes_max=device.chunk_bytes,
        keep_bytes=None if is_all else settings.pooled_bytes_max,
    )


async def _keep_all(broker: Broker) -> None:
    """Take what is free of every GPU, now and whenever some becomes free."""
    while True:
        for gpu in broker.gpus.values():
            try:
                await broker.open_gpu(gpu)
                await gpu.fill_pool()
            except Refused as refused:
                log.warning("a GPU cannot be opened", extra={"gpu": gpu.gpu_uuid, "why": refused.sentence})
        await anyio.sleep(_FILL_EVERY_S)


async def main() -> None:
    """Until SIGTERM or SIGINT."""
    settings = kit_settings.load(BrokerSettings, service="broker")
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with running(settings):
            async for _ in signals:
                break

"""GPUs, opened by an engine: what it costs to be there, whether it is the software one, and the thread for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from devices.api import Device, DeviceError, MiB

# Taken when the driver does not say what our context holds (a namespace in which NVML sees no pid). An H100's is 400
# to 600 MiB; too much only makes the KV cache smaller.
CONTEXT_BYTES_ASSUMED = 512 * MiB

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedGpu:
    """A device with a context in this process. `context_bytes` stays on the GPU for as long as the process lives."""

    device: Device
    is_software: bool
    context_bytes: int
    is_context_measured: bool

    @property
    def label(self) -> str:
        """What every figure obtained here must be labelled with."""
        return "software GPU" if self.is_software else "real GPU"


def open_gpu(gpu_uuid: str) -> OpenedGpu:
    """Open the GPU and measure the context's cost. Raises `DeviceError`, for example `NotFound` or `OutOfMemory`."""
    # Late imports: an engine answers /health before it loads the driver.
    from devices.cuda import CudaDevice
    from devices.nvml import NvmlInventory

    device = CudaDevice(gpu_uuid)
    try:
        inventory = NvmlInventory()
        try:
            is_software = any(gpu.is_software for gpu in inventory.gpus() if gpu.uuid == gpu_uuid)
            context_bytes = inventory.process_bytes(gpu_uuid).get(os.getpid())
        finally:
            inventory.close()
    except DeviceError:
        device.close()
        raise
    return OpenedGpu(
        device=device,
        is_software=is_software,
        context_bytes=CONTEXT_BYTES_ASSUMED if context_bytes is None else context_bytes,
        is_context_measured=context_bytes is not None,
    )


def open_gpus(gpu_uuids: Sequence[str]) -> tuple[OpenedGpu, ...]:
    """Open each GPU. Raises `DeviceError`, and then none stays open."""
    opened: list[OpenedGpu] = []
    try:
        opened.extend(open_gpu(gpu_uuid) for gpu_uuid in gpu_uuids)
    except DeviceError:
        for gpu in opened:
            gpu.device.close()
        raise
    return tuple(opened)


class GpuThread:
    """The one thread on which an engine makes its driver calls: they block, and their order matters."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpu")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The call's result. It goes on when the caller is cancelled; later calls wait for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

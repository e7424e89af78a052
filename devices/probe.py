"""What a process that obeys nobody can allocate here and now: the live proof of an isolation grade.

Each attempt is one piece of physical memory, so a refused one takes nothing, not even for a moment.
"""

from __future__ import annotations

import contextlib
import os

from devices.api import DeviceError, DeviceSettings, MiB, OutOfMemory

GRANTED = "granted"
REFUSED = "refused"
UNTRIED = "untried"


def try_allocations(gpu_uuid: str, *, within_bytes: int, beyond_bytes: int) -> dict[str, object]:
    """``{"context", "within", "beyond": granted, refused or untried, "context_bytes", "shown_bytes", "failure"}``.

    `context_bytes` is what being there costs, as the driver counts it; None when it does not say. `shown_bytes` is what
    CUDA says the GPU's size is, which under a limit on the very group of this process is the limit. `failure` is not
    empty when something else than a refusal for want of memory came in between.
    """
    told: dict[str, object] = {
        "context": UNTRIED,
        "within": UNTRIED,
        "beyond": UNTRIED,
        "context_bytes": None,
        "shown_bytes": None,
        "failure": "",
    }
    step = "context"
    try:
        from devices.cuda import CudaDevice  # Late: what the loader says is an answer too.

        device = CudaDevice(gpu_uuid, settings=DeviceSettings(chunk_bytes=max(within_bytes, beyond_bytes, MiB)))
        with contextlib.closing(device):
            told["context"] = GRANTED
            told["context_bytes"] = _own_bytes(gpu_uuid)
            told["shown_bytes"] = device.memory().capacity_bytes
            for step, size_bytes in (("within", within_bytes), ("beyond", beyond_bytes)):
                if size_bytes > 0:
                    device.free(device.allocate(size_bytes))
                    told[step] = GRANTED
    except OutOfMemory:
        told[step] = REFUSED
    except (DeviceError, ImportError) as error:
        told["failure"] = f"{step}: {error}"
    return told


def _own_bytes(gpu_uuid: str) -> int | None:
    from devices.nvml import NvmlInventory

    try:
        with contextlib.closing(NvmlInventory()) as inventory:
            return inventory.process_bytes(gpu_uuid).get(os.getpid())
    except DeviceError:
        return None

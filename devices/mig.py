"""GPUs that are cut into MIG instances, by NVML: which there are, and which of them an error strikes.

Functions take `call`, by which they ask NVML; see `devices.nvml.call`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from devices.api import InvalidUse, NotFound, NotSupported

Call = Callable[..., Any]
# NVML's word for "of no instance in particular".
_NO_INSTANCE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is offered of a GPU: itself, or one of its instances."""

    uuid: str
    instance_id: int | None  # None: the GPU itself


def instances_of(call: Call, gpu: Any) -> list[Any] | None:
    """Handles of a GPU's instances, possibly none; None for a GPU that is not cut."""
    try:
        mode, _ = call("nvmlDeviceGetMigMode", gpu)
        if not mode:
            return None
        count = int(call("nvmlDeviceGetMaxMigDeviceCount", gpu))
    except (NotSupported, InvalidUse):
        return None
    found = []
    for index in range(count):
        try:
            found.append(call("nvmlDeviceGetMigDeviceHandleByIndex", gpu, index))
        except (NotFound, InvalidUse):
            continue  # Not made: the places need not be taken in order.
    return found


def gpu_of(call: Call, handle: Any) -> Any:
    """The GPU that an instance is a part of; a GPU itself as it is."""
    try:
        told = call("nvmlDeviceIsMigDeviceHandle", handle)
        is_instance = bool(getattr(told, "value", told))  # pynvml gives it as it came from C.
        return call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) if is_instance else handle
    except NotSupported:
        return handle


def parts_of(call: Call, gpu: Any) -> list[Part]:
    """What is offered of it."""
    instances = instances_of(call, gpu)
    if instances is None:
        return [Part(uuid=str(call("nvmlDeviceGetUUID", gpu)), instance_id=None)]
    return [
        Part(
            uuid=str(call("nvmlDeviceGetUUID", instance)),
            instance_id=int(call("nvmlDeviceGetGpuInstanceId", instance)),
        )
        for instance in instances
    ]


def struck(parts: Sequence[Part], *, instance_id: int) -> list[str]:
    """UUIDs of those that an error report is about: of one instance, or of the GPU and with it of all."""
    if instance_id == _NO_INSTANCE:
        return [part.uuid for part in parts]
    return [part.uuid for part in parts if part.instance_id in (None, instance_id)]

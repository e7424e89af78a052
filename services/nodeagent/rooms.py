"""What an engine will see on its GPUs when it starts: those that size themselves by a part of the GPU must know."""

from collections.abc import Mapping

import anyio.to_thread

from devices.api import Inventory
from services.nodeagent.adapters.api import Room


class Rooms:
    """Of this host's GPUs. NVML is called in worker threads: it may block."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    async def of(self, granted_bytes: Mapping[str, int]) -> tuple[Room, ...]:
        """For an engine with so much on each of these GPUs, in their order."""
        return await anyio.to_thread.run_sync(self._of, dict(granted_bytes))

    def _of(self, granted_bytes: Mapping[str, int]) -> tuple[Room, ...]:
        return tuple(self._room(gpu_uuid, size) for gpu_uuid, size in granted_bytes.items())

    def _room(self, gpu_uuid: str, granted_bytes: int) -> Room:
        """Where the driver limits an engine, its limit is all that the driver tells it."""
        if self._inventory.limits_support(gpu_uuid).is_supported:
            return Room(
                gpu_uuid=gpu_uuid, granted_bytes=granted_bytes, visible_bytes=granted_bytes, free_bytes=granted_bytes
            )
        memory = self._inventory.memory(gpu_uuid)
        return Room(
            gpu_uuid=gpu_uuid,
            granted_bytes=granted_bytes,
            visible_bytes=memory.capacity_bytes,
            free_bytes=memory.free_bytes,
        )

"""What an engine will see on its GPUs when it starts: those that size themselves by a part of the GPU must know."""

from collections.abc import Mapping

import anyio.to_thread

from services.nodeagent.adapters.api import Room
from services.nodeagent.guard import Guard


class Rooms:
    """Of this host's GPUs. NVML is called in worker threads: it may block."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def of(self, granted_bytes: Mapping[str, int], *, is_container: bool) -> tuple[Room, ...]:
        """For an engine with so much on each of these GPUs, in their order."""
        return tuple([await self._room(uuid, size, is_container=is_container) for uuid, size in granted_bytes.items()])

    async def _room(self, gpu_uuid: str, granted_bytes: int, *, is_container: bool) -> Room:
        """Where the driver limits an engine, its limit is all that the driver tells it."""
        if await self._guard.is_limiting(gpu_uuid, is_container=is_container):
            return Room(
                gpu_uuid=gpu_uuid, granted_bytes=granted_bytes, visible_bytes=granted_bytes, free_bytes=granted_bytes
            )
        memory = await anyio.to_thread.run_sync(self._guard.inventory.memory, gpu_uuid)
        return Room(
            gpu_uuid=gpu_uuid,
            granted_bytes=granted_bytes,
            visible_bytes=memory.capacity_bytes,
            free_bytes=memory.free_bytes,
        )

"""Backend `hardware`: a MIG device, which the GPU itself keeps apart and which one replica gets as a whole."""

from typing import ClassVar, Final

import anyio.to_thread

from devices.api import GpuDescription, Inventory
from schemas.deployments import IsolationGrade
from services.nodeagent.guard.api import Share, Verdict

MIG_PREFIX: Final = "MIG-"
"""Of NVML's UUIDs of such devices."""


class HardwarePart:
    """There is nothing to set: its size is its limit. The driver's own limits refuse such devices."""

    grade: ClassVar[IsolationGrade] = IsolationGrade.HARDWARE

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    async def prove(self, gpu: GpuDescription) -> Verdict:
        if gpu.uuid.startswith(MIG_PREFIX):
            return Verdict(is_proven=True, reason="a MIG device: the hardware keeps it apart")
        return Verdict(is_proven=False, reason="not a MIG device")

    async def enforce(self, share: Share) -> int:
        """Its size, as the driver tells it."""
        memory = await anyio.to_thread.run_sync(self._inventory.memory, share.gpu_uuid)
        return memory.capacity_bytes

    async def verify(self, share: Share) -> None:
        return

    async def lift(self, share: Share) -> None:
        return

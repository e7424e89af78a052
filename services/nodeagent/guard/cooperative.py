"""Backends `cooperative` and `watched`: the engine keeps to a budget, or nothing does; the watchdog looks on at both.

What engine obeys which budget is data (`services.nodeagent.grades`). The budget is given at the start, as an argument
of the engine. Changing it while the engine runs is an effect of its own, for the engines that can.
"""

from typing import ClassVar, Final

import anyio.to_thread

from devices.api import DeviceError, GpuDescription, Inventory
from schemas.deployments import IsolationGrade
from services.nodeagent.guard.api import Share, Verdict

MEASURED: Final = "the watchdog measures each process"


class EnginesBudget:
    """Nothing is enforced: an engine that keeps its budget is as good as it is honest."""

    grade: ClassVar[IsolationGrade] = IsolationGrade.COOPERATIVE

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    async def prove(self, gpu: GpuDescription) -> Verdict:
        """Whether somebody would notice: without a measurement there is no cooperation, only hope."""
        try:
            used = await anyio.to_thread.run_sync(self._inventory.process_bytes, gpu.uuid)
        except DeviceError as error:
            return Verdict(is_proven=False, reason=f"the driver does not tell who uses what: {error}")
        if any(size is None for size in used.values()):
            return Verdict(is_proven=False, reason="the driver does not tell how much each process uses")
        return Verdict(is_proven=True, reason=f"engines obey their budget, and {MEASURED}")

    async def enforce(self, share: Share) -> int:
        return 0

    async def verify(self, share: Share) -> None:
        return

    async def lift(self, share: Share) -> None:
        return


class Watched(EnginesBudget):
    """The last resort: overuse is seen afterwards, and the offender stopped."""

    grade: ClassVar[IsolationGrade] = IsolationGrade.WATCHED

    async def prove(self, gpu: GpuDescription) -> Verdict:
        return Verdict(is_proven=True, reason="overuse is only seen afterwards, by measuring")

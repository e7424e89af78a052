"""The driver of last resort: the engine is stopped, and its wake is a cold start."""

from collections.abc import Collection
from typing import Final

from schemas.deployments import SwapDriver
from schemas.nodes import ParkTier
from services.nodeagent.mover.driver import YES, Broken, Parked, Standing, Support, SwapTarget, Woken

START_S: Final = 60.0
"""Imports, graphs and warm-up of the engines that need this driver: 30 to 100 s were seen."""
DISK_BYTES_PER_S: Final = 2e9


class Restart:
    """It does nothing itself: whoever parks by it stops the process, and the residency machine starts it on a wake."""

    name = SwapDriver.RESTART
    is_wake_repeatable = False
    residue_bytes = 0

    async def support(self, gpu_uuids: Collection[str]) -> dict[str, Support]:
        return dict.fromkeys(gpu_uuids, YES)

    def estimate_s(self, size_bytes: int, *, link_bytes_per_s: float) -> float:
        return START_S + size_bytes / min(DISK_BYTES_PER_S, link_bytes_per_s)

    async def prepare(self, target: SwapTarget) -> None:
        """Nothing is kept."""

    async def park(self, target: SwapTarget) -> Parked:
        return Parked(copied_bytes=0, host_bytes=0, tier=ParkTier.NOWHERE)

    async def wake(self, target: SwapTarget) -> Woken:
        raise Broken("it should have been stopped when it was parked")

    async def standing(self, target: SwapTarget) -> Standing:
        return Standing.RESIDENT

    async def forget(self, target: SwapTarget) -> None:
        """Nothing is kept."""

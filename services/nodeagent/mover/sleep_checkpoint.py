"""First the engine lets go of what it can make again, then the driver takes the rest: a small image, nothing stays."""

from collections.abc import Collection

from schemas.deployments import SwapDriver
from services.nodeagent.mover.checkpoint import Checkpoint
from services.nodeagent.mover.driver import (
    Broken,
    Parked,
    Standing,
    StillParked,
    StillResident,
    Support,
    SwapTarget,
    Woken,
)
from services.nodeagent.mover.over_http import OverHttp


class SleepCheckpoint:
    """Both drivers, one after the other. A frozen engine answers nobody, so how it stands is asked in order."""

    name = SwapDriver.SLEEP_CHECKPOINT
    is_wake_repeatable = False
    residue_bytes = 0

    def __init__(self, sleep: OverHttp, checkpoint: Checkpoint) -> None:
        self._sleep = sleep
        self._checkpoint = checkpoint

    async def support(self, gpu_uuids: Collection[str]) -> dict[str, Support]:
        return await self._checkpoint.support(gpu_uuids)

    def estimate_s(self, size_bytes: int, *, link_bytes_per_s: float) -> float:
        return self._sleep.estimate_s(size_bytes, link_bytes_per_s=link_bytes_per_s)

    async def prepare(self, target: SwapTarget) -> None:
        """How little will be left is known only when it sleeps."""

    async def park(self, target: SwapTarget) -> Parked:
        standing = await self._checkpoint.standing(target)
        if standing is Standing.BETWEEN:
            await self._checkpoint.wake(target)
        slept = Parked(copied_bytes=0, host_bytes=target.replica.deployment.engine.weights_bytes)
        if standing is not Standing.PARKED:
            slept = await self._sleep.park(target)
        try:
            frozen = await self._checkpoint.park(target)
        except StillResident as error:
            await self._wake_again(target, error)
            raise
        return Parked(
            copied_bytes=slept.copied_bytes + frozen.copied_bytes, host_bytes=slept.host_bytes + frozen.host_bytes
        )

    async def _wake_again(self, target: SwapTarget, error: Exception) -> None:
        """It sleeps but could not be frozen: it would keep what its lease does not hold."""
        try:
            await self._sleep.wake(target)
        except StillParked as worse:
            raise Broken(f"{error}; it did not come back: {worse}") from worse

    async def wake(self, target: SwapTarget) -> Woken:
        thawed = await self._checkpoint.wake(target)
        try:
            woken = await self._sleep.wake(target)
        except StillParked as error:
            try:
                await self._checkpoint.park(target)
            except StillResident as worse:
                raise Broken(f"{error}; it could not be frozen again: {worse}") from error
            raise
        return Woken(
            copied_bytes=thawed.copied_bytes + woken.copied_bytes,
            map_s=thawed.map_s + woken.map_s,
            copy_s=thawed.copy_s + woken.copy_s,
        )

    async def standing(self, target: SwapTarget) -> Standing:
        frozen = await self._checkpoint.standing(target)
        if frozen is not Standing.RESIDENT:
            return frozen
        awake = await self._sleep.standing(target)
        return Standing.RESIDENT if awake is Standing.RESIDENT else Standing.BETWEEN

    async def forget(self, target: SwapTarget) -> None:
        await self._checkpoint.forget(target)

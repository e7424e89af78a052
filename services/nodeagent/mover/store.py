"""The driver `store`: the engine's weights belong to the memory broker, so a park unmaps them and copies nothing.

The engine itself is asked by vLLM's sleep routes, as by `http-sleep`; it takes and returns its memory over the broker's
socket. What is different here: host memory is promised before the first park, and the broker has to say that the
engine's memory is back before anybody else may count on it, for the driver charges that memory to the broker.
"""

import logging
import time
from collections.abc import Callable, Collection
from typing import Final

import anyio

from schemas.brokers import AccountView, HostReserve
from schemas.deployments import SwapDriver
from schemas.nodes import ParkTier
from services.nodeagent.broker_client import BrokerClient, BrokerProblem
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.mover.driver import (
    YES,
    Broken,
    Parked,
    Standing,
    StillResident,
    Support,
    SwapTarget,
    Woken,
)
from services.nodeagent.mover.over_http import SLEEP, OverHttp

PROOF_S: Final = 5.0
"""The broker's books follow a return at once; longer means that it was not made, or that the broker is away."""
PROOF_POLL_S: Final = 0.02
LINK_FRACTION: Final = 0.9
"""Of the link: pinned memory, large pieces, mapped while they are copied. Not measured on hardware by us."""

log = logging.getLogger("nodeagent")


class Store:
    """Against this host's memory broker."""

    name = SwapDriver.STORE
    is_wake_repeatable = True
    """The broker lends all of it or nothing, and an engine whose wake failed has returned it."""
    residue_bytes = None

    def __init__(self, engines: EngineClient, broker: BrokerClient) -> None:
        self._engine = OverHttp(SLEEP, engines)
        self._broker = broker

    async def support(self, gpu_uuids: Collection[str]) -> dict[str, Support]:
        """Where the broker answers, on the GPUs that it has."""
        try:
            view = await self._broker.look()
        except BrokerProblem as problem:
            return dict.fromkeys(gpu_uuids, Support(is_supported=False, reason=str(problem)))
        known = {pool.gpu_uuid for pool in view.gpus}
        no = Support(is_supported=False, reason="the memory broker does not have this GPU")
        return {gpu_uuid: YES if gpu_uuid in known else no for gpu_uuid in gpu_uuids}

    def estimate_s(self, size_bytes: int, *, link_bytes_per_s: float) -> float:
        return size_bytes / (LINK_FRACTION * link_bytes_per_s)

    async def prepare(self, target: SwapTarget) -> None:
        """Host memory for its images. Raises `StillResident` when the broker cannot promise it."""
        await self._reserve(target, size_bytes=target.replica.deployment.engine.weights_bytes)

    async def park(self, target: SwapTarget) -> Parked:
        try:
            parked = await self._engine.park(target)
        except Broken as error:
            # What could not be sealed was not let go.
            if await self._engine.standing(target) is Standing.RESIDENT:
                raise StillResident(str(error)) from error
            raise
        account = await self._proven_empty(target)
        tier = ParkTier.DISK if account.tier == ParkTier.DISK else ParkTier.HOST
        return Parked(copied_bytes=parked.copied_bytes, host_bytes=account.sealed_bytes, tier=tier)

    async def _proven_empty(self, target: SwapTarget) -> AccountView:
        """The account once the broker says that nothing is lent to it on any of its GPUs. Raises `Broken`."""
        give_up_s = time.monotonic() + PROOF_S
        reason = ""
        while time.monotonic() < give_up_s:
            try:
                account = await self._account(target)
            except BrokerProblem as problem:
                reason = str(problem)
            else:
                if account is None:
                    reason = "the memory broker does not know its account"
                elif not account.is_held_known:
                    reason = "the memory broker was restarted, and the engine has not yet told it what it maps"
                elif not any(account.held_bytes.values()):
                    return account
                else:
                    reason = f"the memory broker says that it still holds {sum(account.held_bytes.values())} bytes"
            await anyio.sleep(PROOF_POLL_S)
        raise Broken(f"its bytes are not proven free after its park: {reason}")

    async def _account(self, target: SwapTarget) -> AccountView | None:
        found = ours(target)
        return next((account for account in (await self._broker.look()).accounts if found(account)), None)

    async def wake(self, target: SwapTarget) -> Woken:
        return await self._engine.wake(target)

    async def standing(self, target: SwapTarget) -> Standing:
        return await self._engine.standing(target)

    async def forget(self, target: SwapTarget) -> None:
        """Its promise of host memory. Its images stay as long as there is room, for its next start seals the same."""
        try:
            await self._reserve(target, size_bytes=0)
        except StillResident as error:
            log.warning("host memory not given back", extra={"replica": target.replica.replica_id, "why": str(error)})

    async def _reserve(self, target: SwapTarget, *, size_bytes: int) -> None:
        replica = target.replica
        try:
            await self._broker.reserve(
                HostReserve(
                    replica_id=replica.replica_id,
                    deployment_id=replica.deployment_id,
                    size_bytes=size_bytes,
                    gpu_uuids=target.gpu_uuids,
                )
            )
        except BrokerProblem as problem:
            raise StillResident(f"host memory for its images: {problem}") from problem


def ours(target: SwapTarget) -> Callable[[AccountView], bool]:
    """Whether an account is that of this engine."""
    return lambda account: account.replica_id == target.replica.replica_id and account.lease_epoch == target.lease_epoch

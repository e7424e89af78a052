"""Backend `broker`: the memory broker holds the whole GPU, and lends each engine what it is granted."""

from typing import ClassVar, Final

import anyio
import anyio.to_thread

from devices.api import GpuDescription, Inventory
from schemas.brokers import AccountView
from schemas.deployments import IsolationGrade
from schemas.units import MiB
from services.nodeagent.guard.accounts import Accounts
from services.nodeagent.guard.api import NotEnforced, Share, Verdict
from services.nodeagent.guard.proof import Attempt, Proof

BEYOND_BYTES: Final = 64 * MiB
"""More than the reserve by this much must not be had by a direct allocation."""

FILL_LOOK_S: Final = 0.5
"""Between two looks at a pool that fills; a broker makes tens of GiB in this time."""


class BrokerQuota:
    """No handle, no memory: the quota itself is the account's grant (`Accounts.allow`), which the broker keeps."""

    grade: ClassVar[IsolationGrade] = IsolationGrade.BROKER

    def __init__(
        self, inventory: Inventory, accounts: Accounts | None, proof: Proof | None, *, reserve_bytes: int
    ) -> None:
        self._inventory = inventory
        self._accounts = accounts
        self._proof = proof
        self._reserve_bytes = reserve_bytes

    async def prove(self, gpu: GpuDescription) -> Verdict:
        """The broker is there, holds all but the reserve, and a live allocation of more than that is refused."""
        if self._accounts is None:
            return Verdict(is_proven=False, reason="no memory broker")
        view = await self._accounts.look()
        pool = next((pool for pool in view.gpus if pool.gpu_uuid == gpu.uuid), None) if view is not None else None
        if pool is None:
            return Verdict(is_proven=False, reason="the memory broker does not have this GPU")
        free_bytes = await self._settled_bytes(gpu)
        if free_bytes > self._reserve_bytes:
            beyond_bytes = free_bytes - self._reserve_bytes
            reason = f"the memory broker does not hold the whole GPU: {beyond_bytes} bytes beyond the reserve are free"
            return Verdict(is_proven=False, reason=reason)
        if self._proof is None:
            return Verdict(is_proven=True, reason="the memory broker holds the whole GPU; not tried out")
        # Not kept: what it proves is how the GPU is filled now.
        tried = await self._proof.attempt(gpu, within_bytes=0, beyond_bytes=self._reserve_bytes + BEYOND_BYTES)
        return verdict_of(tried)

    async def _settled_bytes(self, gpu: GpuDescription) -> int:
        """What is free there, once the broker takes no more of it: its pool is filled in the first seconds."""
        free_bytes = (await anyio.to_thread.run_sync(self._inventory.memory, gpu.uuid)).free_bytes
        while free_bytes > self._reserve_bytes:
            await anyio.sleep(FILL_LOOK_S)
            before_bytes = free_bytes
            free_bytes = (await anyio.to_thread.run_sync(self._inventory.memory, gpu.uuid)).free_bytes
            if free_bytes > before_bytes - BEYOND_BYTES:
                break
        return free_bytes

    async def enforce(self, share: Share) -> int:
        """What the account allows, as the broker tells it. Raises `NotEnforced` when it knows no such account."""
        account = await self._account(share)
        granted_bytes = None if account is None else account.granted_bytes.get(share.gpu_uuid)
        if granted_bytes is None:
            raise NotEnforced(f"the memory broker has no account for {share.replica_id} on {share.gpu_uuid}")
        if granted_bytes > share.granted_bytes:
            raise NotEnforced(f"the memory broker lends up to {granted_bytes} bytes, not {share.granted_bytes}")
        return granted_bytes

    async def verify(self, share: Share) -> None:
        """It asks the broker. One that does not has its memory from somewhere else."""
        account = await self._account(share)
        if account is None or not account.is_connected:
            raise NotEnforced(f"{share.replica_id} runs and is not connected to the memory broker")

    async def lift(self, share: Share) -> None:
        return None  # The account is closed once for all GPUs.

    async def _account(self, share: Share) -> AccountView | None:
        view = await self._accounts.look() if self._accounts is not None else None
        if view is None:
            return None
        for account in view.accounts:
            if account.replica_id == share.replica_id and account.lease_epoch == share.lease_epoch:
                return account
        return None


def verdict_of(tried: Attempt) -> Verdict:
    if tried.failure:
        return Verdict(is_proven=False, reason=f"the proof failed: {tried.failure}")
    if tried.beyond == "granted":
        return Verdict(is_proven=False, reason="a live allocation beyond the reserve was granted: memory is free")
    reason = "the memory broker holds the whole GPU; a live allocation beyond the reserve was refused"
    return Verdict(is_proven=True, reason=reason, context_bytes=tried.context_bytes)

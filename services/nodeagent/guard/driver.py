"""Backend `driver`: NVML's memory limits on the cgroup leaf of each engine (driver R615 and later)."""

import logging
from typing import ClassVar

import anyio.to_thread

from devices.api import DeviceError, GpuDescription, Inventory, NotFound
from schemas.deployments import IsolationGrade
from services.nodeagent.guard.api import NotEnforced, Share, Verdict
from services.nodeagent.guard.proof import Attempt, Proof, limits_to_try

log = logging.getLogger("nodeagent")


class DriverLimits:
    """Soft is the request, which MPS honours when an owner asks; hard is the grant, which nothing passes."""

    grade: ClassVar[IsolationGrade] = IsolationGrade.DRIVER

    def __init__(self, inventory: Inventory, proof: Proof | None) -> None:
        self._inventory = inventory
        self._proof = proof

    async def prove(self, gpu: GpuDescription) -> Verdict:
        """Supported, and a process that was limited to so much was refused more."""
        support = await anyio.to_thread.run_sync(self._inventory.limits_support, gpu.uuid)
        if not support.is_supported:
            return Verdict(is_proven=False, reason=support.reason)
        if self._proof is None:
            return Verdict(is_proven=True, reason="the driver limits memory per group of processes; not tried out")
        return await self._proof.of(gpu, backend=self.grade, attempt=self._attempt)

    async def _attempt(self, gpu: GpuDescription) -> Verdict:
        """One process in a group of its own, limited to less than is free, tries to take more."""
        assert self._proof is not None
        free_bytes = (await anyio.to_thread.run_sync(self._inventory.memory, gpu.uuid)).free_bytes
        limit_bytes, within_bytes, beyond_bytes = limits_to_try(free_bytes)

        async def before_gate(namespace: str) -> None:
            await anyio.to_thread.run_sync(self._set, gpu.uuid, namespace, limit_bytes, limit_bytes)

        async def after_end(namespace: str) -> None:
            await anyio.to_thread.run_sync(self._clear, gpu.uuid, namespace)

        try:
            tried = await self._proof.attempt(
                gpu, within_bytes=within_bytes, beyond_bytes=beyond_bytes, before=before_gate, after=after_end
            )
        except (DeviceError, NotEnforced) as error:
            return Verdict(is_proven=False, reason=f"the driver takes no limit on an engine's group: {error}")
        return verdict_of(tried, limit_bytes=limit_bytes)

    async def enforce(self, share: Share) -> int:
        """Soft at most hard; both in one call, then read back."""
        hard_bytes = share.direct_bytes
        soft_bytes = min(max(0, share.request_bytes - share.brokered_bytes), hard_bytes)
        return await anyio.to_thread.run_sync(self._set, share.gpu_uuid, share.namespace, soft_bytes, hard_bytes)

    async def verify(self, share: Share) -> None:
        """The driver counts something under the limit: the process is where the limit is."""
        read = await anyio.to_thread.run_sync(self._inventory.limit, share.gpu_uuid, share.namespace)
        if read.used_bytes <= 0:
            raise NotEnforced(f"the engine runs, and nothing is counted under {share.namespace}: it is not there")

    async def give_up(self, share: Share) -> None:
        """No guarantee any more; what it may hold at the most stays. Idempotent."""
        await anyio.to_thread.run_sync(self._give_up, share.gpu_uuid, share.namespace)

    async def lift(self, share: Share) -> None:
        await anyio.to_thread.run_sync(self._clear, share.gpu_uuid, share.namespace)

    def _set(self, gpu_uuid: str, namespace: str, soft_bytes: int, hard_bytes: int) -> int:
        self._inventory.set_limit(gpu_uuid, namespace, soft_bytes=soft_bytes, hard_bytes=hard_bytes)
        read = self._inventory.limit(gpu_uuid, namespace)
        if read.hard_bytes != hard_bytes or read.soft_bytes != soft_bytes:
            raise NotEnforced(
                f"set {soft_bytes} and {hard_bytes} bytes for {namespace}, read back {read.soft_bytes} and "
                f"{read.hard_bytes}"
            )
        return hard_bytes

    def _give_up(self, gpu_uuid: str, namespace: str) -> None:
        try:
            hard_bytes = self._inventory.limit(gpu_uuid, namespace).hard_bytes
            self._inventory.set_limit(gpu_uuid, namespace, soft_bytes=0, hard_bytes=hard_bytes)
        except NotFound:
            return
        except DeviceError as error:
            log.warning("guarantee not given up", extra={"namespace": namespace, "reason": str(error)})

    def _clear(self, gpu_uuid: str, namespace: str) -> None:
        try:
            self._inventory.clear_limit(gpu_uuid, namespace)
        except NotFound:
            return  # The group is gone, and its limits with it.
        except DeviceError as error:
            log.warning("limit not cleared", extra={"namespace": namespace, "reason": str(error)})


def verdict_of(tried: Attempt, *, limit_bytes: int) -> Verdict:
    """What the attempt proves about a limit of so many bytes."""
    if tried.failure:
        return Verdict(is_proven=False, reason=f"limits were set, and their proof failed: {tried.failure}")
    if tried.beyond == "granted":
        reason = f"the driver accepts limits and does not enforce them: beyond {limit_bytes} bytes all was granted"
        return Verdict(is_proven=False, reason=reason)
    if tried.within != "granted":
        reason = f"limits could not be proven: too little memory is free to try one of {limit_bytes} bytes"
        return Verdict(is_proven=False, reason=reason)
    shown = "" if tried.shown_bytes == limit_bytes else "; engines see the whole GPU, not their limit"
    reason = f"the driver refused a live allocation beyond a group's limit{shown}"
    return Verdict(is_proven=True, reason=reason, context_bytes=tried.context_bytes)

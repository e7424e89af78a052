"""The guard: finds the strongest way to enforce a share on a GPU, sets limits and reads them back."""

import logging
from dataclasses import dataclass
from typing import Final

import anyio.to_thread

from devices.api import DeviceError, GpuDescription, Inventory, NotFound, NotSupported
from schemas.deployments import IsolationGrade
from schemas.nodes import GpuOffer
from schemas.units import GB
from services.nodeagent.settings import NodeAgentSettings

log = logging.getLogger("nodeagent")

LINK_GB_PER_S: Final = {3: 13.0, 4: 26.0, 5: 53.0, 6: 106.0}
"""Achieved with pinned memory on 16 lanes, by PCIe generation; 53 is NVIDIA's figure for an H100 (gen 5)."""


class NotEnforced(Exception):
    """The limit that was read back is not the one that was set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grade:
    grade: IsolationGrade
    reason: str


class Guard:
    """Limits on the GPUs of this host. NVML is called in worker threads: it may block."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._grades: dict[str, _Grade] = {}

    async def offers(self, settings: NodeAgentSettings, *, our_pids: frozenset[int]) -> tuple[GpuOffer, ...]:
        """Every GPU of this host, with the grade that probing found."""
        return await anyio.to_thread.run_sync(self._offers, settings, our_pids)

    async def limit(self, gpu_uuid: str, namespace: str, *, granted_bytes: int) -> int:
        """Allow the group so much and no more, and give the hard limit as it is read back.

        Without the driver's limits nothing is set; the grade says so, and 0 is given. Raises `NotEnforced`.
        """
        return await anyio.to_thread.run_sync(self._limit, gpu_uuid, namespace, granted_bytes)

    async def clear(self, gpu_uuid: str, namespace: str) -> None:
        """Lift the limit; before the group's cgroup goes. Idempotent."""
        await anyio.to_thread.run_sync(self._clear, gpu_uuid, namespace)

    async def used_bytes(self, gpu_uuid: str, namespace: str, pid: int) -> int | None:
        """What the engine uses now, by the driver's account; None when it does not say."""
        return await anyio.to_thread.run_sync(self._used_bytes, gpu_uuid, namespace, pid)

    def _offers(self, settings: NodeAgentSettings, our_pids: frozenset[int]) -> tuple[GpuOffer, ...]:
        return tuple(self._offer(gpu, settings, our_pids) for gpu in self._inventory.gpus())

    def _offer(self, gpu: GpuDescription, settings: NodeAgentSettings, our_pids: frozenset[int]) -> GpuOffer:
        grade = self._grade(gpu.uuid)
        used = self._inventory.process_bytes(gpu.uuid)
        lanes_fraction = (gpu.link_width_count or 16) / 16
        return GpuOffer(
            gpu_uuid=gpu.uuid,
            index=gpu.index,
            name=gpu.name,
            capacity_bytes=gpu.capacity_bytes,
            reserve_bytes=settings.reserve_bytes + gpu.reserved_bytes,
            foreign_bytes=sum(size or 0 for pid, size in used.items() if pid not in our_pids),
            grade=grade.grade,
            grade_reason=grade.reason,
            link_bytes_per_s=LINK_GB_PER_S.get(gpu.link_generation or 4, 26.0) * lanes_fraction * GB,
            is_software=gpu.is_software,
            peer_bytes_per_s=dict(self._inventory.peer_bytes_per_s(gpu.uuid)),
        )

    def _grade(self, gpu_uuid: str) -> _Grade:
        known = self._grades.get(gpu_uuid)
        if known is None:
            support = self._inventory.limits_support(gpu_uuid)
            if support.is_supported:
                known = _Grade(grade=IsolationGrade.DRIVER, reason="the driver limits memory per group of processes")
            else:
                known = _Grade(grade=IsolationGrade.COOPERATIVE, reason=f"engines obey their budget; {support.reason}")
            self._grades[gpu_uuid] = known
        return known

    def _limit(self, gpu_uuid: str, namespace: str, granted_bytes: int) -> int:
        if self._grade(gpu_uuid).grade is not IsolationGrade.DRIVER:
            return 0
        self._inventory.set_limit(gpu_uuid, namespace, soft_bytes=granted_bytes, hard_bytes=granted_bytes)
        read = self._inventory.limit(gpu_uuid, namespace)
        if read.hard_bytes != granted_bytes:
            raise NotEnforced(f"set {granted_bytes} bytes for {namespace}, read back {read.hard_bytes}")
        return read.hard_bytes

    def _clear(self, gpu_uuid: str, namespace: str) -> None:
        if self._grade(gpu_uuid).grade is not IsolationGrade.DRIVER:
            return
        try:
            self._inventory.clear_limit(gpu_uuid, namespace)
        except NotFound:
            return  # The group is gone, and its limits with it.
        except DeviceError as error:
            log.warning("limit not cleared", extra={"namespace": namespace, "reason": str(error)})

    def _used_bytes(self, gpu_uuid: str, namespace: str, pid: int) -> int | None:
        try:
            if self._grade(gpu_uuid).grade is IsolationGrade.DRIVER:
                return self._inventory.limit(gpu_uuid, namespace).used_bytes
            return self._inventory.process_bytes(gpu_uuid).get(pid, 0)
        except NotSupported:
            return None

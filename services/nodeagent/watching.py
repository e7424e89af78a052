"""Looks at every GPU again and again while the agent runs, and waits for the driver's error reports.

It decides nothing: what it sees goes in as inputs (`gpu_inputs`), and `health` says what follows. All driver calls run
in worker threads; one that hangs holds up nothing but itself, and says that the driver does not answer.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from devices.api import (
    DeviceError,
    DeviceLost,
    GpuCondition,
    GpuDescription,
    GpuFault,
    GpuMemory,
    Inventory,
    NotFound,
    NotSupported,
)
from kit.outcomes import Input
from schemas.nodes import GpuOffer
from services.nodeagent.gpu_inputs import GpuBack, GpuFaultSeen, GpuGone, GpuMeasured
from services.nodeagent.processes import is_there
from services.nodeagent.runtimes.api import RuntimeProblem

log = logging.getLogger("nodeagent")
T = TypeVar("T")

ANSWER_S: Final = 5.0
"""A driver call that takes longer is taken for no answer. The slowest healthy ones take some tens of milliseconds."""
FAULT_WAIT_S: Final = 1.0
"""One wait for error reports: so long a stopping agent may have to wait for its thread."""
FAULT_RETRY_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What the driver told of one GPU."""

    memory: GpuMemory
    by_pid: Mapping[int, int | None]
    utilization_fraction: float | None
    condition: GpuCondition


class GpuWatch:
    """One host's eyes."""

    def __init__(
        self,
        inventory: Inventory,
        *,
        every_s: float,
        offered: Callable[[], Collection[str] | None],
        our_pids: Callable[[], Awaitable[frozenset[int]]],
        probe: Callable[[], Awaitable[tuple[GpuOffer, ...]]],
        report: Callable[[Input], None],
        answer_s: float = ANSWER_S,
    ) -> None:
        """`offered`: UUIDs that the node offers now; None before it was looked at. `probe`: all that could be."""
        self._inventory = inventory
        self._every_s = every_s
        self._offered = offered
        self._our_pids = our_pids
        self._probe = probe
        self._report = report
        self._answer_s = answer_s

    async def run(self) -> None:
        """For ever."""
        if self._every_s <= 0:
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._look_again)
            tasks.start_soon(self._wait_for_faults)

    # --- Looks --------------------------------------------------------------------------------------------------------

    async def _look_again(self) -> None:
        while True:
            await anyio.sleep(self._every_s)
            try:
                await self.look()
            except RuntimeProblem as problem:
                log.warning("GPUs not measured: the holder is away", extra={"reason": str(problem)})

    async def look(self) -> None:
        """Once at everything. Raises `RuntimeProblem`: without it nobody knows whose processes are whose."""
        offered = self._offered()
        if offered is None:
            return
        try:
            here = await self._ask(self._inventory.gpus)
        except DeviceError as error:
            for gpu_uuid in offered:
                self._report(GpuMeasured(gpu_uuid=gpu_uuid, problem=str(error)))
            return
        there = {gpu.uuid: gpu for gpu in here}
        looks = {uuid: await self._look_at(there[uuid]) for uuid in offered if uuid in there}
        ours = await self._our_pids()  # After the lists: whoever is on one and ours is known by now.
        for gpu_uuid in offered:
            look = looks.get(gpu_uuid)
            if look is None:
                self._report(GpuGone(gpu_uuid=gpu_uuid))
            elif isinstance(look, str):
                self._report(GpuMeasured(gpu_uuid=gpu_uuid, problem=look))
            else:
                self._report(_measured(there[gpu_uuid], look, ours))
        if there.keys() - set(offered):
            await self._welcome(there.keys() - set(offered))

    async def _welcome(self, gpu_uuids: Collection[str]) -> None:
        try:
            offers = await self._probe()
        except DeviceError as error:
            log.warning("a GPU is back and cannot be probed yet", extra={"reason": str(error)})
            return
        for offer in offers:
            if offer.gpu_uuid in gpu_uuids:
                self._report(GpuBack(gpu=offer))

    async def _look_at(self, gpu: GpuDescription) -> _Look | str | None:
        """What the driver told; why it told nothing; None: the GPU is gone."""
        try:
            return await self._ask(partial(_look, self._inventory, gpu.uuid))
        except (DeviceLost, NotFound):
            return None
        except DeviceError as error:
            return str(error)

    async def _ask(self, question: Callable[[], T]) -> T:
        """In a worker thread. Raises `DeviceError`; also when there is no answer in time."""
        with anyio.move_on_after(self._answer_s):
            return await anyio.to_thread.run_sync(question, abandon_on_cancel=True)
        raise DeviceError(call="NVML", code="NO_ANSWER", detail=f"within {self._answer_s:g} s")

    # --- Error reports ------------------------------------------------------------------------------------------------

    async def _wait_for_faults(self) -> None:
        wait = partial(self._inventory.faults, wait_s=FAULT_WAIT_S)
        while True:
            try:
                faults: tuple[GpuFault, ...] = await anyio.to_thread.run_sync(wait, abandon_on_cancel=True)
            except NotSupported as error:
                log.warning("this driver reports no errors; GPUs are only measured", extra={"reason": str(error)})
                return
            except DeviceError as error:
                log.warning("error reports are not to be had now", extra={"reason": str(error)})
                await anyio.sleep(FAULT_RETRY_S)
                continue
            for fault in faults:
                self._report(GpuFaultSeen(gpu_uuid=fault.gpu_uuid, code=fault.xid))


def _look(inventory: Inventory, gpu_uuid: str) -> _Look:
    return _Look(
        memory=inventory.memory(gpu_uuid),
        by_pid=inventory.process_bytes(gpu_uuid),
        utilization_fraction=inventory.utilization_fraction(gpu_uuid),
        condition=inventory.condition(gpu_uuid),
    )


def _measured(gpu: GpuDescription, look: _Look, ours: Collection[int]) -> GpuMeasured:
    used_bytes = max(0, look.memory.used_bytes - gpu.reserved_bytes)
    return GpuMeasured(
        gpu_uuid=gpu.uuid,
        used_bytes=used_bytes,
        foreign_bytes=foreign_bytes(look.by_pid, ours, used_bytes=used_bytes),
        utilization_fraction=look.utilization_fraction,
        temperature_c=look.condition.temperature_c,
        is_too_hot=look.condition.is_too_hot,
        ecc_error_count=look.condition.ecc_error_count,
    )


def foreign_bytes(
    by_pid: Mapping[int, int | None],
    ours: Collection[int],
    *,
    used_bytes: int,
    is_alive: Callable[[int], bool] = is_there,
) -> int | None:
    """What processes that are not ours use; `used_bytes` is by everybody. None: it cannot be told.

    A process that has ended since it was listed uses nothing. Where the driver does not say what a stranger uses, it is
    what is left of the whole.
    """
    strangers = {pid: size for pid, size in by_pid.items() if pid not in ours and is_alive(pid)}
    if all(size is not None for size in strangers.values()):
        return sum(size or 0 for size in strangers.values())
    known = [size for pid, size in by_pid.items() if pid in ours]
    if any(size is None for size in known):
        return None
    return max(0, used_bytes - sum(size or 0 for size in known))

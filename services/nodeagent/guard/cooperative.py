"""Backends `cooperative` and `watched`: the engine keeps to a budget, or nothing does; the watchdog looks on at both.

What engine obeys which budget is data (`services.nodeagent.grades`). The budget is given at the start, as an argument
of the engine; `Budget` is how it is changed while the engine runs.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import anyio.to_thread

from devices.api import DeviceError, GpuDescription, Inventory
from schemas.deployments import IsolationGrade
from services.nodeagent.guard.api import Share, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetAnswer:
    """What became of a new budget."""

    is_applied: bool
    """False: put off while what is above the new budget is in use; ask again with the same revision."""
    held_bytes: int | None
    """On each GPU, by the engine's own account; None: it does not say."""


class Budget(Protocol):
    """An engine's own limit, for those that have one: ``POST /sublet/budget`` of ours, kvcached's limit of others.

    An implementation keeps two rules, which kvcached's revisioned limit has and ours has by waiting. A budget with an
    older `revision` than one that was accepted changes nothing. One below what is in use is not an error and drops
    nothing that is in use: the engine takes no more, frees what it can, and says that it is not applied yet.
    """

    async def set(self, endpoint: str, *, memory_bytes: int, revision: int) -> BudgetAnswer: ...


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

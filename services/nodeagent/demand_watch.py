"""Asks the engines that may have more than their request how full their caches are, again and again."""

from collections.abc import Callable

import anyio

from kit.outcomes import Input
from services.nodeagent.bursting import may_burst
from services.nodeagent.engine_client import EngineClient, EngineProblem
from services.nodeagent.inputs import LoadMeasured
from services.nodeagent.state import NodeState, Replica


class DemandWatch:
    """One host's. What an engine does not tell is not reported: nothing is decided by it."""

    def __init__(
        self,
        engines: EngineClient,
        *,
        every_s: float,
        state: Callable[[], NodeState | None],
        report: Callable[[Input], None],
    ) -> None:
        self._engines = engines
        self._every_s = every_s
        self._state = state
        self._report = report

    async def run(self) -> None:
        """For ever."""
        while self._every_s > 0:
            await anyio.sleep(self._every_s)
            await self.look()

    async def look(self) -> None:
        """Once at each, all at the same time."""
        state = self._state()
        if state is None:
            return
        async with anyio.create_task_group() as looks:
            for replica in state.replicas.values():
                if may_burst(replica):
                    looks.start_soon(self._look_at, replica)

    async def _look_at(self, replica: Replica) -> None:
        try:
            load = await self._engines.load(replica.endpoint, replica.proposal.deployment.engine.kind)
        except EngineProblem:
            return  # Whether it is well is another's question.
        if load is not None:
            self._report(
                LoadMeasured(
                    replica_id=replica.proposal.replica_id,
                    lease_epoch=replica.lease_epoch,
                    kv_used_fraction=load.kv_used_fraction,
                    waiting_count=load.waiting_count,
                )
            )

"""The watchdog: measures each replica all the time, whatever the backend, and stops who is held by nothing else."""

import logging
import time
from collections.abc import Callable, Mapping

import anyio
import anyio.to_thread

from devices.api import DeviceError
from kit.outcomes import Input
from schemas.holders import EngineView
from services.nodeagent.guard.enforcing import Guard
from services.nodeagent.guard.owners import owners_of
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.overuse import Allowed, Judge, Measured, allowed_in, larger_of
from services.nodeagent.runtimes.api import Runtime, RuntimeProblem
from services.nodeagent.runtimes.docker import Containers
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.state import NodeState

log = logging.getLogger("nodeagent")


class Watchdog:
    """Never stops a neighbour: only the very engine whose own bytes were measured beyond its own grant."""

    def __init__(
        self,
        settings: NodeAgentSettings,
        *,
        guard: Guard,
        holder: HolderClient,
        containers: Containers | None = None,
        state: Callable[[], NodeState | None],
        report: Callable[[Input], None],
    ) -> None:
        self._settings = settings
        self._guard = guard
        self._inventory = guard.inventory
        self._accounts = guard.accounts
        self._holder = holder
        self._containers = containers
        self._runtimes: dict[str, Runtime] = {}
        self._state = state
        self._report = report
        self._judge = Judge(grace_s=settings.overuse_grace_s)
        self._blind: frozenset[tuple[str, int, str]] = frozenset()
        self._is_away = False

    async def run(self) -> None:
        """For ever; until it is cancelled."""
        async with anyio.create_task_group() as stops:
            while True:
                await anyio.sleep(self._settings.watch_s)
                try:
                    for allowed in await self.look():
                        stops.start_soon(self.stop, allowed)
                    self._is_away = False
                except (RuntimeProblem, DeviceError) as problem:
                    if not self._is_away:
                        log.warning("nothing is watched", extra={"reason": str(problem)})
                    self._is_away = True

    async def look(self) -> tuple[Allowed, ...]:
        """Measure once, tell what is beyond; whom to stop. Raises `RuntimeProblem`, `DeviceError`: nothing was seen."""
        state = self._state()
        if state is None:
            return ()
        before = allowed_in(state)
        if not before:
            return ()
        engines = await self._running(before)
        lent = await self._lent()
        gpu_uuids = sorted({allowed.gpu_uuid for allowed in before.values()})
        used = await anyio.to_thread.run_sync(self._used, gpu_uuids, engines)
        state = self._state()
        after = allowed_in(state) if state is not None else {}
        measured = [
            Measured(allowed=allowed, used_bytes=_sum(used[allowed.gpu_uuid].get(allowed.replica_id), allowed, lent))
            for allowed in larger_of(before, after)
            if allowed.replica_id in engines and engines[allowed.replica_id].lease_epoch == allowed.lease_epoch
        ]
        judgement = self._judge.judge(measured, now_s=time.monotonic())
        for report in judgement.reports:
            log.warning(
                "overuse",
                extra={
                    "replica": report.replica_id, "gpu": report.gpu_uuid, "used_bytes": report.used_bytes,
                    "granted_bytes": report.granted_bytes, "is_stopped": report.is_stopped,
                },
            )  # fmt: skip
            self._report(report)
        self._tell_blind(judgement.blind)
        return judgement.stops

    async def _running(self, allowed: Mapping[tuple[str, int, str], Allowed]) -> dict[str, EngineView]:
        """The holder's engines, and containers where the holder does not have them all."""
        self._runtimes = {}
        engines = {}
        for engine in (await self._holder.view()).engines:
            engines[engine.replica_id] = engine
            self._runtimes[engine.replica_id] = self._holder
        if self._containers is not None and any(one.replica_id not in engines for one in allowed.values()):
            for engine in await self._containers.views():
                engines.setdefault(engine.replica_id, engine)
                self._runtimes.setdefault(engine.replica_id, self._containers)
        return engines

    def _used(self, gpu_uuids: list[str], engines: Mapping[str, EngineView]) -> dict[str, dict[str, int | None]]:
        """{gpu: {replica: bytes}}; a replica without a listed process is left out, one without a number is None."""
        found: dict[str, dict[str, int | None]] = {}
        for gpu_uuid in gpu_uuids:
            listed = self._inventory.process_bytes(gpu_uuid)
            owners = owners_of(listed, engines.values())
            of_gpu: dict[str, int | None] = {}
            for pid, replica_id in owners.items():
                size, known = listed[pid], of_gpu.get(replica_id, 0)
                of_gpu[replica_id] = None if size is None or known is None else known + size
            found[gpu_uuid] = of_gpu
        return found

    async def _lent(self) -> Mapping[tuple[str, str], int]:
        """What the memory broker has lent, by replica and GPU."""
        view = await self._accounts.look() if self._accounts is not None else None
        if view is None:
            return {}
        return {
            (account.replica_id, gpu_uuid): size
            for account in view.accounts
            for gpu_uuid, size in account.held_bytes.items()
        }

    def _tell_blind(self, blind: frozenset[tuple[str, int, str]]) -> None:
        """Once for each that cannot be measured any more."""
        for replica_id, _, gpu_uuid in sorted(blind - self._blind):
            log.info("not measured", extra={"replica": replica_id, "gpu": gpu_uuid})
        self._blind = blind

    async def stop(self, offender: Allowed) -> None:
        """Its end is noticed, told and followed up by whoever waits for it."""
        try:
            runtime = self._runtimes.get(offender.replica_id, self._holder)
            engine = await runtime.engine(offender.replica_id)
            if engine is not None and engine.lease_epoch == offender.lease_epoch:
                await self._guard.drain(engine)
            await runtime.stop(
                offender.replica_id, lease_epoch=offender.lease_epoch, grace_s=self._settings.stop_grace_s
            )
        except RuntimeProblem as problem:
            log.warning("offender not stopped", extra={"replica": offender.replica_id, "reason": str(problem)})


def _sum(own_bytes: int | None, allowed: Allowed, lent: Mapping[tuple[str, str], int]) -> int | None:
    """Its own and what it was lent; without a number of its own, nothing is known."""
    return None if own_bytes is None else own_bytes + lent.get((allowed.replica_id, allowed.gpu_uuid), 0)

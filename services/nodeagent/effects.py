"""Carries the node agent's effects out, against its holder, its engines and its GPUs.

Each is safe to begin again at any point: that is how a restarted agent adopts what runs.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup

from devices.api import DeviceError
from kit.machine import kept_machine_id
from kit.outcomes import Effect, Input
from kit.telemetry import Tracer
from schemas.holders import EngineView
from schemas.placement import ReplicaProposal
from schemas.units import MiB
from services.nodeagent.engine_client import EngineClient, EngineProblem
from services.nodeagent.guard import Guard, NotEnforced
from services.nodeagent.holder_client import HolderClient, HolderProblem
from services.nodeagent.inputs import (
    AdoptEngine,
    EngineEffect,
    EngineLost,
    EngineNotWoken,
    EngineParked,
    EngineStarted,
    EngineStayed,
    EngineStopped,
    EngineWoken,
    NodeProbed,
    ParkEngine,
    ProbeNode,
    StartEngine,
    StopEngine,
    WakeEngine,
)
from services.nodeagent.launch import engine_start
from services.nodeagent.settings import NodeAgentSettings

WATCH_S: Final = 30.0
"""One long poll for an engine's end."""
HOLDER_RETRY_S: Final = 0.5
UNKNOWN: Final = 404
ANOTHER_EPOCH: Final = 409
FREED_POLL_S: Final = 0.01
FREED_DEADLINE_S: Final = 5.0
"""The driver's account follows an unmap within milliseconds; longer means that the bytes are not free."""
RESIDUE_SLACK_BYTES: Final = 64 * MiB
"""Between an engine's own account and the driver's: both count the context, the driver its rounding too."""
ENGINE_ENVIRONMENT: Final = ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "HOME", "LANG")
ENGINE_ENVIRONMENT_PREFIXES: Final = ("SOFTGPU_", "OTEL_")
log = logging.getLogger("nodeagent")


class Gone(Exception):
    """The engine of this lease does not run any more."""


class NodeEffects:
    """One host's hands."""

    def __init__(
        self,
        settings: NodeAgentSettings,
        *,
        guard: Guard,
        holder: HolderClient,
        engines: EngineClient,
        tracer: Tracer,
        watchers: TaskGroup,
        report: Callable[[Input], None],
    ) -> None:
        self._settings = settings
        self._guard = guard
        self._holder = holder
        self._engines = engines
        self._tracer = tracer
        self._watchers = watchers
        self._report = report
        self._watched: set[tuple[str, int]] = set()

    async def perform(self, effect: Effect, traceparent: str) -> Input | None:
        """The result; an engine that is gone is a result too. Waits for the holder as long as it is away."""
        work: dict[type[Effect], Callable[..., Awaitable[Input | None]]] = {
            StartEngine: self._start,
            ParkEngine: self._park,
            WakeEngine: self._wake,
            StopEngine: self._stop,
            AdoptEngine: self._adopt,
        }
        while True:
            try:
                if isinstance(effect, ProbeNode):
                    return await self._probe()
                assert isinstance(effect, EngineEffect), effect
                return await work[type(effect)](effect, traceparent)
            except HolderProblem as problem:
                log.warning("holder problem", extra={"reason": str(problem), "effect": type(effect).__name__})
                await anyio.sleep(HOLDER_RETRY_S)
            except Gone as gone:
                assert isinstance(effect, EngineEffect), effect
                return await self._lost(effect, str(gone))

    # --- The node -----------------------------------------------------------------------------------------------------

    async def _probe(self) -> NodeProbed:
        view = await self._holder.view()
        pids = frozenset(engine.pid for engine in view.engines) | {os.getpid()}
        offers = await self._guard.offers(self._settings, our_pids=pids)
        is_software = any(offer.is_software for offer in offers)
        budget_bytes = self._settings.host_budget_bytes or host_bytes("MemAvailable") // 2
        cpu_count, memory_bytes = os.cpu_count(), host_bytes("MemTotal")
        return NodeProbed(
            machine_id=kept_machine_id(Path(self._settings.state_dir)),
            gpus=offers,
            host_budget_bytes=budget_bytes,
            holder_url=self._settings.holder_url,
            label="software GPU" if is_software else "real GPU",
            cpu_millicores=None if cpu_count is None else 1000 * cpu_count,
            memory_bytes=_beside_budget(memory_bytes, budget_bytes) if memory_bytes else None,
        )

    # --- Engines ------------------------------------------------------------------------------------------------------

    async def _start(self, effect: StartEngine, traceparent: str) -> Input:
        began_s = time.monotonic()
        replica = effect.replica
        wish = engine_start(
            replica,
            lease_epoch=effect.lease_epoch,
            settings=self._settings,
            python=self._settings.engine_python or sys.executable,
            environment=engine_environment(),
        )
        await self._end_older(effect)
        engine = await self._holder.start(wish)
        try:
            enforced_bytes = await self._limit(replica, engine, _requests(replica))
        except (NotEnforced, DeviceError) as error:
            raise Gone(f"its share cannot be enforced: {error}") from error
        if engine.is_gated:
            await self._holder.open_gate(replica.replica_id, lease_epoch=effect.lease_epoch)
        endpoint = self._endpoint(engine)
        with self._tracer.span("engine load", parent=traceparent):
            await self._until_ready(effect, endpoint)
        with self._tracer.span("engine verify", parent=traceparent):
            await self._verify(effect, endpoint)
        await self._holder.open_route(replica.replica_id, endpoint)
        self._watch(effect)
        return EngineStarted(
            replica_id=replica.replica_id,
            lease_epoch=effect.lease_epoch,
            endpoint=endpoint,
            start_s=time.monotonic() - began_s,
            enforced_bytes=enforced_bytes,
        )

    async def _until_ready(self, effect: EngineEffect, endpoint: str) -> None:
        """Ready, or `Gone` when it fails, ends, or takes too long."""
        problem = ""
        async with anyio.create_task_group() as tg:

            async def watch_end() -> None:
                nonlocal problem
                while not problem:
                    try:
                        reason = await self._end_of(effect.replica.replica_id, effect.lease_epoch)
                        problem = f"while loading: {reason}" if reason else ""
                    except HolderProblem as away:
                        log.warning("holder problem", extra={"reason": str(away), "effect": "StartEngine"})
                        await anyio.sleep(HOLDER_RETRY_S)
                tg.cancel_scope.cancel()

            async def watch_ready() -> None:
                nonlocal problem
                with anyio.move_on_after(self._settings.start_deadline_s) as scope:
                    try:
                        await self._engines.wait_until_ready(endpoint)
                    except EngineProblem as error:
                        problem = str(error)
                if scope.cancelled_caught:
                    problem = f"not ready after {self._settings.start_deadline_s:.0f} s"
                tg.cancel_scope.cancel()

            tg.start_soon(watch_end)
            tg.start_soon(watch_ready)
        if problem:
            raise Gone(problem)

    async def _verify(self, effect: EngineEffect, endpoint: str) -> None:
        deployment = effect.replica.deployment
        try:
            await self._engines.verify(
                endpoint, deployment.name, deployment.kind, timeout_s=self._settings.wake_deadline_s
            )
        except EngineProblem as error:
            raise Gone(f"it does not give a token: {error}") from error

    async def _park(self, effect: ParkEngine, traceparent: str) -> Input:
        engine = await self._running(effect)
        endpoint = self._endpoint(engine)
        replica_id = effect.replica.replica_id
        began_s = time.monotonic()
        with self._tracer.span("drain", parent=traceparent):
            await self._holder.close_route(replica_id)
            is_idle = await self._idle(effect, endpoint, timeout_s=effect.drain_s)
        if not is_idle:
            await self._holder.open_route(replica_id, endpoint)
            reason = f"still busy after {effect.drain_s:.0f} s"
            return EngineStayed(replica_id=replica_id, lease_epoch=effect.lease_epoch, reason=reason)
        drained_s = time.monotonic()
        with self._tracer.span("sleep", parent=traceparent):
            try:
                slept = await self._engines.sleep(endpoint, timeout_s=self._settings.wake_deadline_s)
            except EngineProblem as error:
                raise Gone(f"it did not go to sleep: {error}") from error
            residues = await self._proven_residues(effect, engine)
        await self._limit(effect.replica, engine, residues)
        return EngineParked(
            replica_id=replica_id,
            lease_epoch=effect.lease_epoch,
            residues=residues,
            host_bytes=effect.replica.deployment.engine.weights_bytes,
            copied_bytes=slept.copied_bytes,
            park_s=time.monotonic() - drained_s,
            drain_s=drained_s - began_s,
            reason=effect.reason,
        )

    async def _idle(self, effect: EngineEffect, endpoint: str, *, timeout_s: float) -> bool:
        if effect.replica.deployment.kind == "training":
            return True
        try:
            return await self._engines.wait_until_idle(endpoint, timeout_s=timeout_s)
        except EngineProblem as error:
            raise Gone(str(error)) from error

    async def _limit(self, replica: ReplicaProposal, engine: EngineView, sizes: Sequence[int]) -> int:
        """Allow it so much on each of its GPUs, by shard, and give the sum as read back; see `Guard.limit`."""
        enforced = [
            await self._guard.limit(share.gpu_uuid, engine.namespace, granted_bytes=size)
            for share, size in zip(replica.shares, sizes, strict=True)
        ]
        return sum(enforced)

    async def _proven_residues(self, effect: EngineEffect, engine: EngineView) -> tuple[int, ...]:
        """What the driver says is left on each of its GPUs, once that is no more than a parked engine may keep there.

        That is what the engine says it holds, which is one number for all its GPUs and is taken as spread evenly, or
        half of its share when it does not say. Raises `Gone` when more stays.
        """
        shares = effect.replica.shares
        try:
            told_bytes = (await self._engines.state(self._endpoint(engine))).held_bytes
        except EngineProblem as error:
            raise Gone(str(error)) from error
        used: list[int] = []
        used_bytes: int | None = None
        with anyio.move_on_after(FREED_DEADLINE_S):
            for share in shares:
                allowed_bytes = -(-told_bytes // len(shares)) + RESIDUE_SLACK_BYTES
                if not told_bytes:
                    allowed_bytes = share.request_bytes // 2
                while True:
                    used_bytes = await self._guard.used_bytes(share.gpu_uuid, engine.namespace, engine.pid)
                    if used_bytes is not None and used_bytes <= allowed_bytes:
                        used.append(max(used_bytes, MiB))
                        break
                    await anyio.sleep(FREED_POLL_S)
            return tuple(used)
        raise Gone(f"its bytes on {shares[len(used)].gpu_uuid} are not proven free after its park ({used_bytes} used)")

    async def _wake(self, effect: WakeEngine, traceparent: str) -> Input:
        engine = await self._running(effect)
        endpoint = self._endpoint(engine)
        replica_id = effect.replica.replica_id
        began_s = time.monotonic()
        await self._limit(effect.replica, engine, _requests(effect.replica))
        with self._tracer.span("restore", parent=traceparent) as span:
            try:
                woke = await self._engines.wake(endpoint, timeout_s=self._settings.wake_deadline_s)
            except EngineProblem as error:
                return await self._rolled_back(effect, engine, error)
            span.set("sublet.copied_bytes", woke.copied_bytes)
        restored_s = time.monotonic()
        with self._tracer.span("verify", parent=traceparent):
            await self._verify(effect, endpoint)
        await self._holder.open_route(replica_id, endpoint)
        return EngineWoken(
            replica_id=replica_id,
            lease_epoch=effect.lease_epoch,
            endpoint=endpoint,
            copied_bytes=woke.copied_bytes,
            restore_s=restored_s - began_s,
            verify_s=time.monotonic() - restored_s,
        )

    async def _rolled_back(self, effect: WakeEngine, engine: EngineView, error: EngineProblem) -> Input:
        """A wake that the engine could not do: parked as before if it says so, else lost."""
        try:
            state = await self._engines.state(self._endpoint(engine))
        except EngineProblem:
            raise Gone(str(error)) from error
        if state.state != "asleep":
            raise Gone(f"{error}; it is {state.state} now") from error
        await self._limit(effect.replica, engine, await self._proven_residues(effect, engine))
        return EngineNotWoken(
            replica_id=effect.replica.replica_id,
            lease_epoch=effect.lease_epoch,
            reason=str(error),
            short_by_bytes=error.short_by_bytes,
        )

    async def _stop(self, effect: StopEngine, traceparent: str) -> Input:
        stopped = EngineStopped(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch)
        engine = await self._holder.engine(effect.replica.replica_id)
        if engine is None or engine.lease_epoch != effect.lease_epoch:
            return stopped
        if engine.is_alive and not engine.is_gated:
            await self._holder.close_route(effect.replica.replica_id)
            with contextlib.suppress(Gone):
                await self._idle(effect, self._endpoint(engine), timeout_s=effect.drain_s)
        await self._end(effect, engine)
        return stopped

    async def _adopt(self, effect: AdoptEngine, traceparent: str) -> Input | None:
        """Whether it is as its lease says; what differs is put right, what is gone is told."""
        engine = await self._running(effect)
        endpoint = self._endpoint(engine)
        try:
            state = await self._engines.state(endpoint)
        except EngineProblem as error:
            raise Gone(str(error)) from error
        if effect.should_be_parked and state.state == "resident":
            await self._holder.close_route(effect.replica.replica_id)
            await self._engines.sleep(endpoint, timeout_s=self._settings.wake_deadline_s)
        elif not effect.should_be_parked:
            if state.state == "asleep":
                await self._engines.wake(endpoint, timeout_s=self._settings.wake_deadline_s)
            await self._holder.open_route(effect.replica.replica_id, endpoint)
        self._watch(effect)
        return None

    # --- Ends ---------------------------------------------------------------------------------------------------------

    def _endpoint(self, engine: EngineView) -> str:
        return f"http://{self._settings.engine_host}:{engine.port}"

    async def _running(self, effect: EngineEffect) -> EngineView:
        engine = await self._holder.engine(effect.replica.replica_id)
        if engine is None or engine.lease_epoch != effect.lease_epoch:
            raise Gone("the holder does not know it")
        if not engine.is_alive:
            raise Gone(f"it ended with code {engine.exit_code}: {log_line(engine)}")
        return engine

    async def _lost(self, effect: EngineEffect, reason: str) -> EngineLost:
        """Make sure that nothing is left of it, then tell."""
        engine = await self._holder.engine(effect.replica.replica_id)
        if engine is not None and engine.lease_epoch == effect.lease_epoch:
            await self._end(effect, engine)
        return EngineLost(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason=reason)

    async def _end_older(self, effect: EngineEffect) -> None:
        """An engine of an earlier lease of this replica must be gone before the new one starts."""
        engine = await self._holder.engine(effect.replica.replica_id)
        if engine is not None and engine.lease_epoch != effect.lease_epoch:
            await self._end(effect, engine)

    async def _end(self, effect: EngineEffect, engine: EngineView) -> None:
        grace_s = self._settings.stop_grace_s
        await self._holder.stop(engine.replica_id, lease_epoch=engine.lease_epoch, grace_s=grace_s)
        for share in effect.replica.shares:
            await self._guard.clear(share.gpu_uuid, engine.namespace)
        await self._holder.forget(engine.replica_id, lease_epoch=engine.lease_epoch)

    def _watch(self, effect: EngineEffect) -> None:
        """Tell when the engine ends by itself; once per engine."""
        key = (effect.replica.replica_id, effect.lease_epoch)
        if key not in self._watched:
            self._watched.add(key)
            self._watchers.start_soon(self._watch_end, effect)

    async def _end_of(self, replica_id: str, lease_epoch: int) -> str | None:
        """Why it does not run any more; None while it does, after one long poll. A restarted holder knows no engine."""
        try:
            view = await self._holder.wait_for_exit(replica_id, lease_epoch=lease_epoch, timeout_s=WATCH_S)
        except HolderProblem as problem:
            if problem.status == UNKNOWN:
                return "the holder does not know it any more"
            raise
        return None if view.is_alive else f"it ended with code {view.exit_code}: {log_line(view)}"

    async def _watch_end(self, effect: EngineEffect) -> None:
        replica_id, lease_epoch = effect.replica.replica_id, effect.lease_epoch
        while True:
            try:
                reason = await self._end_of(replica_id, lease_epoch)
                if reason is not None:
                    self._report(await self._lost(effect, reason))
                    break
            except HolderProblem as problem:
                if problem.status == ANOTHER_EPOCH:
                    break
                await anyio.sleep(HOLDER_RETRY_S)
        self._watched.discard((replica_id, lease_epoch))


def _requests(replica: ReplicaProposal) -> tuple[int, ...]:
    return tuple(share.request_bytes for share in replica.shares)


def log_line(engine: EngineView) -> str:
    """The last line of its log that says something, for the reason of its end."""
    try:
        lines = Path(engine.log_path).read_text(errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "its log is empty")


def engine_environment() -> dict[str, str]:
    """What engines inherit: nothing that could be a secret."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in ENGINE_ENVIRONMENT or name.startswith(ENGINE_ENVIRONMENT_PREFIXES)
    }


def _beside_budget(memory_bytes: int, budget_bytes: int) -> int:
    """What replicas may ask of the host's memory. A budget beyond what there is takes none: its weights are phantom."""
    return memory_bytes - budget_bytes if budget_bytes <= memory_bytes else memory_bytes


def host_bytes(name: str) -> int:
    """A line of the kernel's account of memory; 0 when it does not say.

    ``MemAvailable`` could be taken without swapping, as the kernel estimates it; ``MemTotal`` stays the same while
    engines come and go.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0

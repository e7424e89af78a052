"""A GPU host in virtual time: engines that hold bytes, take time, fail on demand; for the simulator only.

It checks what no decision may break: the bytes that engines really use never exceed what a GPU has.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from kit.outcomes import Effect, Input
from schemas.deployments import IsolationGrade
from schemas.nodes import GpuOffer
from schemas.placement import ReplicaProposal
from schemas.units import GB, MiB
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

CONTEXT_BYTES: Final = 500 * MiB
"""What an engine keeps on the device while it is parked."""
LINK_BYTES_PER_S: Final = 53 * GB


class Clock(Protocol):
    """What the host needs of the simulation."""

    @property
    def now_s(self) -> float: ...

    def after(self, delay_s: float, action: Callable[[], None]) -> None: ...


class _Phase(StrEnum):
    LOADING = "loading"
    RESIDENT = "resident"
    ASLEEP = "asleep"


@dataclass(slots=True)
class _Engine:
    replica: ReplicaProposal
    lease_epoch: int
    phase: _Phase
    busy_until_s: float

    @property
    def used_bytes(self) -> int:
        return CONTEXT_BYTES if self.phase is _Phase.ASLEEP else self.replica.shares[0].request_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFaults:
    """Chances per effect."""

    start_fails_fraction: float = 0.0
    park_stays_fraction: float = 0.0
    wake_fails_fraction: float = 0.0


class SimulatedHost:
    """The world of one node agent."""

    def __init__(
        self,
        clock: Clock,
        *,
        node: str,
        gpus: tuple[GpuOffer, ...],
        host_budget_bytes: int,
        seed: int,
        faults: HostFaults | None = None,
        cold_start_s: float = 10.0,
    ) -> None:
        self._clock = clock
        self._node = node
        self.gpus = gpus
        self._host_budget_bytes = host_budget_bytes
        self.random = random.Random(f"{seed}/{node}")  # Reproducible by design.
        self.faults = faults or HostFaults()
        self._cold_start_s = cold_start_s
        self.engines: dict[str, _Engine] = {}
        self.started_count = 0

    def perform(self, effect: Effect, done: Callable[[float, Input], None]) -> None:
        if isinstance(effect, ProbeNode):
            done(0.001, self._probed())
            return
        assert isinstance(effect, EngineEffect), effect
        {
            StartEngine: self._start,
            ParkEngine: self._park,
            WakeEngine: self._wake,
            StopEngine: self._stop,
            AdoptEngine: self._adopt,
        }[type(effect)](effect, done)

    def kill_engine(self, replica_id: str) -> EngineLost | None:
        """An engine dies by itself; the input that a living agent would get."""
        engine = self.engines.pop(replica_id, None)
        if engine is None:
            return None
        return EngineLost(replica_id=replica_id, lease_epoch=engine.lease_epoch, reason="killed")

    def check(self) -> None:
        """Engines never use more of a GPU than it offers."""
        for gpu in self.gpus:
            used_bytes = sum(
                e.used_bytes for e in self.engines.values() if e.replica.shares[0].gpu_uuid == gpu.gpu_uuid
            )
            assert used_bytes <= gpu.allocatable_bytes, f"{self._node}/{gpu.gpu_uuid} oversubscribed: {used_bytes}"

    # --- Effects ------------------------------------------------------------------------------------------------------

    def _probed(self) -> NodeProbed:
        return NodeProbed(
            machine_id=f"machine-{self._node}",
            gpus=self.gpus,
            host_budget_bytes=self._host_budget_bytes,
            holder_url=f"http://{self._node}:7070",
            label="simulated",
        )

    def _mine(self, effect: EngineEffect) -> _Engine | None:
        engine = self.engines.get(effect.replica.replica_id)
        return engine if engine is not None and engine.lease_epoch == effect.lease_epoch else None

    def _lost(self, effect: EngineEffect, reason: str) -> EngineLost:
        return EngineLost(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason=reason)

    def _copy_s(self, effect: EngineEffect) -> float:
        return effect.replica.deployment.engine.weights_bytes / LINK_BYTES_PER_S

    def _later(self, engine: _Engine, takes_s: float, action: Callable[[], None]) -> None:
        """When the engine has finished what it is at, and this too."""
        begin_s = max(self._clock.now_s, engine.busy_until_s)
        engine.busy_until_s = begin_s + takes_s
        self._clock.after(engine.busy_until_s - self._clock.now_s, action)

    def _start(self, effect: EngineEffect, done: Callable[[float, Input], None]) -> None:
        replica_id = effect.replica.replica_id
        engine = self._mine(effect)
        takes_s = 0.0
        if engine is None:
            assert replica_id not in self.engines, f"{replica_id} started beside an engine of an older lease"
            cold_s = effect.replica.deployment.engine.cold_start_s
            takes_s = (self._cold_start_s if cold_s is None else cold_s) + self._copy_s(effect)
            engine = _Engine(effect.replica, effect.lease_epoch, _Phase.LOADING, self._clock.now_s)
            self.engines[replica_id] = engine
            self.started_count += 1
            self.check()
        fails = self.random.random() < self.faults.start_fails_fraction

        def finish() -> None:
            if self._mine(effect) is not engine:
                done(0.0, self._lost(effect, "gone while starting"))
                return
            if fails:
                del self.engines[replica_id]
                done(0.0, self._lost(effect, "start failed"))
                return
            engine.phase = _Phase.RESIDENT
            started = EngineStarted(
                replica_id=replica_id,
                lease_epoch=effect.lease_epoch,
                endpoint=f"http://{self._node}/{replica_id}",
                start_s=takes_s,
                enforced_bytes=effect.replica.shares[0].request_bytes,
            )
            done(0.0, started)

        self._later(engine, takes_s, finish)

    def _park(self, effect: EngineEffect, done: Callable[[float, Input], None]) -> None:
        assert isinstance(effect, ParkEngine), effect
        engine = self._mine(effect)
        if engine is None:
            done(0.001, self._lost(effect, "gone before its park"))
            return
        drain_s = self.random.uniform(0.0, 0.2)
        stays = engine.phase is _Phase.RESIDENT and self.random.random() < self.faults.park_stays_fraction

        def finish() -> None:
            if self._mine(effect) is not engine:
                done(0.0, self._lost(effect, "gone while parking"))
                return
            if stays:
                done(
                    0.0,
                    EngineStayed(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason="busy"),
                )
                return
            engine.phase = _Phase.ASLEEP
            parked = EngineParked(
                replica_id=effect.replica.replica_id,
                lease_epoch=effect.lease_epoch,
                residue_bytes=CONTEXT_BYTES,
                host_bytes=effect.replica.deployment.engine.weights_bytes,
                copied_bytes=0,
                park_s=0.02,
                drain_s=drain_s,
                reason=effect.reason,
            )
            done(0.0, parked)

        self._later(engine, drain_s + 0.02, finish)

    def _wake(self, effect: EngineEffect, done: Callable[[float, Input], None]) -> None:
        engine = self._mine(effect)
        if engine is None:
            done(0.001, self._lost(effect, "gone before its wake"))
            return
        fails = engine.phase is _Phase.ASLEEP and self.random.random() < self.faults.wake_fails_fraction
        if not fails:
            engine.phase = _Phase.LOADING if engine.phase is _Phase.ASLEEP else engine.phase
            self.check()

        def finish() -> None:
            if self._mine(effect) is not engine:
                done(0.0, self._lost(effect, "gone while waking"))
                return
            if fails:
                refused = EngineNotWoken(
                    replica_id=effect.replica.replica_id,
                    lease_epoch=effect.lease_epoch,
                    reason="restore failed",
                    short_by_bytes=0,
                )
                done(0.0, refused)
                return
            engine.phase = _Phase.RESIDENT
            woken = EngineWoken(
                replica_id=effect.replica.replica_id,
                lease_epoch=effect.lease_epoch,
                endpoint=f"http://{self._node}/{effect.replica.replica_id}",
                copied_bytes=effect.replica.deployment.engine.weights_bytes,
                restore_s=self._copy_s(effect),
                verify_s=0.02,
            )
            done(0.0, woken)

        self._later(engine, self._copy_s(effect) + 0.05, finish)

    def _stop(self, effect: EngineEffect, done: Callable[[float, Input], None]) -> None:
        stopped = EngineStopped(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch)
        engine = self._mine(effect)
        if engine is None:
            done(0.001, stopped)
            return

        def finish() -> None:
            if self._mine(effect) is engine:
                del self.engines[effect.replica.replica_id]
            done(0.0, stopped)

        self._later(engine, 0.3, finish)

    def _adopt(self, effect: EngineEffect, done: Callable[[float, Input], None]) -> None:
        assert isinstance(effect, AdoptEngine), effect
        engine = self._mine(effect)
        if engine is None:
            done(0.005, self._lost(effect, "gone while the agent was away"))
            return
        expected = _Phase.ASLEEP if effect.should_be_parked else _Phase.RESIDENT
        assert engine.phase is expected, f"{effect.replica.replica_id} is {engine.phase}, its lease says {expected}"


def h100(index: int, *, node: str) -> GpuOffer:
    """One simulated H100 with 80 GB, as a node offers it."""
    return GpuOffer(
        gpu_uuid=f"GPU-{node}-{index}",
        index=index,
        name="NVIDIA H100 80GB HBM3",
        capacity_bytes=81_559 * MiB,
        reserve_bytes=2048 * MiB,
        grade=IsolationGrade.DRIVER,
        grade_reason="simulated",
        link_bytes_per_s=LINK_BYTES_PER_S,
        is_software=True,
    )

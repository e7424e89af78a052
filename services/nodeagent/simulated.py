"""A GPU host in virtual time: engines that hold bytes, take time, fail on demand; for the simulator only.

It checks what no decision may break: the bytes that engines really use never exceed what a GPU has, and no engine is
put to sleep with a request in flight.
"""

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from msgspec.structs import replace

from kit.outcomes import Effect, Input
from schemas.nodes import GpuOffer
from services.nodeagent.gpu_inputs import TryGpu
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
    EvictEngine,
    GiveGrace,
    LookAtEngine,
    NodeProbed,
    ParkEngine,
    ProbeNode,
    ResizeEngine,
    StartEngine,
    StopEngine,
    WakeEngine,
    hung,
)
from services.nodeagent.simulated_engine import Caller, Clock, Done, Engine, Phase, Routes
from services.nodeagent.simulated_gpus import SimulatedEyes, copy_s
from services.nodeagent.simulated_look import ANSWER_S, look, silent
from services.nodeagent.simulated_resizing import HostFaults, adopt, beyond, evict, resize

HANGING: Final = (ParkEngine, WakeEngine, StopEngine)  # A start has ten minutes.
NO_ANSWER_S: Final = 30.0
"""An engine that does not answer so long is given up (`NodeAgentSettings.wake_deadline_s`)."""
UNPROVEN_S: Final = 5.0
"""How long an agent waits for proof that a parked engine's bytes are free."""


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
        routes: Routes | None = None,
    ) -> None:
        """`routes`: the holder's table where gateways route; without it a drain takes a moment drawn by chance."""
        self.clock = clock
        self.node = node
        self.gpus = gpus
        self._all_gpus = gpus
        self._host_budget_bytes = host_budget_bytes
        self.random = random.Random(f"{seed}/{node}")  # Reproducible by design.
        self.faults = faults or HostFaults()
        self._cold_start_s = cold_start_s
        self.routes = routes
        self.engines: dict[str, Engine] = {}
        self.started_count = 0
        self.agent_life: Callable[[], int] = lambda: 0
        """Changes when the agent dies: what it would have done next is then not done."""
        self.is_up = True
        self.silent_until_s = 0.0
        """Until then NVML says nothing."""
        self.short_until_s = 0.0
        """Until then there is no host memory for weights."""
        self.foreign_bytes: dict[str, int] = {}
        self.eyes = SimulatedEyes(self, clock, seed=seed)
        self.held_by: Callable[[Engine], Mapping[str, int] | None] = lambda _: None
        """By GPU, what the agent's account holds for this engine's lease now; None where it knows none."""

    def perform(self, effect: Effect, done: Callable[[float, Input], None]) -> None:
        if not self.is_up:
            return
        life = self.agent_life()
        self._begin(effect, Done(done, lambda: self.agent_life() == life))

    def _begin(self, effect: Effect, done: Done) -> None:
        if isinstance(effect, ProbeNode):
            self._probe(done)
            return
        if isinstance(effect, TryGpu):
            self.eyes.try_gpu(effect, done)
            return
        if isinstance(effect, GiveGrace):
            done(effect.grace_s, hung(effect))
            return
        assert isinstance(effect, EngineEffect), effect
        work: dict[type[Effect], Callable[[EngineEffect, Done], None]] = {
            StartEngine: self._start,
            ParkEngine: self._park,
            WakeEngine: self._wake,
            StopEngine: self._stop,
            AdoptEngine: self._adopt,
            ResizeEngine: partial(resize, self),
            EvictEngine: partial(evict, self),
            LookAtEngine: self._look,
        }
        work[type(effect)](effect, self._maybe_hung(effect, done))

    def _maybe_hung(self, effect: Effect, done: Done) -> Done:
        """What was begun goes on, and its agent never hears of it: a step that hangs."""
        hangs_fraction = self.faults.step_hangs_fraction if isinstance(effect, HANGING) else 0.0
        if not hangs_fraction or self.random.random() >= hangs_fraction:
            return done
        return Done(lambda *_: None, done.is_alive)

    def _look(self, effect: EngineEffect, done: Done) -> None:
        assert isinstance(effect, LookAtEngine), effect
        look(self, effect, tell=done, is_alive=done.is_alive)

    # --- What happens by itself ---------------------------------------------------------------------------------------

    def serve(self, replica_id: str, caller: Caller, *, takes_s: float) -> None:
        """A gateway's request, at the engine."""
        engine = self.engines.get(replica_id)
        if not self.is_up or engine is None or (engine.phase is Phase.LOADING and not engine.is_closed):
            caller.bounced("unreachable")
            return
        assert not (engine.is_closed and self.routes is not None), (
            f"a request came to {replica_id} after every gateway had given up its route"
        )
        if engine.phase is not Phase.RESIDENT:
            caller.bounced("asleep")
            return
        engine.serve(caller, takes_s=takes_s, clock=self.clock)

    def leave(self, replica_id: str, caller: Caller) -> None:
        """Whoever sent this request went away."""
        engine = self.engines.get(replica_id)
        if engine is not None:
            engine.leave(caller)

    def kill_engine(self, replica_id: str) -> EngineLost | None:
        """An engine dies by itself; the input that a living agent would get."""
        engine = self.engines.pop(replica_id, None)
        if engine is None:
            return None
        engine.die()
        if self.routes is not None:
            self.routes.forget(replica_id)
        return EngineLost(replica_id=replica_id, lease_epoch=engine.lease_epoch, reason="killed")

    def hang_engine(self, replica_id: str, *, lasts_s: float) -> bool:
        """Its port is open and nothing comes out."""
        engine = self.engines.get(replica_id)
        if engine is not None:
            engine.hung_until_s = max(engine.hung_until_s, self.clock.now_s + lasts_s)
        return engine is not None

    def lose_gpu(self, index: int) -> list[EngineLost]:
        """A GPU falls off the bus, and its engines die. The last one stays, so that something can go on."""
        if len(self.gpus) < 2:
            return []
        lost = self.gpus[index % len(self.gpus)]
        self.gpus = tuple(gpu for gpu in self.gpus if gpu is not lost)
        self.eyes.lose(lost.gpu_uuid)
        here = [replica_id for replica_id, e in self.engines.items() if lost.gpu_uuid in e.share_bytes]
        return [told for replica_id in here if (told := self.kill_engine(replica_id)) is not None]

    def find_gpus(self) -> bool:
        """All are back; whether one was away."""
        was_away = self.gpus != self._all_gpus
        self.gpus = self._all_gpus
        self.eyes.look_soon()
        return was_away

    def take_foreign(self, index: int, size_bytes: int) -> str:
        """A process that is not ours takes what is free, up to so much; the GPU's name."""
        gpu = self.gpus[index % len(self.gpus)]
        used_bytes = sum(engine.used_on(gpu.gpu_uuid) for engine in self.engines.values())
        free_bytes = gpu.allocatable_bytes - used_bytes - self.foreign_bytes.get(gpu.gpu_uuid, 0)
        taken_bytes = max(0, min(size_bytes, free_bytes))
        self.foreign_bytes[gpu.gpu_uuid] = self.foreign_bytes.get(gpu.gpu_uuid, 0) + taken_bytes
        self.eyes.look_soon()
        return gpu.gpu_uuid

    def free_foreign(self, gpu_uuid: str) -> None:
        """The process that is not ours is gone."""
        self.foreign_bytes.pop(gpu_uuid, None)
        self.eyes.look_soon()

    def fall_silent(self, *, until_s: float) -> None:
        """NVML says nothing until then."""
        self.silent_until_s = max(self.silent_until_s, until_s)
        self.eyes.look_soon()

    def lose_power(self) -> None:
        """The host is gone with all that ran on it."""
        self.is_up = False
        for replica_id in list(self.engines):
            self.kill_engine(replica_id)
        self.foreign_bytes.clear()

    def check(self) -> None:
        """Engines never use more of a GPU than it offers, and none more than its limit or its lease."""
        for gpu in self._all_gpus:
            used_bytes = sum(engine.used_on(gpu.gpu_uuid) for engine in self.engines.values())
            assert used_bytes <= gpu.allocatable_bytes, f"{self.node}/{gpu.gpu_uuid} oversubscribed: {used_bytes}"
        wrong = [told for engine in self.engines.values() if (told := beyond(engine, self.held_by(engine)))]
        assert not wrong, wrong[0]

    # --- Effects ------------------------------------------------------------------------------------------------------

    def _probe(self, done: Done) -> None:
        if self.clock.now_s < self.silent_until_s:
            self.clock.after(self.silent_until_s - self.clock.now_s, lambda: self._probe(done))
            return
        is_short = self.clock.now_s < self.short_until_s
        gpus = tuple(self.with_foreign(gpu) for gpu in self.gpus)
        probed = NodeProbed(
            machine_id=f"machine-{self.node}",
            gpus=gpus,
            host_budget_bytes=self._host_budget_bytes // (8 if is_short else 1),
            holder_url=f"http://{self.node}:7070",
            label="simulated",
        )
        done(0.001, probed)

    def with_foreign(self, gpu: GpuOffer) -> GpuOffer:
        """As it is offered now."""
        foreign_bytes = self.foreign_bytes.get(gpu.gpu_uuid, 0)
        return replace(gpu, foreign_bytes=foreign_bytes) if foreign_bytes else gpu

    def mine(self, effect: EngineEffect) -> Engine | None:
        engine = self.engines.get(effect.replica.replica_id)
        return engine if engine is not None and engine.lease_epoch == effect.lease_epoch else None

    def lost(self, effect: EngineEffect, reason: str) -> EngineLost:
        """Nothing is left of it."""
        if self.mine(effect) is not None:
            self.kill_engine(effect.replica.replica_id)
        return EngineLost(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason=reason)

    def _later(self, engine: Engine, takes_s: float, action: Callable[[], None]) -> None:
        """When the engine has finished what it is at, and this too."""
        begin_s = max(self.clock.now_s, engine.busy_until_s)
        engine.busy_until_s = begin_s + takes_s
        self.clock.after(engine.busy_until_s - self.clock.now_s, action)

    def has_room(self, engine: Engine) -> bool:
        """Whether the bytes that it wants now are there, on each of its GPUs, whatever the leases say."""
        offered = {gpu.gpu_uuid: gpu.allocatable_bytes for gpu in self.gpus}
        for gpu_uuid, share_bytes in engine.share_bytes.items():
            used_bytes = sum(other.used_on(gpu_uuid) for other in self.engines.values() if other is not engine)
            if used_bytes + share_bytes + self.foreign_bytes.get(gpu_uuid, 0) > offered.get(gpu_uuid, 0):
                return False
        return True

    def _answers_not(self, engine: Engine, effect: EngineEffect, done: Done) -> bool:
        """True for an engine that hangs: it is given up when it has not answered for long."""
        if engine.hung_until_s <= self.clock.now_s:
            return False
        silent_s = min(NO_ANSWER_S, engine.hung_until_s - self.clock.now_s)
        given_up_s = self.clock.now_s + NO_ANSWER_S

        def look() -> None:
            if not done.is_alive():
                return
            if engine.hung_until_s > self.clock.now_s and self.clock.now_s >= given_up_s:
                done(0.0, self.lost(effect, "it does not answer"))
            else:
                self._begin(effect, done)

        self.clock.after(silent_s, look)
        return True

    def _start(self, effect: EngineEffect, done: Done) -> None:
        replica_id = effect.replica.replica_id
        engine = self.mine(effect)
        takes_s = 0.0
        if engine is None:
            assert replica_id not in self.engines, f"{replica_id} started beside an engine of an older lease"
            cold_s = effect.replica.deployment.engine.cold_start_s
            takes_s = (self._cold_start_s if cold_s is None else cold_s) + copy_s(effect)
            engine = Engine(effect.replica, effect.lease_epoch, Phase.LOADING, self.clock.now_s)
            if not self.has_room(engine) and self._is_harmed(engine):
                done(0.01, EngineLost(replica_id=replica_id, lease_epoch=effect.lease_epoch, reason="out of memory"))
                return
            self.engines[replica_id] = engine
            self.started_count += 1
            self.check()
        fails = self.random.random() < self.faults.start_fails_fraction
        fails |= any(self.eyes.is_sick(gpu_uuid) for gpu_uuid in engine.share_bytes)

        def finish() -> None:
            if self.mine(effect) is not engine:
                done(0.0, self.lost(effect, "gone while starting"))
                return
            if fails:
                done(0.0, self.lost(effect, "start failed"))
                return
            engine.phase = Phase.RESIDENT
            started = EngineStarted(
                replica_id=replica_id,
                lease_epoch=effect.lease_epoch,
                endpoint=self.endpoint(effect),
                start_s=takes_s,
                enforced_bytes=sum(engine.share_bytes.values()),
            )
            self.open_route(effect, engine, done.is_alive)
            done(0.0, started)

        self._later(engine, takes_s, finish)

    def _is_harmed(self, engine: Engine) -> bool:
        """Whether somebody else than our leases is to blame for missing room: a lost GPU, a foreign process."""
        here = {gpu.gpu_uuid for gpu in self.gpus}
        return any(uuid not in here or self.foreign_bytes.get(uuid, 0) > 0 for uuid in engine.share_bytes)

    def endpoint(self, effect: EngineEffect) -> str:
        return f"http://{self.node}/{effect.replica.replica_id}/{effect.lease_epoch}"

    def open_route(self, effect: EngineEffect, engine: Engine, is_alive: Callable[[], bool]) -> None:
        if not is_alive():
            return
        engine.is_closed = False
        if self.routes is not None:
            self.routes.open(effect.replica.replica_id, self.endpoint(effect))

    def drain(self, effect: EngineEffect, engine: Engine, drain_s: float, then: Callable[[str], None]) -> None:
        """Close its route, wait until it has nothing in flight; `then` with ``idle``, or ``busy`` after too long."""
        if self.routes is None:
            self._later(engine, self.random.uniform(0.0, 0.2), lambda: then("idle"))
            return
        is_over = False

        def end(outcome: str) -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                then(outcome)

        def closed(outcome: str) -> None:
            if outcome != "closed":
                end("busy")
                return
            engine.is_closed = True
            if not engine.in_flight:
                end("idle")
                return
            engine.on_idle.append(lambda: end("idle"))
            self.clock.after(drain_s, lambda: end("busy"))

        self.routes.close(effect.replica.replica_id, closed)

    def _park(self, effect: EngineEffect, done: Done) -> None:
        assert isinstance(effect, ParkEngine), effect
        engine = self.mine(effect)
        if engine is None:
            done(0.001, self.lost(effect, "gone before its park"))
            return
        if self._answers_not(engine, effect, done):
            return
        began_s = self.clock.now_s
        stays = engine.phase is Phase.RESIDENT and self.random.random() < self.faults.park_stays_fraction

        def drained(outcome: str) -> None:
            if not done.is_alive():
                return
            if self.mine(effect) is not engine:
                done(0.0, self.lost(effect, "gone while parking"))
            elif stays or outcome != "idle":
                self.open_route(effect, engine, done.is_alive)
                stayed = EngineStayed(
                    replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason="still busy"
                )
                done(0.0, stayed)
            elif self.clock.now_s < self.short_until_s and engine.phase is not Phase.ASLEEP:
                done(0.5, self.lost(effect, "it did not go to sleep: no host memory"))
            else:
                self._later(engine, 0.02, lambda: self._asleep(effect, engine, done, began_s=began_s))

        self.drain(effect, engine, effect.drain_s, drained)

    def _asleep(self, effect: ParkEngine, engine: Engine, done: Done, *, began_s: float) -> None:
        if self.mine(effect) is not engine:
            done(0.0, self.lost(effect, "gone while parking"))
            return
        assert not engine.in_flight or self.routes is None, f"{effect.replica.replica_id} sleeps with requests"
        engine.fall_asleep(effect.swap_driver)
        if self.clock.now_s >= self.silent_until_s:
            done(0.0, self._parked(effect, engine, drain_s=max(0.0, self.clock.now_s - began_s - 0.02)))
            return

        def give_up() -> None:
            if done.is_alive():
                done(0.0, self.lost(effect, "its bytes are not proven free"))

        self.clock.after(UNPROVEN_S, give_up)

    def _parked(self, effect: ParkEngine, engine: Engine, *, drain_s: float) -> EngineParked:
        return EngineParked(
            replica_id=effect.replica.replica_id,
            lease_epoch=effect.lease_epoch,
            residues=tuple(engine.used_on(gpu_uuid) for gpu_uuid in engine.share_bytes),
            host_bytes=effect.replica.deployment.engine.weights_bytes,
            copied_bytes=0,
            park_s=0.02,
            drain_s=drain_s,
            reason=effect.reason,
        )

    def _wake(self, effect: EngineEffect, done: Done) -> None:
        engine = self.mine(effect)
        if engine is None:
            done(0.001, self.lost(effect, "gone before its wake"))
            return
        if self._answers_not(engine, effect, done):
            return
        if engine.phase is Phase.ASLEEP:
            engine.settle_at_request()
        is_short = engine.phase is Phase.ASLEEP and not self.has_room(engine) and self._is_harmed(engine)
        fails = engine.phase is Phase.ASLEEP and self.random.random() < self.faults.wake_fails_fraction
        if not fails and not is_short:
            engine.phase = Phase.LOADING if engine.phase is Phase.ASLEEP else engine.phase
            self.check()

        def finish() -> None:
            if self.mine(effect) is not engine:
                done(0.0, self.lost(effect, "gone while waking"))
                return
            if fails or is_short:
                refused = EngineNotWoken(
                    replica_id=effect.replica.replica_id,
                    lease_epoch=effect.lease_epoch,
                    reason="out of memory" if is_short else "restore failed",
                    short_by_bytes=max(engine.share_bytes.values()) if is_short else 0,
                )
                done(0.0, refused)
                return
            engine.phase = Phase.RESIDENT
            woken = EngineWoken(
                replica_id=effect.replica.replica_id,
                lease_epoch=effect.lease_epoch,
                endpoint=self.endpoint(effect),
                copied_bytes=effect.replica.deployment.engine.weights_bytes,
                restore_s=copy_s(effect),
                verify_s=0.02,
            )
            self.open_route(effect, engine, done.is_alive)
            done(0.0, woken)

        self._later(engine, copy_s(effect) + 0.05, finish)

    def _stop(self, effect: EngineEffect, done: Done) -> None:
        assert isinstance(effect, StopEngine), effect
        stopped = EngineStopped(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch)
        engine = self.mine(effect)
        if engine is None:
            done(0.001, stopped)
            return

        def finish() -> None:
            if self.mine(effect) is engine:
                self.kill_engine(effect.replica.replica_id)
            done(0.0, stopped)

        def drained(outcome: str) -> None:
            if done.is_alive():
                self._later(engine, 0.3, finish)

        if self.routes is None:
            self._later(engine, 0.3, finish)
        else:
            self.drain(effect, engine, effect.drain_s, drained)

    def _adopt(self, effect: EngineEffect, done: Done) -> None:
        assert isinstance(effect, AdoptEngine), effect
        engine = self.mine(effect)
        if engine is None:
            done(0.005, self.lost(effect, "gone while the agent was away"))
            return
        if engine.hung_until_s > self.clock.now_s:
            done(ANSWER_S, silent(effect))
            return
        expected = Phase.ASLEEP if effect.should_be_parked else Phase.RESIDENT
        assert engine.phase is expected, f"{effect.replica.replica_id} is {engine.phase}, its lease says {expected}"
        if not effect.should_be_parked:
            adopt(self, effect, engine)
            self.open_route(effect, engine, done.is_alive)

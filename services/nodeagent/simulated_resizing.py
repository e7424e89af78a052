"""How engines of a GPU host in virtual time grow, shrink, freeze, and disobey; for the simulator only."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

from schemas.nodes import ResizeReason
from services.nodeagent.inputs import (
    AdoptEngine,
    EngineEffect,
    EngineLost,
    EngineNotResized,
    EngineResized,
    EvictEngine,
    ResizeEngine,
)
from services.nodeagent.simulated_engine import Clock, Done, Engine, Phase

GROW_S: Final = 0.05
FREEZE_S: Final = 0.005
SHRINK_S: Final = (0.01, 0.25)
ABLE_FRACTION: Final = 0.8
"""Of those whose growth fails; the others have nothing that takes another grant."""
LATE_S: Final = 3.0
"""How long after its deadline a slow engine has shrunk after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFaults:
    """Chances per effect."""

    start_fails_fraction: float = 0.0
    park_stays_fraction: float = 0.0
    wake_fails_fraction: float = 0.0
    step_hangs_fraction: float = 0.0
    """Its agent never hears of its end."""
    grow_fails_fraction: float = 0.0
    gives_slowly_fraction: float = 0.0
    """It shrinks, but after its deadline."""
    gives_nothing_fraction: float = 0.0
    """It does not shrink, whoever asks."""


class Host(Protocol):
    """What a resize needs of its host."""

    faults: HostFaults
    random: Random
    clock: Clock

    def mine(self, effect: EngineEffect) -> Engine | None: ...

    def lost(self, effect: EngineEffect, reason: str) -> EngineLost: ...

    def has_room(self, engine: Engine) -> bool: ...

    def check(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Resizing:
    """One resize of one engine; a newer one of the same engine makes it fall silent."""

    host: Host
    effect: ResizeEngine
    engine: Engine
    done: Done

    def begin(self) -> None:
        if self.effect.resize_epoch < self.engine.resize_epoch:
            return
        self.engine.resize_epoch = self.effect.resize_epoch
        if self.engine.hung_until_s > self.host.clock.now_s or self.engine.phase is not Phase.RESIDENT:
            self._not(self.effect.deadline_s, self.effect.before_bytes, "it does not answer")
            return
        {
            ResizeReason.BURST: self._grow,
            ResizeReason.FREEZE: self._freeze,
            ResizeReason.GIVE_BACK: self._shrink,
        }[self.effect.reason]()

    def _is_current(self) -> bool:
        is_mine = self.host.mine(self.effect) is self.engine and self.engine.phase is Phase.RESIDENT
        return is_mine and self.engine.resize_epoch == self.effect.resize_epoch

    def _grow(self) -> None:
        fails = self.host.random.random() < self.host.faults.grow_fails_fraction
        self.engine.limit_to(self.effect.granted_bytes)
        takes_at_once = self.host.random.choice([1.0, 1.0, 0.5])

        def grown() -> None:
            if not self._is_current():
                return
            before = tuple(self.engine.share_bytes.values())
            pairs = zip(before, self.effect.granted_bytes, strict=True)
            self.engine.live_in([old + int((new - old) * takes_at_once) for old, new in pairs])
            if fails or not self.host.has_room(self.engine):
                self.engine.live_in(before)
                if self.done.is_alive():
                    self.engine.limit_to(self.effect.before_bytes)
                    is_able = not fails or self.host.random.random() < ABLE_FRACTION
                    self._not(0.0, self.effect.before_bytes, "it did not get the memory", is_able=is_able)
                return
            self.host.check()
            self._told(self.effect.granted_bytes, GROW_S)
            self.host.clock.after(self.host.random.uniform(1.0, 5.0), self._take_the_rest)

        self.host.clock.after(GROW_S, grown)

    def _take_the_rest(self) -> None:
        """What it was granted and did not need at once."""
        if not self._is_current():
            return
        before = tuple(self.engine.share_bytes.values())
        self.engine.live_in(self.effect.granted_bytes)
        if not self.host.has_room(self.engine):
            self.engine.live_in(before)
        self.host.check()

    def _freeze(self) -> None:
        if self.done.is_alive():
            sizes = zip(self.engine.share_bytes.values(), self.effect.granted_bytes, strict=True)
            frozen = tuple(max(used, least) for used, least in sizes)
            self.engine.limit_to(frozen)
            self._told(frozen, FREEZE_S)

    def _shrink(self) -> None:
        faults, chance = self.host.faults, self.host.random.random()
        if chance < faults.gives_nothing_fraction:
            self._not(self.effect.deadline_s, self.effect.before_bytes, "it did not shrink")
            return
        if chance < faults.gives_nothing_fraction + faults.gives_slowly_fraction:
            self._not(self.effect.deadline_s, self.effect.before_bytes, "it has not shrunk yet")
            self.host.clock.after(self.effect.deadline_s + LATE_S, self._live_in_less)
            return
        takes_s = self.host.random.uniform(*SHRINK_S)

        def shrunk() -> None:
            self._live_in_less()
            if self._is_current() and self.done.is_alive():
                self.engine.limit_to(self.effect.granted_bytes)
                self._told(self.effect.granted_bytes, takes_s)

        self.host.clock.after(takes_s, shrunk)

    def _live_in_less(self) -> None:
        if self._is_current():
            sizes = zip(self.engine.share_bytes.values(), self.effect.granted_bytes, strict=True)
            self.engine.live_in([min(used, granted) for used, granted in sizes])
            self.host.check()

    def _told(self, granted: tuple[int, ...], takes_s: float) -> None:
        resized = EngineResized(
            replica_id=self.effect.replica.replica_id,
            lease_epoch=self.effect.lease_epoch,
            reason=self.effect.reason,
            granted_bytes=granted,
            resize_epoch=self.effect.resize_epoch,
            resize_s=takes_s,
        )
        self.done(0.0, resized)

    def _not(self, after_s: float, granted: tuple[int, ...], problem: str, *, is_able: bool = True) -> None:
        failed = EngineNotResized(
            replica_id=self.effect.replica.replica_id,
            lease_epoch=self.effect.lease_epoch,
            reason=self.effect.reason,
            granted_bytes=granted,
            resize_epoch=self.effect.resize_epoch,
            resize_s=after_s,
            problem=problem,
            is_able=is_able,
        )
        self.done(after_s, failed)


def adopt(host: Host, effect: AdoptEngine, engine: Engine) -> None:
    """Its limit and its budget become what its lease says, unless it was told of a newer resize already."""
    if effect.resize_epoch < engine.resize_epoch or not effect.granted_bytes:
        return
    engine.resize_epoch = effect.resize_epoch
    engine.limit_to(effect.granted_bytes)
    before = tuple(engine.share_bytes.values())
    engine.live_in(effect.granted_bytes)
    if not host.has_room(engine):
        engine.live_in(before)
    host.check()


def resize(host: Host, effect: EngineEffect, done: Done) -> None:
    assert isinstance(effect, ResizeEngine), effect
    engine = host.mine(effect)
    if engine is None:
        done(0.001, host.lost(effect, "gone before its resize"))
    else:
        Resizing(host, effect, engine, done).begin()


def evict(host: Host, effect: EngineEffect, done: Done) -> None:
    assert isinstance(effect, EvictEngine), effect
    done(0.1, host.lost(effect, effect.reason))


def beyond(engine: Engine, held: Mapping[str, int] | None) -> str:
    """Where it uses more than the driver lets it have, or than its lease holds; empty where it does not."""
    name = engine.replica.replica_id
    for gpu_uuid, limit_bytes in engine.limit_bytes.items():
        used_bytes = engine.used_on(gpu_uuid)
        if used_bytes > limit_bytes:
            return f"{name} uses {used_bytes} bytes beyond its limit"
        if held is not None and used_bytes > held.get(gpu_uuid, 0):
            return f"{name} uses {used_bytes} bytes that its lease does not hold"
    return ""

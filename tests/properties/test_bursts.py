"""Shares that grow and shrink in random histories: no byte is promised twice, and every ladder has an end.

Judged by facts alone (`Books`) after each of them, and by the agent's own invariants.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.deployments import SwapDriver
from schemas.nodes import ResizeReason
from schemas.units import GiB
from services.nodeagent.inputs import BurstDue, EngineEffect, EvictEngine, GiveBackDue, ParkEngine, ResizeEngine
from services.nodeagent.transitions import Residency
from tests.properties.wide import GPUS, STEPS, Alone
from tests.unit.nodeagent import builders as nodes

many = settings(max_examples=60, deadline=None)
BURSTS: Final = (*STEPS, "burst", "burst", "burst", "end", "end", "late")
ROUNDS_MAX: Final = 60


class Bursting(Alone):
    """The same agent, whose replicas may have more than their request and do not always give it back."""

    is_obedient = False
    swap_drivers = (SwapDriver.CHECKPOINT,)

    def play(self, step_count: int) -> None:
        for _ in range(step_count):
            self.step(self._choose(BURSTS))
        self.settle()

    def step(self, step: str) -> None:
        if step == "burst":
            self.agent.now_s += 6.0
            self._handle(BurstDue())
        elif step == "late":
            late = [timer for timer in self.timers if isinstance(timer.input, GiveBackDue)]
            if late:
                timer = self._choose(late)
                self.timers.remove(timer)
                self._handle(timer.input)
        else:
            super().step(step)

    def settle(self) -> None:
        """All that is on its way ends well: then nobody gives back, nobody waits, and what may burst has its part."""
        self.is_obedient = True
        for _ in range(ROUNDS_MAX):
            while self.effects:
                self._end(self.effects.pop(0))
            self._wait(31.0)
            self.step("burst")
        states = self.agent.state.replicas.values()
        assert not [r.proposal.replica_id for r in states if r.giving_back is not None], "a ladder without an end"
        assert not [r.proposal.replica_id for r in states if r.residency is Residency.WAITING], (
            "somebody waits for ever"
        )
        for uuid in GPUS:
            assert self.agent.state.held_bytes(uuid) == self.books.sums.get(uuid, 0), "agent and account differ"

    def _limit_gib(self) -> int:
        return int(self._choose((0, 76, 76, 40)))

    def _end(self, effect: EngineEffect) -> None:
        name = effect.replica.replica_id
        known = self.agent.state.replicas.get(name)
        if known is None or known.lease_epoch != effect.lease_epoch:
            return
        if isinstance(effect, EvictEngine):
            self._handle(self.agent.lost(name))
        elif isinstance(effect, ResizeEngine):
            self._handle(self._resized(effect))
        elif isinstance(effect, ParkEngine) and not self.is_obedient and self._choose((True, False)):
            self._handle(self.agent.stayed(name))
        elif isinstance(effect, ParkEngine) and known.parks_by is SwapDriver.CHECKPOINT:
            self._handle(self.agent.has_parked(name, residue_gib=0))
        else:
            super()._end(effect)

    def _resized(self, effect: ResizeEngine) -> Any:
        """Frozen anywhere between its request and its grant; else as asked, or nothing, or half of it."""
        if effect.reason is ResizeReason.FREEZE:
            pairs = zip(effect.granted_bytes, effect.before_bytes, strict=True)
            used = [self._choose((low, (low + high) // 2, high)) for low, high in pairs]
            return self.agent.resized(effect, *(size / GiB for size in used))
        if self.is_obedient or self._choose((True, False)):
            return self.agent.resized(effect)
        half = [(low + high) / 2 / GiB for low, high in zip(effect.granted_bytes, effect.before_bytes, strict=True)]
        is_able = effect.reason is not ResizeReason.BURST or self._choose((True, True, False))
        return self.agent.not_resized(effect, *(half if self._choose((True, False)) else ()), is_able=is_able)


@many
@given(seed=st.integers(0, 2**32))
def test_no_byte_is_promised_twice_and_every_ladder_has_an_end(seed: int) -> None:
    draw = random.Random(seed)
    Bursting(draw.choice).play(80)


class Needing(Bursting):
    """The same, where engines tell how full they are, and it changes all the time."""

    demand_s = 2.0

    def step(self, step: str) -> None:
        if step == "burst" and not self.is_obedient:
            for name, replica in sorted(self.agent.state.replicas.items()):
                if replica.residency is Residency.RESIDENT and self._choose((True, True, False)):
                    used_fraction = self._choose((0.0, 0.1, 0.4, 0.6, 0.9, 1.0))
                    self._handle(self.agent.load(name, used_fraction, waiting_count=self._choose((0, 0, 3))))
            self.agent.now_s += self._choose((0.0, 40.0))
        super().step(step)


@many
@given(seed=st.integers(0, 2**32))
def test_no_byte_is_promised_twice_where_grants_follow_need_either(seed: int) -> None:
    draw = random.Random(seed)
    Needing(draw.choice).play(80)


def _pick(names: Sequence[Any]) -> Any:
    return names[0]


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (2, 5)])
def test_nobody_stays_below_its_part_while_another_is_above_its_own(weights: tuple[int, int]) -> None:
    """Up to a step, whoever came first."""
    choose: Callable[[Sequence[Any]], Any] = _pick
    world = Bursting(choose)
    for number, weight in enumerate(weights):
        wish = nodes.replica(f"r{number}", 10, limit_gib=76, weight=weight)
        world._handle(nodes.proposal(wish))
        world.settle()
    extras = [world.agent.granted_gib(f"r{number}") - 10 for number in range(2)]
    step_gib = world.agent.state.settings.burst_step_bytes / GiB

    assert sum(extras) >= 60 - 2 * step_gib
    assert abs(extras[0] / weights[0] - extras[1] / weights[1]) <= 2 * step_gib

"""Lives that begin from a snapshot, and the check that would notice one that forgets something."""

from collections.abc import Callable
from typing import Any

import pytest

from kit.processor import CHAIN_START, Processor
from kit.simulation import Faults
from kit.simulation_snapshots import DrawnSnapshots
from services.simulated import SimulatedSystem
from services.swarm.plan import inference

SEEDS = range(6)


class Damaged(DrawnSnapshots):
    """Restores, and then forgets something."""

    def __init__(self, seed: int, damage: Callable[[Processor[Any]], None]) -> None:
        super().__init__(seed)
        self.damage = damage

    def restore(self, processor: Processor[Any]) -> bool:
        is_restored = super().restore(processor)
        if is_restored:
            self.damage(processor)
        return is_restored


def lived(damage: Callable[[Processor[Any]], None], *, seed: int) -> None:
    """A run with crashes, checked at many instants."""
    system = SimulatedSystem(seed=seed, faults=Faults(latency_s=0.05, ack_lost_fraction=0.1))
    system.simulation.snapshots = Damaged(seed, damage)
    system.deploy([inference(f"m{number}", weights_gb=10, portion=0.4) for number in range(4)])
    writers = list(system.simulation.members)
    for number in range(20):
        system.run_for(0.5)
        system.check()
        system.simulation.crash(writers[number % len(writers)], down_s=0.1)
    system.run_for(10.0)
    system.check()


def nothing(processor: Processor[Any]) -> None:
    return


def a_replica(processor: Processor[Any]) -> None:
    if getattr(processor.state, "replicas", None):
        processor.state.replicas.popitem()


def others_chains(processor: Processor[Any]) -> None:
    processor._foreign_hashes.clear()


def the_own_chain(processor: Processor[Any]) -> None:
    processor.last_hash = CHAIN_START


def facts_in_between(processor: Processor[Any]) -> None:
    processor.read_seq += 3


def test_a_system_whose_writers_begin_from_snapshots_is_as_its_history_says() -> None:
    for seed in SEEDS:
        lived(nothing, seed=seed)


@pytest.mark.parametrize("damage", [a_replica, others_chains, the_own_chain, facts_in_between])
def test_a_snapshot_that_forgets_is_noticed(damage: Callable[[Processor[Any]], None]) -> None:
    assert any(fails(damage, seed=seed) for seed in SEEDS), "no check has noticed it"


def fails(damage: Callable[[Processor[Any]], None], *, seed: int) -> bool:
    try:
        lived(damage, seed=seed)
    except (AssertionError, KeyError, ValueError):
        return True
    return False

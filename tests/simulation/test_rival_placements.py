"""Two placements that each believe to be the one writer: the stale one is refused, nothing is promised twice.

The lease that says which of two instances is active is for liveness only; safety comes from the stream.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from kit import simulation_harm as harm
from kit.simulation import STREAM_EPOCH_S, Faults
from schemas.inbox import DeployRequested, RetireRequested
from schemas.nodes import LeaseGranted, LeaseReleased
from schemas.placement import DeploymentAdmitted, DeploymentRetired, PlacementProposed
from services.placement.state import ClusterState
from services.simulated import Shape, SimulatedSystem
from services.swarm.checks import Books, facts_of
from services.swarm.plan import inference
from tests.properties.contracts import Contracts

SEEDS = 12


def _done(deed: Callable[[], object]) -> None:
    deed()


def rivalry(seed: int) -> SimulatedSystem:
    """A minute of wishes while the standby is started beside its healthy twin again and again, or takes over from one
    that stands still and wakes up later."""
    draw = random.Random(seed)
    books, contracts = Books(), Contracts()
    faults = Faults(latency_s=draw.choice([0.0004, 0.05]), ack_lost_fraction=draw.choice([0, 0.1]))
    system = SimulatedSystem(
        seed=seed, node_count=2, gpu_count=2, faults=faults, shape=Shape(gateway_count=1, has_standbys=True)
    )
    contracts.inbox = lambda: system.simulation.inbox
    for stored, fact in zip(system.simulation.stream, facts_of(system), strict=True):
        books.hear(fact)
        contracts.hear(stored, fact)
    system.simulation.on_stored.append(lambda _, fact: books.hear(fact))
    system.simulation.on_stored.append(contracts.hear)

    def at(deed: Callable[[], object]) -> None:
        system.simulation.at(STREAM_EPOCH_S + 2 + draw.uniform(0, 60), partial(_done, deed))

    for number in range(24):
        spec = inference(f"m{number % 8}", weights_gb=5, portion=draw.choice([0.2, 0.4, 0.6]))
        command = DeployRequested(command_id=f"d{number}", deployment=spec)
        at(partial(system.command, command))
    for number in range(6):
        command_out = RetireRequested(command_id=f"r{number}", model=f"m{number}")
        at(partial(system.command, command_out))
    for _ in range(6):
        at(partial(harm.rival, system.simulation, "placement"))
    first = system.simulation.members["placement"]
    at(partial(harm.pause, system.simulation, first, lasts_s=10.0))
    system.run_for(100.0)
    system.simulation.faults = Faults()
    system.run_for(60.0)
    system.check()
    return system


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whoever_wins_every_wish_is_placed_once_and_every_gpu_holds_what_it_was_promised(seed: int) -> None:
    system = rivalry(seed)

    state = system.state("placement")
    assert isinstance(state, ClusterState), state
    facts = facts_of(system)
    assert {f.deployment_id for f in facts if isinstance(f, DeploymentAdmitted)} == (
        state.deployments.keys() | {f.deployment_id for f in facts if isinstance(f, DeploymentRetired)}
    )
    proposed = Counter(r.replica_id for f in facts if isinstance(f, PlacementProposed) for r in f.replicas)
    assert {1} == set(proposed.values()), "a name is proposed once, whoever proposes it"
    released = {f.replica_id for f in facts if isinstance(f, LeaseReleased)}
    alive = Counter(
        replica.deployment_id
        for fact in facts
        if isinstance(fact, LeaseGranted)
        for replica in fact.replicas
        if replica.replica_id not in released
    )
    assert all(count == 1 for count in alive.values()), alive
    for deployment in state.deployments.values():
        assert alive[deployment.deployment_id] or deployment.problem, f"{deployment.spec.name} is lost"


def test_the_stale_ones_appends_were_refused() -> None:
    """Else the seeds above would say nothing."""
    refused = [rivalry(seed).simulation.counters for seed in range(4)]

    assert sum(counters.superseded_count + counters.refused_count for counters in refused) > 0

"""Requests while replicas move, and while a node is gone: gateways' own core, with real holds, routes and drains."""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from msgspec.structs import replace

from kit.simulation import STREAM_EPOCH_S
from schemas.deployments import PlacementSpec, SwapSpec
from schemas.inbox import RepackRequested, RetireRequested
from schemas.nodes import ReplicaParked
from schemas.placement import MoveDecided, MoveEnded
from services.gateway.simulated import ANSWERED
from services.placement.state import ClusterState
from services.simulated import Shape, SimulatedSystem
from services.swarm.checks import facts_of
from services.swarm.plan import inference


def in_pieces(seed: int, *, warm_s: float) -> SimulatedSystem:
    """`pinned` on one GPU, `moves` alone on another one."""
    system = SimulatedSystem(seed=seed, node_count=2, gpu_count=1, shape=Shape(gateway_count=2, alive_s=2.0))
    swap = SwapSpec(warm_window_s=warm_s, minimum_residency_s=0.0)
    pinned = replace(inference("pinned", weights_gb=10, portion=0.5), placement=PlacementSpec(is_movable=False))
    system.deploy([pinned, inference("gap", weights_gb=10, portion=0.5)])
    system.run_for(5.0)
    system.deploy([inference("moves", weights_gb=20, portion=0.4, swap=swap)])
    system.run_for(5.0)
    system.command(RetireRequested(command_id="gap", model="gap"))
    system.run_for(5.0)
    return system


def loaded(system: SimulatedSystem, seed: int, *, every_s: float, lasts_s: float) -> None:
    """Requests of all lengths, from now on."""
    draw = random.Random(seed)  # Reproducible by design.
    at_s = 0.0
    while (at_s := at_s + draw.expovariate(1 / every_s)) < lasts_s:
        ask = partial(system.ask, "moves", gateway=draw.randrange(2), takes_s=draw.choice([0.05, 0.5, 3.0, 20.0]))
        system.simulation.after(at_s, partial(_asked, ask))


def _asked(ask: Callable[[], object]) -> None:
    ask()


def moved(system: SimulatedSystem) -> tuple[int, int]:
    """(moves begun, moves done)"""
    facts = facts_of(system)
    return (
        sum(isinstance(fact, MoveDecided) for fact in facts),
        sum(isinstance(fact, MoveEnded) and fact.is_done for fact in facts),
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_request_is_lost_while_the_replica_that_serves_it_moves(seed: int) -> None:
    system = in_pieces(seed, warm_s=600.0)
    loaded(system, seed, every_s=0.1, lasts_s=60.0)
    system.run_for(10.0)
    system.command(RepackRequested(command_id="repack"))
    system.run_for(150.0)

    assert (1, 1) == moved(system)
    assert {ANSWERED: len(system.asks)} == Counter(ask.outcome for ask in system.asks)
    assert len(system.asks) > 400


@pytest.mark.parametrize("seed", range(6))
def test_no_request_is_lost_while_a_parked_replica_moves(seed: int) -> None:
    """It parks after two seconds without work; requests come now and then, also in the middle of the move."""
    system = in_pieces(seed, warm_s=2.0)
    loaded(system, seed, every_s=6.0, lasts_s=60.0)
    system.run_for(8.0)
    system.command(RepackRequested(command_id="repack"))
    system.run_for(150.0)

    assert (1, 1) == moved(system)
    assert any(isinstance(fact, ReplicaParked) for fact in facts_of(system))
    assert {ANSWERED: len(system.asks)} == Counter(ask.outcome for ask in system.asks)


def test_after_a_move_one_copy_is_left_and_a_gpu_is_idle() -> None:
    system = in_pieces(0, warm_s=600.0)
    system.command(RepackRequested(command_id="repack"))
    system.run_for(60.0)

    state = system.state("placement")
    assert isinstance(state, ClusterState), state
    deployment = state.named("default", "moves")
    assert deployment is not None
    (replica,) = state.replicas_of(deployment.deployment_id)
    assert ("resident", 1) == (replica.state, sum(not state.on_gpu(u) for n in state.nodes.values() for u in n.gpus))
    assert system.simulation.now_s > STREAM_EPOCH_S

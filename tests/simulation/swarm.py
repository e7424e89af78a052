"""Random runs of the whole system: each seed draws fleet, traffic, operators and faults, then heals and must settle."""

import random
from dataclasses import dataclass
from functools import partial

from kit.simulation import STREAM_EPOCH_S, Faults
from schemas.deployments import SwapSpec
from schemas.inbox import ParkRequested, RetireRequested, WakeRequested
from services.nodeagent.simulated_resizing import HostFaults
from services.placement.state import ClusterState
from services.simulated import Request, SimulatedSystem
from services.swarm.plan import Spread, inference, training

SETTLE_S = 60.0
"""After the last fault, everything must have converged within this."""


@dataclass(slots=True)
class SwarmRun:
    """One seed's run, finished."""

    system: SimulatedSystem
    unanswered: list[Request]
    """Requests to deployments that are placed and not failed, and that nobody answered although all was healed."""


def run(seed: int) -> SwarmRun:
    """Faults, then heal, then a hard deadline. Raises when an invariant is broken at any instant."""
    draw = random.Random(seed)  # Reproducible by design.
    system = SimulatedSystem(
        seed=seed,
        node_count=draw.choice([1, 2]),
        gpu_count=draw.choice([1, 2]),
        faults=Faults(
            fleeting_lost_fraction=draw.choice([0, 0.05, 0.3]),
            fleeting_twice_fraction=draw.choice([0, 0.1, 0.3]),
            ack_lost_fraction=draw.choice([0, 0.02, 0.2]),
        ),
        host_faults=HostFaults(
            start_fails_fraction=draw.choice([0, 0.1]),
            park_stays_fraction=draw.choice([0, 0.1]),
            wake_fails_fraction=draw.choice([0, 0.1]),
        ),
    )
    end_s = draw.choice([60, 120])
    models = _deploy(system, draw)
    _traffic(system, draw, models, end_s=end_s)
    _crashes(system, draw, end_s=end_s)
    _operators(system, draw, models, end_s=end_s)
    for _ in range(end_s):
        system.run_for(1.0)
        for host in system.hosts.values():
            host.check()
    return _healed(system)


def _deploy(system: SimulatedSystem, draw: random.Random) -> list[str]:
    models = []
    for number in range(draw.randint(3, 9)):
        portion = draw.choice([0.2, 0.3, 0.4, 0.65, 0.9])
        replica_count = draw.choice([1, 1, 1, 2])
        spread = Spread(
            gpu_count=draw.choice([1, 1, 1, 2]),
            replica_count=replica_count,
            is_gang=replica_count > 1 and draw.random() < 0.5,
        )
        if draw.random() < 0.2:
            system.deploy([training(f"m{number}", weights_gb=portion * 60, portion=portion, spread=spread)])
            continue
        swap = SwapSpec(
            warm_window_s=draw.choice([2.0, 20.0, 300.0]),
            cold_after_s=draw.choice([None, None, 15.0]),
            is_parkable=draw.random() > 0.15,
        )
        system.deploy([inference(f"m{number}", weights_gb=portion * 60, portion=portion, swap=swap, spread=spread)])
        models.append(f"m{number}")
    return models


def _at(system: SimulatedSystem, draw: random.Random, end_s: float, action: partial[None]) -> None:
    system.simulation.at(STREAM_EPOCH_S + 1 + draw.uniform(0, end_s), action)


def _traffic(system: SimulatedSystem, draw: random.Random, models: list[str], *, end_s: float) -> None:
    at_s = 0.0
    while models and at_s < end_s:
        at_s += draw.expovariate(2)
        system.simulation.at(STREAM_EPOCH_S + 1 + at_s, partial(system.clients.request, draw.choice(models)))


def _crashes(system: SimulatedSystem, draw: random.Random, *, end_s: float) -> None:
    for _ in range(draw.randint(0, 12)):
        writer = draw.choice(list(system.simulation.members))
        _at(system, draw, end_s, partial(system.simulation.crash, writer, down_s=draw.uniform(0, 3)))
    for _ in range(draw.randint(0, 3)):
        _at(system, draw, end_s, partial(_kill_an_engine, system, draw.choice(list(system.hosts)), draw.random()))


def _kill_an_engine(system: SimulatedSystem, node: str, which: float) -> None:
    engines = sorted(system.hosts[node].engines)
    if engines:
        system.kill_engine(node, engines[int(which * len(engines))])


def _operators(system: SimulatedSystem, draw: random.Random, models: list[str], *, end_s: float) -> None:
    for number in range(draw.randint(0, 4)):
        kind = draw.choice([ParkRequested, WakeRequested, RetireRequested, ParkRequested])
        command = kind(command_id=f"x{number}", model=draw.choice(models or ["m0"]))
        _at(system, draw, end_s, partial(system.command, command))


def _healed(system: SimulatedSystem) -> SwarmRun:
    system.simulation.faults = Faults()
    for host in system.hosts.values():
        host.faults = HostFaults()
    system.run_for(SETTLE_S)
    system.check()
    placement = system.state("placement")
    assert isinstance(placement, ClusterState), placement
    unanswered = [
        request
        for request in system.clients.requests
        if request.served_at_s is None and _should_be_answered(placement, request.model)
    ]
    return SwarmRun(system=system, unanswered=unanswered)


def _should_be_answered(placement: ClusterState, model: str) -> bool:
    deployment = placement.named("default", model)
    if deployment is None or deployment.problem:
        return False
    return all(replica.state != "failed" for replica in placement.replicas_of(deployment.deployment_id))

"""A trial of preemption: workloads of every priority come and go on too few GPUs, and placement dies now and then."""

import random
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

from kit import simulation_harm as harm
from kit.bus import Stored
from kit.service import Service
from kit.simulation import STREAM_EPOCH_S, Faults
from schemas.deployments import PlacementSpec, SwapSpec
from schemas.inbox import RetireRequested
from schemas.messages import Fact
from services.placement.state import ClusterState
from services.simulated import Shape, SimulatedSystem
from services.swarm.checks import Books
from services.swarm.displacement import Displacement
from services.swarm.plan import inference

LASTS_S: Final = 240.0
HEAL_S: Final = 240.0
"""Longer than a claim is kept, a rest and a start together."""
PRIORITIES: Final = ("very-low", "low", "medium", "high", "very-high")


class DisplacementTrial:
    """One seed's run."""

    def __init__(self, seed: int, services: Mapping[str, Service[Any]] | None = None) -> None:
        self.draw = random.Random(f"{seed}/displacement")  # Reproducible by design.
        self.books, self.displacement = Books(), Displacement()
        self.system = SimulatedSystem(
            seed=seed,
            node_count=2,
            gpu_count=2,
            faults=Faults(ack_lost_fraction=0.02),
            services=services,
            shape=Shape(),
            listen=self._hear,
        )

    def _hear(self, stored: Stored, fact: Fact) -> None:
        self.books.hear(fact)
        self.displacement.hear(stored, fact)

    def _at(self, deed: Any) -> None:
        self.system.simulation.at(STREAM_EPOCH_S + 2 + self.draw.uniform(0, LASTS_S), deed)

    def run(self) -> None:
        """Comings and goings under faults, then quiet, then every check."""
        for number in range(self.draw.randint(15, 30)):
            spec = inference(f"m{number}", weights_gb=5, portion=self.draw.choice((0.2, 0.3, 0.5, 0.7, 1.0)))
            spec = replace(
                spec,
                engine=replace(spec.engine, cold_start_s=self.draw.choice((1.0, 5.0))),
                priority=self.draw.choice(PRIORITIES),
                is_preemptible=self.draw.choice((None, None, None, True, False)),
                swap=SwapSpec(is_parkable=self.draw.random() < 0.15),
                placement=PlacementSpec(
                    minimum_runtime_s=self.draw.choice((0.0, 0.0, 30.0)),
                    preemption_delay_s=self.draw.choice((0.0, 0.0, 10.0)),
                ),
            )
            self._at(partial(self.system.deploy, [spec]))
            if self.draw.random() < 0.4:
                self._at(partial(self.system.command, RetireRequested(command_id=f"r{number}", model=f"m{number}")))
        for _ in range(self.draw.randint(0, 4)):
            self._at(partial(self.system.simulation.crash, "placement", down_s=self.draw.uniform(0.1, 5)))
        self.system.run_for(LASTS_S + 2)
        harm.heal(self.system.simulation)
        self.system.simulation.faults = Faults()
        self.system.run_for(HEAL_S)
        self._check()

    def _check(self) -> None:
        self.system.check()
        state = self.system.state("placement")
        assert isinstance(state, ClusterState), state
        assert not state.claims, f"all is quiet, and room is still kept: {sorted(state.claims)}"
        assert not self.displacement.claims, f"claims without an end: {sorted(self.displacement.claims)}"
        for deployment in state.deployments.values():
            placed_count = state.placed_count(deployment.deployment_id)
            is_told = bool(deployment.problem) or placed_count >= deployment.replica_count
            assert is_told, f"all is quiet, and {deployment.spec.name} is neither placed nor explained"


def check_displacement(seed: int, services: Mapping[str, Service[Any]]) -> None:
    """Raises what the first check raises that finds something."""
    DisplacementTrial(seed, services).run()

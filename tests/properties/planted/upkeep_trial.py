"""A trial of placement's upkeep: nodes that are away for long, moves that an operator asks for, traffic."""

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
from schemas.inbox import RepackRequested, RetireRequested
from schemas.messages import Fact, Signal
from schemas.nodes import NodeAlive
from schemas.units import GiB
from services.placement.state import ClusterState
from services.simulated import Shape, SimulatedSystem
from services.swarm.checks import Books
from services.swarm.plan import inference
from services.swarm.upkeep import Upkeep

LASTS_S: Final = 500.0
HEAL_S: Final = 700.0
"""Longer than the longest quarantine that so many losses can bring, and than a replacement may take."""
NODES: Final = 3


class UpkeepTrial:
    """One seed's run."""

    def __init__(self, seed: int, services: Mapping[str, Service[Any]] | None = None) -> None:
        self.draw = random.Random(f"{seed}/upkeep")  # Reproducible by design.
        self.books, self.upkeep = Books(), Upkeep()
        self.is_tight = self.draw.random() < 0.5
        self.system = SimulatedSystem(
            seed=seed,
            node_count=NODES,
            gpu_count=2,
            faults=Faults(fleeting_lost_fraction=self.draw.choice([0, 0.1]), ack_lost_fraction=0.02),
            host_budget_bytes=self.draw.choice([4096, 200]) * GiB,
            services=services,
            shape=Shape(gateway_count=1, alive_s=2.0),
            listen=self._hear,
        )
        self.system.simulation.on_signal.append(self._hear_signal)

    def _hear(self, stored: Stored, fact: Fact) -> None:
        self.books.hear(fact)
        self.upkeep.hear(stored, fact)

    def _hear_signal(self, signal: Signal) -> None:
        simulation = self.system.simulation
        if isinstance(signal, NodeAlive) and simulation.now_s >= simulation.bus_away_until_s:
            self.upkeep.hear_alive(simulation.now_s)

    def _at(self, deed: Any, *, lasts_s: float = LASTS_S) -> None:
        self.system.simulation.at(STREAM_EPOCH_S + 2 + self.draw.uniform(0, lasts_s), deed)

    def run(self) -> None:
        """Faults, then heal, then every check."""
        self._deploy()
        for _ in range(self.draw.randint(3, 9)):
            node, lasts_s = f"node-{self.draw.randrange(NODES)}", self.draw.uniform(20, 90)
            if self.draw.random() < 0.5:
                self._at(partial(self.system.lose_power, node, lasts_s=lasts_s))
            else:
                member = self.system.simulation.members[f"node.{node}"]
                self._at(partial(harm.cut, self.system.simulation, member, lasts_s=lasts_s))
        if self.draw.random() < 0.5:
            self._at(partial(harm.bus_away, self.system.simulation, lasts_s=self.draw.uniform(20, 60)))
        for _ in range(self.draw.randint(0, 3)):
            self._at(partial(self.system.simulation.crash, "placement", down_s=self.draw.uniform(0.1, 5)))
        for number in range(self.draw.randint(2, 6)):
            self._at(partial(self.system.command, RepackRequested(command_id=f"repack-{number}", move_count_max=4)))
        self.system.run_for(LASTS_S + 2)
        harm.heal(self.system.simulation)
        self.system.simulation.faults = Faults()
        self.system.run_for(HEAL_S)
        self._check()
        if self.is_tight:
            self._renew()
            self._check()

    def _deploy(self) -> None:
        """A tight fleet needs each of its nodes; in a roomy one small models come and go, which leaves pieces."""
        names = []
        for number in range(6 if self.is_tight else 10):
            portion = 0.9 if self.is_tight else self.draw.choice([0.2, 0.3, 0.4])
            swap = SwapSpec(is_parkable=not self.is_tight and self.draw.random() < 0.7, warm_window_s=20.0)
            spec = inference(f"m{number}", weights_gb=10, portion=portion, swap=swap)
            if self.draw.random() < 0.2:
                spec = replace(spec, placement=PlacementSpec(is_movable=False))
            self.system.deploy([spec])
            names.append(spec.name)
        if not self.is_tight:
            for name in self.draw.sample(names, 3):
                self._at(partial(self.system.command, RetireRequested(command_id=f"r-{name}", model=name)))
        for _ in range(120):
            ask = partial(self.system.ask, self.draw.choice(names), gateway=0, takes_s=self.draw.uniform(0.1, 3))
            self._at(ask)

    def _renew(self) -> None:
        """Every node is needed once more, for models that were never anywhere."""
        for number in range(6):
            self.system.command(RetireRequested(command_id=f"out-{number}", model=f"m{number}"))
        self.system.run_for(60.0)
        swap = SwapSpec(is_parkable=False)
        self.system.deploy([inference(f"new{n}", weights_gb=10, portion=0.9, swap=swap) for n in range(6)])
        self.system.run_for(60.0)

    def _check(self) -> None:
        simulation = self.system.simulation
        self.system.check()
        self.upkeep.check_ends(now_s=simulation.now_s, lasts_s_max=HEAL_S)
        state = self.system.state("placement")
        assert isinstance(state, ClusterState), state
        for deployment in state.deployments.values():
            live = [r for r in state.replicas_of(deployment.deployment_id) if not r.is_releasing]
            wanted = deployment.replica_count + sum(
                move.deployment_id == deployment.deployment_id for move in state.moves.values()
            )
            assert wanted == len(live), f"all is healed, and {deployment.spec.name} has {len(live)} of {wanted}"
        open_asks = [ask for ask in self.system.asks if ask.ended_s is None]
        assert not open_asks, f"requests without an end: {open_asks}"


def check_upkeep(seed: int, services: Mapping[str, Service[Any]]) -> None:
    """Raises what the first check raises that finds something."""
    UpkeepTrial(seed, services).run()

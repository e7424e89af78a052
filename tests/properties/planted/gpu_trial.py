"""A trial of GPU health: errors, lost GPUs, strangers, GPUs on which nothing starts, traffic."""

import random
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from kit.bus import Stored
from kit.service import Service
from kit.simulation import STREAM_EPOCH_S
from schemas.deployments import SwapSpec
from schemas.messages import Fact
from schemas.units import GiB
from services.simulated import Shape, SimulatedSystem
from services.swarm.checks import Books
from services.swarm.gpu_rules import GpuRules
from services.swarm.plan import inference

LASTS_S: Final = 500.0
HEAL_S: Final = 150.0
NODES: Final = 2
CODES: Final = (13, 31, 63, 48, 94, 95, 119)


class GpuTrial:
    """One seed's run."""

    def __init__(self, seed: int, services: Mapping[str, Service[Any]] | None = None) -> None:
        self.draw = random.Random(f"{seed}/gpus")  # Reproducible by design.
        self.books = Books()
        self.rules = GpuRules(self.books)
        self.system = SimulatedSystem(
            seed=seed, node_count=NODES, gpu_count=2, services=services, shape=Shape(gateway_count=1), listen=self._hear
        )

    def _hear(self, stored: Stored, fact: Fact) -> None:
        self.books.hear(fact)
        self.rules.hear(stored, fact)

    def _at(self, deed: Any) -> None:
        self.system.simulation.at(STREAM_EPOCH_S + 2 + self.draw.uniform(0, LASTS_S), deed)

    def run(self) -> None:
        """Faults, then heal, then every check."""
        portions = [self.draw.choice([0.2, 0.4, 0.65, 0.9]) for _ in range(self.draw.randint(4, 8))]
        swap = SwapSpec(warm_window_s=self.draw.choice([5.0, 20.0]), minimum_residency_s=0.0)
        names = [f"m{number}" for number in range(len(portions))]
        self.system.deploy(
            [
                inference(name, weights_gb=portion * 60, portion=portion, swap=swap)
                for name, portion in zip(names, portions, strict=True)
            ]
        )
        for _ in range(self.draw.randint(6, 16)):
            self._at(self._harm(self.system.hosts[f"node-{self.draw.randrange(NODES)}"].node))
        for _ in range(60):
            self._at(partial(self.system.ask, self.draw.choice(names), gateway=0, takes_s=1.0, patience_s=30.0))
        self.system.run_for(LASTS_S + 2)
        for host in self.system.hosts.values():
            host.silent_until_s = 0.0
            host.foreign_bytes.clear()
            host.eyes.sick_until_s.clear()
            host.find_gpus()
        self.system.run_for(HEAL_S)
        self.rules.check_ends(self.system)
        self.rules.check_quarantines_end(now_s=self.system.simulation.now_s)
        self.system.check()

    def _harm(self, node: str) -> Any:
        host, which = self.system.hosts[node], self.draw.randrange(100)
        lasts_s = self.draw.uniform(10, 120)
        after = self.system.simulation.after
        match self.draw.choice(["xid", "lost", "foreign", "sick", "silent"]):
            case "xid":
                return partial(self.system.strike_gpu, node, which, code=self.draw.choice(CODES), which=which)
            case "lost":

                def back() -> None:
                    host.find_gpus()

                def lose() -> None:
                    self.system.lose_gpu(node, which)
                    after(lasts_s, back)

                return lose
            case "foreign":
                size_bytes = self.draw.randint(1, 60) * GiB

                def take() -> None:
                    gpu_uuid = host.take_foreign(which, size_bytes)
                    after(lasts_s, lambda: host.free_foreign(gpu_uuid))

                return take
            case "sick":
                return lambda: host.eyes.sicken(which, lasts_s=lasts_s)
            case _:
                return lambda: host.fall_silent(until_s=self.system.simulation.now_s + lasts_s / 2)


def check_gpus(seed: int, services: Mapping[str, Service[Any]]) -> None:
    """Raises what the first check raises that finds something."""
    GpuTrial(seed, services).run()

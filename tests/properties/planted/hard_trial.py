"""A trial for finding planted faults: few models on one GPU, wanted all the time, strangers, repetitions, late
messages, crashes, and every check that there is.
"""

import random
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from kit.bus import Stored
from kit.service import Service
from kit.simulation import Faults
from schemas.deployments import DeploymentSpec, IsolationGrade, ShareSpec, SwapSpec
from schemas.inbox import ParkRequested, RetireRequested, WakeRequested
from schemas.messages import Fact
from services.nodeagent.simulated_resizing import HostFaults
from services.swarm.plan import inference, training
from tests.properties.contracts import ColdConduct, Contracts
from tests.properties.test_invariants_system import (
    Plan,
    Step,
    Trial,
    assert_all_requests_answered,
    assert_placed_explained_or_retired,
    assert_services_agree,
)

KINDS = (
    *(["request"] * 20),
    *(["storm"] * 6),
    *(["crash"] * 5),
    "kill engine",
    "silence",
    "silence",
    "stranger",
    "twice",
    *(["park"] * 4),
    "redeploy",
)


def plan(seed: int) -> Plan:
    draw = random.Random(seed)  # Reproducible by design.
    models = draw.choice([_crowded, _with_a_fixed_share])()
    steps = tuple(Step(draw.uniform(0, 30), draw.choice(KINDS), draw.randrange(99), 8.0) for _ in range(40))
    faults = Faults(
        fleeting_lost_fraction=draw.choice([0.0, 0.3]),
        fleeting_twice_fraction=0.3,
        fleeting_late_fraction=draw.choice([0.0, 0.4]),
        ack_lost_fraction=0.1,
    )
    return Plan(
        seed,
        1,
        1,
        models,
        steps,
        faults,
        HostFaults(park_stays_fraction=draw.choice([0.2, 0.5]), wake_fails_fraction=0.2),
    )


def _crowded() -> tuple[DeploymentSpec, ...]:
    """Most of the GPU for each in turn; one wish is too large, one cannot be enforced."""
    swap = SwapSpec(warm_window_s=5.0, minimum_residency_s=3.0)
    small = inference("x", weights_gb=20, portion=0.3, swap=SwapSpec(warm_window_s=1.0, cold_after_s=4.0))
    unenforced = ShareSpec(request_portion=0.2, minimum_grade=IsolationGrade.HARDWARE)
    return (
        inference("x", weights_gb=20, portion=0.9, swap=swap),
        inference("x", weights_gb=20, portion=0.7, swap=swap),
        small,
        training("x", weights_gb=10, portion=0.5),
        inference("x", weights_gb=20, portion=1.5),
        replace(small, share=unenforced),
    )


def _with_a_fixed_share() -> tuple[DeploymentSpec, ...]:
    """Two may be resident together, beside one that is never parked."""
    swap = SwapSpec(warm_window_s=5.0, minimum_residency_s=1.0)
    return (
        inference("x", weights_gb=20, portion=0.25, swap=SwapSpec(is_parkable=False)),
        inference("x", weights_gb=20, portion=0.5, swap=swap),
        inference("x", weights_gb=20, portion=0.3, swap=swap),
        inference("x", weights_gb=20, portion=0.65, swap=SwapSpec(warm_window_s=1.0, cold_after_s=4.0)),
        training("x", weights_gb=10, portion=0.3),
    )


class HardTrial(Trial):
    """With contracts, and with commands of another tenant and commands that come twice."""

    def __init__(self, plan: Plan, services: Mapping[str, Service[Any]] | None = None) -> None:
        self.contracts = Contracts(inbox=lambda: self.system.simulation.inbox)
        self.cold = ColdConduct()
        super().__init__(plan, services)
        self.conduct.load_fresh_s = self.cold.load_fresh_s = 3.0 + (
            plan.faults.late_s if plan.faults.fleeting_late_fraction else 0.0
        )

    def _hear(self, stored: Stored, fact: Fact) -> None:
        super()._hear(stored, fact)
        self.contracts.hear(stored, fact)
        self.cold.heard_load_at_s = self.conduct.heard_load_at_s
        self.cold.hear(fact)

    def _do(self, step: Step) -> None:
        system, name = self.system, self.names[step.which % len(self.names)]
        kind = (ParkRequested, WakeRequested, RetireRequested)[step.which % 3]
        match step.kind:
            case "stranger":
                self._command_count += 1
                system.simulation.command("stranger", kind(command_id=f"s{self._command_count}", model=name))
            case "twice":
                self._command_count += 1
                for _ in range(2):
                    system.command(
                        (ParkRequested, WakeRequested)[step.which % 2](command_id=f"x{self._command_count}", model=name)
                    )
            case _:
                super()._do(step)


def check_everything(seed: int, services: Mapping[str, Service[Any]]) -> None:
    """Raises what the first check raises that finds something."""
    trial = HardTrial(plan(seed), services)
    trial.run()
    trial.system.check()
    assert_placed_explained_or_retired(trial)
    assert_services_agree(trial)
    assert_all_requests_answered(trial)
    trial.contracts.check_answers(trial.system.simulation.replies)
    trial.contracts.check_proposals()

"""Steps hang in whole simulated systems: all is adopted or ended in time, and faults planted in that are noticed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kit.outcomes import Context, Outcome
from kit.service import Service
from schemas.nodes import ReplicaSuspect
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import EngineDoubtful, EngineFound, EngineUnexplained, LookAtEngine
from services.nodeagent.state import NodeState, fold_suspect
from services.swarm.plan import Step, draw_plan
from services.swarm.run import Outcome as Ended
from services.swarm.run import carry_out

LASTS_S = 400.0
SEEDS = range(12)
"""Each planted fault is noticed with one of these, and without one none of them breaks anything."""


def run(seed: int, nodeagent: Service[NodeState] | None = None) -> Ended:
    """Parks, wakes and stops hang, and now and then an engine is silent while its agent comes back."""
    plan = draw_plan(seed, lasts_s=LASTS_S)
    returns = [
        step
        for number, at_s in enumerate(range(40, int(LASTS_S), 40))
        for step in (
            Step(1000 + 2 * number, at_s, "engine-hung", which=number, lasts_s=25.0),
            Step(1001 + 2 * number, at_s + 1.0, "all-down", lasts_s=1.0),
        )
    ]
    steps = tuple(sorted((*plan.steps, *returns), key=lambda step: step.at_s))
    plan = replace(plan, steps=steps, host_faults=replace(plan.host_faults, step_hangs_fraction=0.3))
    return carry_out(plan, {"nodeagent": nodeagent} if nodeagent else None)


def never_resolved() -> Service[NodeState]:
    """What a look finds is forgotten."""

    def nothing(state: NodeState, item: Any, ctx: Context) -> Sequence[Outcome]:
        return []

    return replace(SERVICE, handlers={**SERVICE.handlers, EngineFound: nothing, EngineUnexplained: nothing})


def killed_though_adoptable() -> Service[NodeState]:
    """The first look may end it already."""
    real = SERVICE.handlers[EngineDoubtful]

    def at_once(state: NodeState, item: EngineDoubtful, ctx: Context) -> Sequence[Outcome]:
        return [replace(o, may_end=True) if isinstance(o, LookAtEngine) else o for o in real(state, item, ctx)]

    return replace(SERVICE, handlers={**SERVICE.handlers, EngineDoubtful: at_once})


def bytes_let_go() -> Service[NodeState]:
    """A suspect holds nothing."""

    def fold(state: NodeState, fact: ReplicaSuspect) -> None:
        fold_suspect(state, fact)
        state.replicas[fact.replica_id].kept_bytes = {}

    return replace(SERVICE, folds={**SERVICE.folds, ReplicaSuspect: fold})


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_that_hang_break_nothing(seed: int) -> None:
    outcome = run(seed)

    assert outcome.failure is None, outcome.failure


@pytest.mark.parametrize("plant", [never_resolved, killed_though_adoptable, bytes_let_go])
def test_a_fault_planted_in_how_suspects_are_handled_is_noticed(plant: Callable[[], Service[NodeState]]) -> None:
    assert any(run(seed, plant()).failure is not None for seed in SEEDS), f"{plant.__name__} was not noticed"

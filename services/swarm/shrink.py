"""Makes a failing plan small: takes steps away, halves first and then one by one, as long as the same thing breaks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kit.service import Service
from services.swarm.plan import Plan, Step
from services.swarm.run import Failure, Outcome, carry_out

RUNS_MAX: Final = 400
SECONDS_MAX: Final = 120.0
MARGIN_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """The smallest plan that was found, and what it breaks."""

    plan: Plan
    failure: Failure
    run_count: int
    original_count: int
    """Steps of the plan that failed first."""

    @property
    def replay(self) -> str:
        """One line for a shell."""
        return replay_line(self.plan)

    def text(self) -> str:
        steps = "step" if len(self.plan.steps) == 1 else "steps"
        return "\n".join(
            [
                f"seed {self.plan.seed} failed: {self.failure.message.splitlines()[0]}",
                f"of {self.original_count} steps {len(self.plan.steps)} {steps} are left after {self.run_count} runs:",
                self.plan.text(),
                f"replay: {self.replay}",
            ]
        )


def replay_line(plan: Plan) -> str:
    only = ",".join(str(step.number) for step in plan.steps)
    return f"python -m services sim --seed {plan.seed} --seconds {plan.lasts_s:g} --only {only or 'none'}"


def shrink(
    outcome: Outcome,
    *,
    services: Mapping[str, Service[Any]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Shrunk:
    """Delta debugging over the steps of a failed run. A candidate counts when its failure has the same signature.

    The plan keeps its length, because the times of later steps depend on nothing before them; only what is after the
    failure is cut off at once. Ends after `RUNS_MAX` runs or `SECONDS_MAX`, with the best so far.
    """
    assert outcome.failure is not None
    search = _Search(outcome.plan, outcome.failure, services, ends_s=clock() + SECONDS_MAX, clock=clock)
    at_s = outcome.failure.at_s + MARGIN_S
    search.try_these([step for step in outcome.plan.steps if step.at_s <= at_s])
    for kind in sorted({step.kind for step in search.plan.steps}):
        search.try_these([step for step in search.plan.steps if step.kind != kind])
    size = max(1, len(search.plan.steps) // 2)
    while search.has_time:
        begun_count = len(search.plan.steps)
        _take_away(search, size)
        if size == 1 and len(search.plan.steps) == begun_count:
            break
        size = max(1, min(size // 2, len(search.plan.steps) // 2))
    return Shrunk(
        plan=search.plan,
        failure=search.failure,
        run_count=search.run_count,
        original_count=len(outcome.plan.steps),
    )


def _take_away(search: "_Search", size: int) -> None:
    """Once through the plan, in pieces of this size, the last first: what came late is most often noise."""
    begin = max(0, len(search.plan.steps) - size)
    while search.has_time:
        steps = search.plan.steps
        search.try_these([*steps[:begin], *steps[begin + size :]])
        if begin == 0:
            return
        begin = max(0, min(begin, len(search.plan.steps)) - size)


@dataclass(slots=True)
class _Search:
    plan: Plan
    failure: Failure
    services: Mapping[str, Service[Any]] | None
    ends_s: float
    clock: Callable[[], float]
    run_count: int = 0

    @property
    def has_time(self) -> bool:
        return self.run_count < RUNS_MAX and self.clock() < self.ends_s

    def try_these(self, steps: Sequence[Step]) -> bool:
        """Take the smaller plan if it breaks the same."""
        if len(steps) == len(self.plan.steps) or not self.has_time:
            return False
        candidate = replace(self.plan, steps=tuple(steps))
        self.run_count += 1
        failure = carry_out(candidate, self.services).failure
        if failure is None or failure.signature != self.failure.signature:
            return False
        self.plan, self.failure = candidate, failure
        return True

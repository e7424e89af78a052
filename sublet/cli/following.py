"""Following a deployment until it is where it shall be: phases on stderr, and an error that says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sublet import _contract as contract
from sublet import quantities
from sublet.cli import words
from sublet.cli.session import POLL_S, Session
from sublet.errors import Failed, NotPlaced, SubletError, TimedOut

if TYPE_CHECKING:
    from sublet.client import Client

# Engines start within a fraction of a second of their grant when there is room; after this long there is none now.
SETTLED_S: Final = 5.0

Goal = Callable[[contract.DeploymentView | None], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """Where a deployment was when following ended; `error` says why it is not where it shall be."""

    model: str
    view: contract.DeploymentView | None
    error: SubletError | None
    took_s: float


def is_up(view: contract.DeploymentView | None) -> bool:
    """Ready; or so far that the next request brings it: it was ready and has been parked since."""
    return view is not None and bool(view.replicas) and view.replicas[0].state in ("resident", "parked")


def is_granted(view: contract.DeploymentView | None) -> bool:
    """Placed, with its share, but not started: that waits for room, or for the first request."""
    return view is not None and bool(view.replicas) and view.replicas[0].state == "granted"


def is_up_or_cold(view: contract.DeploymentView | None) -> bool:
    """The same for a deployment that was there before: it may have gone cold."""
    return is_up(view) or is_granted(view)


def is_resident(view: contract.DeploymentView | None) -> bool:
    return view is not None and bool(view.replicas) and view.replicas[0].state == "resident"


def is_off_the_gpu(view: contract.DeploymentView | None) -> bool:
    """Parked, or cold, which holds no more."""
    return view is None or not view.replicas or view.replicas[0].state in ("parked", "granted")


def is_gone(view: contract.DeploymentView | None) -> bool:
    return view is None


async def follow(
    session: Session, client: Client, goals: dict[str, Goal], *, timeout_s: float, may_vanish: bool = False
) -> list[Followed]:
    """Poll until each model has reached its goal, failed, or the time is up; in the order of `goals`."""
    started_s = session.monotonic_s()
    phases: dict[str, str] = {}
    done: dict[str, Followed] = {}
    granted_since_s: dict[str, float] = {}
    while True:
        views = {view.deployment.name: view for view in (await client.deployments()).deployments}
        took_s = session.monotonic_s() - started_s
        for model in pending(goals, done):
            view = views.get(model)
            if view is None and model not in phases and not goals[model](None) and took_s < timeout_s:
                continue  # Answered, but not yet listed by whoever answers queries now.
            if phases.get(model) != (phase := words.phase_of(view)):
                phases[model] = phase
                session.say(f"  {model}  {phase}  {quantities.seconds(took_s)}")
            if is_granted(view):
                granted_since_s.setdefault(model, took_s)
            has_settled = took_s - granted_since_s.get(model, took_s) >= SETTLED_S and is_granted(view)
            if goals[model](view) or (has_settled and goals[model] is is_up):
                done[model] = Followed(model=model, view=view, error=None, took_s=took_s)
            elif error := why_not(model, view, may_vanish=may_vanish):
                done[model] = Followed(model=model, view=view, error=error, took_s=took_s)
            elif took_s >= timeout_s:
                done[model] = Followed(model=model, view=view, error=_overdue(model, phase, timeout_s), took_s=took_s)
        if len(done) == len(goals):
            return [done[model] for model in goals]
        await session.sleep(POLL_S)


def pending(goals: Iterable[str], done: dict[str, Followed]) -> list[str]:
    return [model for model in goals if model not in done]


def why_not(model: str, view: contract.DeploymentView | None, *, may_vanish: bool) -> SubletError | None:
    """The error that ends following: not placed, failed, taken away; None while there is hope."""
    if view is None:
        return None if may_vanish else Failed(f"{model} was retired meanwhile", code="retired")
    if not view.replicas and view.problem:
        fix = view.remedy or f"sublet explain {model}"
        return NotPlaced(f"{model} is not placed: {view.problem}", fix=fix)
    failed = next((replica for replica in view.replicas if replica.state == "failed"), None)
    if failed is not None:
        return Failed(
            f"{model} failed on {words.place_of(failed)}",
            cause=failed.problem,
            fix=f"sublet logs {model}",
            code="engine_failed",
        )
    return None


def _overdue(model: str, phase: str, timeout_s: float) -> TimedOut:
    return TimedOut(
        f"{model} is not there yet after {quantities.span(timeout_s)}; the work goes on",
        facts=(f"now: {phase}",),
        fix=f"sublet explain {model}",
    )

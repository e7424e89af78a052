"""A service of a few lines, for tests of the shells: it answers each retirement with a fact."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kit.outcomes import Context, Effect, Input, Outcome, Timer
from kit.service import Service
from schemas.autoscaler import ReplicasDecided
from schemas.gateways import ModelWanted
from schemas.placement import DeploymentRetired
from schemas.queries import DeploymentList, ListDeployments


@dataclass(slots=True)
class ToyState:
    decided: list[str] = field(default_factory=list)
    """Models, in the order of their facts."""
    retired: list[str] = field(default_factory=list)
    observed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Effect):
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDone(Input):
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reminder(Input):
    model: str


def decided(model: str, ctx: Context, reason: str) -> ReplicasDecided:
    return ReplicasDecided(at_s=ctx.now_s, deployment_id=f"d-{model}", model=model, replica_count=1, reason=reason)


def toy(*, resumed: Sequence[Outcome] = ()) -> Service[ToyState]:
    service: Service[ToyState] = Service(
        name="autoscaler",
        new_state=lambda _: ToyState(),
        reads=lambda _: ["sublet.fact.placement.>"],
        on_start=lambda _state, _ctx: list(resumed),
    )

    @service.folding(ReplicasDecided)
    def fold_decided(state: ToyState, fact: ReplicasDecided) -> None:
        state.decided.append(f"{fact.model}:{fact.reason}")

    @service.folding(DeploymentRetired)
    def fold_retired(state: ToyState, fact: DeploymentRetired) -> None:
        state.retired.append(fact.model)

    @service.on(DeploymentRetired)
    def retired(state: ToyState, fact: DeploymentRetired, ctx: Context) -> Sequence[Outcome]:
        return [decided(fact.model, ctx, f"after {len(state.retired)}"), Work(model=fact.model)]

    @service.observing(ModelWanted)
    def observe(state: ToyState, wanted: ModelWanted, now_s: float) -> None:
        state.observed[wanted.model] = state.observed.get(wanted.model, 0) + 1

    @service.on(ModelWanted)
    def wanted(state: ToyState, wanted: ModelWanted, ctx: Context) -> Sequence[Outcome]:
        return [Timer(due_s=ctx.now_s + 0.05, input=Reminder(model=wanted.model))]

    @service.on(Reminder)
    def reminded(state: ToyState, reminder: Reminder, ctx: Context) -> Sequence[Outcome]:
        return [decided(reminder.model, ctx, "reminded")]

    @service.on(WorkDone)
    def done(state: ToyState, result: WorkDone, ctx: Context) -> Sequence[Outcome]:
        return [decided(result.model, ctx, "done")]

    @service.answering(ListDeployments)
    def answer(state: ToyState, query: ListDeployments, tenant: str) -> DeploymentList:
        return DeploymentList(deployments=(), labels=tuple(state.decided))

    return service

"""Faults in preemption: who gives way, and for whom the room is kept."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from kit.outcomes import Context, Outcome
from kit.service import Service
from schemas.placement import (
    DeploymentAdmitted,
    PlacementFailed,
    PreemptionDecided,
    PreemptionEnded,
    ReleaseProposed,
    Victim,
)
from services.placement import claims
from services.placement.core import SERVICE as PLACEMENT
from services.placement.gangs import PlaceNext
from services.placement.preemption import Preemption, may_displace_from_s
from services.placement.state import ClusterState, Deployment, Replica
from tests.properties.planted.bug import Bug, with_fold, with_handler
from tests.properties.planted.displacement_trial import check_displacement

May = Callable[[Replica, Deployment], bool]


def _also(may: May) -> Service[Any]:
    """Who fits nowhere displaces one of those, too."""

    def handler(state: ClusterState, due: PlaceNext, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(PLACEMENT.handlers[PlaceNext](state, due, ctx))
        for failed in [o for o in outcomes if isinstance(o, PlacementFailed)]:
            deployment = state.deployments[failed.deployment_id]
            if ctx.now_s < may_displace_from_s(deployment):
                continue
            there = [r for r in state.replicas.values() if r.state == "resident" and not r.is_releasing]
            allowed = [r for r in there if may(r, deployment) and r.replica_id not in state.index.claim_of_victim]
            if allowed and not any(isinstance(o, PreemptionDecided) for o in outcomes):
                outcomes.remove(failed)
                return [*outcomes, *_decided(state, deployment, allowed[0], failed.replica_id, ctx)]
        return outcomes

    return with_handler(PLACEMENT, PlaceNext, handler)


def _decided(
    state: ClusterState, deployment: Deployment, replica: Replica, replica_id: str, ctx: Context
) -> list[Outcome]:
    preemption = Preemption(
        node=replica.node,
        gpu_uuids=replica.gpu_uuids,
        request_bytes=tuple(share.request_bytes for share in replica.shares),
        victims=(_victim(replica),),
        reason="as planted",
    )
    return claims.decided(state, deployment, preemption, replica_id=replica_id, ctx=ctx)


def _victim(replica: Replica) -> Victim:
    return Victim(
        replica_id=replica.replica_id,
        deployment_id=replica.deployment_id,
        model="m",
        tenant=replica.tenant,
        priority=replica.priority,
        freed_bytes=replica.request_bytes,
        reason="as planted",
    )


def a_newcomer_that_displaces_its_equal() -> Service[Any]:
    return _also(lambda r, newcomer: r.is_preemptible and r.priority == newcomer.spec.priority_number)


def a_newcomer_that_takes_a_guarantee() -> Service[Any]:
    return _also(lambda r, newcomer: not r.is_preemptible and r.priority < newcomer.spec.priority_number)


def one_victim_too_many() -> Service[Any]:
    def handler(state: ClusterState, due: PlaceNext, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(PLACEMENT.handlers[PlaceNext](state, due, ctx))
        leaving = {o.replica_id for o in outcomes if isinstance(o, ReleaseProposed)}
        for at, decided in enumerate(outcomes):
            if not isinstance(decided, PreemptionDecided):
                continue
            priority = state.deployments[decided.deployment_id].spec.priority_number
            for replica in state.on_gpu(decided.gpu_uuids[0]):
                is_free = not replica.is_releasing and replica.replica_id not in leaving
                if is_free and replica.is_preemptible and replica.priority < priority:
                    outcomes[at] = replace(decided, victims=(*decided.victims, _victim(replica)))
                    release = ReleaseProposed(
                        at_s=ctx.now_s, node=replica.node, replica_id=replica.replica_id, reason="as planted"
                    )
                    return [*outcomes, release]
        return outcomes

    return with_handler(PLACEMENT, PlaceNext, handler)


def room_that_is_not_kept() -> Service[Any]:
    """Whoever comes first gets what the victims leave."""

    def decided(state: ClusterState, fact: PreemptionDecided) -> None:
        PLACEMENT.folds[PreemptionDecided](state, fact)
        if fact.preemption_id in state.claims:
            state.index.rooms.unclaim(state.claims[fact.preemption_id])

    def ended(state: ClusterState, fact: PreemptionEnded) -> None:
        if fact.preemption_id in state.claims:
            state.index.rooms.claim(state.claims[fact.preemption_id])
        PLACEMENT.folds[PreemptionEnded](state, fact)

    return with_fold(with_fold(PLACEMENT, PreemptionDecided, decided), PreemptionEnded, ended)


def a_minimum_runtime_that_is_forgotten() -> Service[Any]:
    def fold(state: ClusterState, fact: DeploymentAdmitted) -> None:
        spec = fact.deployment
        impatient = replace(spec, placement=replace(spec.placement, minimum_runtime_s=0.0))
        PLACEMENT.folds[DeploymentAdmitted](state, replace(fact, deployment=impatient))

    return with_fold(PLACEMENT, DeploymentAdmitted, fold)


_PLANTED: tuple[tuple[Callable[[], Service[Any]], str, str], ...] = (
    (a_newcomer_that_displaces_its_equal, "I2", "equals take turns for ever; each victim's priority"),
    (a_newcomer_that_takes_a_guarantee, "I2", "what is not preemptible ends; each victim's own wish"),
    (one_victim_too_many, "preemption", "somebody ends in vain; the newcomer fits without his end"),
    (room_that_is_not_kept, "preemption", "somebody else gets the room; each proposal beside open claims"),
    (a_minimum_runtime_that_is_forgotten, "preemption", "work is lost too soon; each victim's time since it was ready"),
)


def _play(plant: Callable[[], Service[Any]], seed: int) -> None:
    check_displacement(seed, {"placement": plant()})


BUGS = tuple(
    Bug(name=plant.__name__.replace("_", " "), guards=guards, breaks=breaks, play=partial(_play, plant))
    for plant, guards, breaks in _PLANTED
)
SOUND = Bug(name="nothing", guards="", breaks="", play=partial(_play, lambda: PLACEMENT))

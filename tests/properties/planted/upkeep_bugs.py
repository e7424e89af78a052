"""Faults in placement's upkeep: nodes that are lost and come back, and replicas that are moved."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from kit.outcomes import Context, Outcome
from kit.service import Service
from schemas.nodes import LeaseGranted
from schemas.placement import MoveEnded, NodeLost, NodeReturned, ReleaseProposed
from services.placement.core import SERVICE as PLACEMENT
from services.placement.presence import LookAround, SettleReturned, Trim
from services.placement.state import ClusterState
from tests.properties.planted.bug import Bug, with_fold, with_handler, without
from tests.properties.planted.upkeep_trial import check_upkeep


def a_move_that_does_not_wait_for_its_replacement() -> Service[Any]:
    """The old one is released as soon as the new one has its lease."""

    def handler(state: ClusterState, fact: LeaseGranted, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(PLACEMENT.handlers[LeaseGranted](state, fact, ctx))
        granted = {replica.replica_id for replica in fact.replicas}
        for move in state.moves.values():
            old = state.replicas.get(move.replica_id)
            if move.replacement_id in granted and old is not None and not old.is_releasing:
                reason = f"moved to {fact.node}"
                outcomes += [
                    ReleaseProposed(at_s=ctx.now_s, node=old.node, replica_id=old.replica_id, reason=reason),
                    MoveEnded(at_s=ctx.now_s, move_id=move.move_id, is_done=True, reason="granted"),
                ]
        return outcomes

    return with_handler(PLACEMENT, LeaseGranted, handler)


def a_lost_node_that_still_takes_new_replicas() -> Service[Any]:
    def fold(state: ClusterState, fact: NodeLost) -> None:
        PLACEMENT.folds[NodeLost](state, fact)
        state.index.rooms.fleet.set_open(fact.node, True)

    return with_fold(PLACEMENT, NodeLost, fold)


def a_quarantine_that_never_ends() -> Service[Any]:
    def fold(state: ClusterState, fact: NodeReturned) -> None:
        forever = replace(fact, quarantine_s=1e9) if fact.quarantine_s else fact
        PLACEMENT.folds[NodeReturned](state, forever)

    return with_fold(PLACEMENT, NodeReturned, fold)


def a_quarantine_that_is_only_told() -> Service[Any]:
    def fold(state: ClusterState, fact: NodeReturned) -> None:
        PLACEMENT.folds[NodeReturned](state, replace(fact, quarantine_s=0.0))

    return with_fold(PLACEMENT, NodeReturned, fold)


def a_return_that_ends_both_copies() -> Service[Any]:
    def handler(state: ClusterState, due: SettleReturned, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(PLACEMENT.handlers[SettleReturned](state, due, ctx))
        for release in [o for o in outcomes if isinstance(o, ReleaseProposed)]:
            deployment_id = state.replicas[release.replica_id].deployment_id
            outcomes += [
                replace(release, node=twin.node, replica_id=twin.replica_id)
                for twin in state.replicas_of(deployment_id)
                if twin.replica_id != release.replica_id and not twin.is_releasing
            ]
        return outcomes

    return with_handler(PLACEMENT, SettleReturned, handler)


def a_return_that_leaves_both_copies() -> Service[Any]:
    return without(without(PLACEMENT, SettleReturned, ReleaseProposed), Trim, ReleaseProposed)


def a_placement_that_takes_its_own_deafness_for_losses() -> Service[Any]:
    def handler(state: ClusterState, due: LookAround, ctx: Context) -> Sequence[Outcome]:
        state.observed.heard_at_s = ctx.now_s
        return PLACEMENT.handlers[LookAround](state, due, ctx)

    return with_handler(PLACEMENT, LookAround, handler)


_PLANTED: tuple[tuple[Callable[[], Service[Any]], str, str], ...] = (
    (
        a_move_that_does_not_wait_for_its_replacement,
        "move",
        "a request may find nobody; each release of a moved replica is held against its replacement's life",
    ),
    (a_lost_node_that_still_takes_new_replicas, "node lost", "replicas go where nobody is; each proposal's node"),
    (a_quarantine_that_never_ends, "node flaps", "a sound node stays empty; all is healed and a wish has no place"),
    (a_quarantine_that_is_only_told, "node flaps", "replicas go there at once; each proposal's time"),
    (a_return_that_ends_both_copies, "node back", "nobody is left; of those too many one must stay"),
    (a_return_that_leaves_both_copies, "node back", "two run where one was wished for; copies are counted at the end"),
    (
        a_placement_that_takes_its_own_deafness_for_losses,
        "I7",
        "no news of anybody is a loss of all; each loss is held against what was heard",
    ),
)


def _play(plant: Callable[[], Service[Any]], seed: int) -> None:
    check_upkeep(seed, {"placement": plant()})


BUGS = tuple(
    Bug(name=plant.__name__.replace("_", " "), guards=guards, breaks=breaks, play=partial(_play, plant))
    for plant, guards, breaks in _PLANTED
)
SOUND = Bug(name="nothing", guards="", breaks="", play=partial(_play, lambda: PLACEMENT))

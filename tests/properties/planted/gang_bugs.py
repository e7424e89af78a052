"""Faults in a node agent's gangs and in its account of several GPUs, tried alone, with facts as the only judges."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import Any

from msgspec.structs import replace

from kit.outcomes import Context, Outcome, Timer
from kit.service import Service
from schemas.nodes import LeaseGranted
from schemas.placement import PlacementProposed
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import GangHoldOver
from services.nodeagent.state import NodeState
from tests.properties.planted.bug import Bug, with_fold, with_handler
from tests.properties.wide import Alone

STEP_COUNT = 30


def a_gang_that_starts_before_its_commit() -> Service[Any]:
    """What is granted is begun, gang or not."""

    def fold(state: NodeState, fact: LeaseGranted) -> None:
        SERVICE.folds[LeaseGranted](state, replace(fact, gang_id=""))

    def handler(state: NodeState, fact: PlacementProposed, ctx: Context) -> Sequence[Outcome]:
        outcomes = SERVICE.handlers[PlacementProposed](state, replace(fact, gang_id=""), ctx)
        return [replace(o, gang_id=fact.gang_id) if isinstance(o, LeaseGranted) else o for o in outcomes]

    return with_fold(with_handler(SERVICE, PlacementProposed, handler), LeaseGranted, fold)


def an_account_of_the_first_shard_only() -> Service[Any]:
    def fold(state: NodeState, fact: LeaseGranted) -> None:
        first = tuple(lease for lease in fact.leases if lease.shard_index == 0)
        SERVICE.folds[LeaseGranted](state, replace(fact, leases=first))

    return with_fold(SERVICE, LeaseGranted, fold)


def an_agent_that_forgets_to_end_a_held_gang() -> Service[Any]:
    def handler(state: NodeState, over: GangHoldOver, ctx: Context) -> Sequence[Outcome]:
        return []

    return with_handler(SERVICE, GangHoldOver, handler)


def an_agent_that_forgets_a_held_gang_when_it_returns() -> Service[Any]:
    def on_start(state: NodeState, ctx: Context) -> Sequence[Outcome]:
        return [o for o in SERVICE.on_start(state, ctx) if not isinstance(o, Timer)]

    return changed(SERVICE, on_start=on_start)


def play(plant: Callable[[], Service[Any]], seed: int) -> None:
    """Thirty things that happen to one agent of three GPUs."""
    draw = random.Random(seed)  # Reproducible by design.
    Alone(draw.choice, plant()).play(STEP_COUNT)


_PLANTED = (
    (a_gang_that_starts_before_its_commit, "I4: gang", "a part runs without the rest; each start is held against it"),
    (an_account_of_the_first_shard_only, "I1", "wide replicas are booked on one GPU; the account from facts"),
    (an_agent_that_forgets_to_end_a_held_gang, "I4: gang", "room is kept for nobody; held leases have an end"),
    (an_agent_that_forgets_a_held_gang_when_it_returns, "take-over: timers", "likewise, after a restart"),
)
BUGS = tuple(
    Bug(name=plant.__name__.replace("_", " "), guards=guards, breaks=breaks, play=partial(play, plant))
    for plant, guards, breaks in _PLANTED
)
SOUND = Bug(name="nothing", guards="", breaks="", play=partial(play, lambda: SERVICE))

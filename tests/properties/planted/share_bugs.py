"""Faults in how shares grow and shrink, tried on one agent alone, in random histories with borrowers that disobey."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from msgspec.structs import replace as changed

from kit.outcomes import Context, Outcome
from kit.service import Service
from schemas.nodes import GaveBack, GiveBackStep, LeaseResized, ReplicaWaking, ResizeReason
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import (
    BurstDue,
    EngineNotResized,
    EngineParked,
    EngineResized,
    EngineStayed,
    EvictEngine,
    GiveBackDue,
    WakeEngine,
)
from tests.properties.planted.bug import Bug, with_fold, with_handler, without
from tests.properties.test_bursts import Bursting

STEP_COUNT = 120


def a_burst_of_claimed_bytes() -> Service[Any]:
    """Each burster gets all that is free, as if it were alone."""

    def handler(state: Any, due: BurstDue, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(SERVICE.handlers[BurstDue](state, due, ctx))
        grown = [o for o in outcomes if isinstance(o, LeaseResized) and o.reason is ResizeReason.BURST]
        if not grown:
            return outcomes
        replica = state.replicas[grown[0].replica_id]
        limits = tuple(share.limit_bytes for share in replica.proposal.shares)
        return [changed(o, granted_bytes=limits) if o is grown[0] else o for o in outcomes]

    return with_handler(SERVICE, BurstDue, handler)


def a_grant_that_shrinks_before_its_proof() -> Service[Any]:
    """A borrower that did not shrink is believed to have."""

    def handler(state: Any, failed: EngineNotResized, ctx: Context) -> Sequence[Outcome]:
        replica = state.replicas.get(failed.replica_id)
        if replica is None:
            return []
        least = tuple(replica.request_bytes.values())
        return SERVICE.handlers[EngineNotResized](state, replace(failed, granted_bytes=least), ctx)

    return with_handler(SERVICE, EngineNotResized, handler)


def a_freeze_that_is_forgotten() -> Service[Any]:
    """The first step has an end that nobody hears of, in time or after."""

    def deaf(handler: Callable[..., Sequence[Outcome]]) -> Callable[..., Sequence[Outcome]]:
        def handle(state: Any, item: Any, ctx: Context) -> Sequence[Outcome]:
            replica = state.replicas.get(item.replica_id)
            giving = replica.giving_back if replica is not None else None
            return [] if giving is not None and giving.step == "freeze" else handler(state, item, ctx)

        return handle

    handlers: dict[type, Any] = {
        kind: deaf(SERVICE.handlers[kind]) for kind in (EngineResized, EngineNotResized, GiveBackDue)
    }
    quiet = _quiet_tick(SERVICE)
    return replace(quiet, handlers={**quiet.handlers, **handlers})


def a_ladder_that_never_ends() -> Service[Any]:
    """Nobody is ever stopped, however long it disobeys."""
    service = _quiet_tick(SERVICE)
    for kind in (EngineNotResized, EngineResized, EngineStayed, GiveBackDue):
        service = without(service, kind, EvictEngine)
    return service


def a_checkpoint_that_nobody_brings_back() -> Service[Any]:
    """A borrower that is never to be away is parked with its state, and left so."""
    return without(SERVICE, EngineParked, ReplicaWaking, WakeEngine)


def a_ladder_that_parks_whom_it_may_not() -> Service[Any]:
    """The engine's own sleep, for one that is guaranteed its place."""

    def fold(state: Any, fact: GaveBack) -> None:
        SERVICE.folds[GaveBack](state, fact)
        replica = state.replicas.get(fact.replica_id)
        giving = replica.giving_back if replica is not None else None
        if giving is not None and giving.step is GiveBackStep.CHECKPOINT:
            replica.giving_back = replace(giving, step=GiveBackStep.PARK)

    return with_fold(SERVICE, GaveBack, fold)


def a_growth_that_is_tried_for_ever() -> Service[Any]:
    """What an engine has said of itself is forgotten."""

    def fold(state: Any, fact: LeaseResized) -> None:
        SERVICE.folds[LeaseResized](state, changed(fact, is_able=True))

    return with_fold(SERVICE, LeaseResized, fold)


def a_grant_that_shrinks_untold() -> Service[Any]:
    """Bytes are promised to the next in line, and no fact says that they were given back."""
    return without(SERVICE, EngineResized, LeaseResized)


def _quiet_tick(service: Service[Any]) -> Service[Any]:
    """Without the look that ends steps which were forgotten."""

    def handler(state: Any, due: BurstDue, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(service.handlers[BurstDue](state, due, ctx))
        return [] if any(isinstance(o, EvictEngine | GaveBack) for o in outcomes) else outcomes

    return with_handler(service, BurstDue, handler)


class Disobedient(Bursting):
    """What engines really use: a grant that is told smaller than that was not proven."""

    def _handle(self, item: Any) -> None:
        before = self.agent.state.replicas.get(getattr(item, "replica_id", ""))
        is_newest = before is not None and before.resize_epoch == getattr(item, "resize_epoch", -1)
        super()._handle(item)
        if isinstance(item, EngineResized | EngineNotResized) and is_newest and before is not None:
            pairs = zip(before.granted_bytes, item.granted_bytes, strict=True)
            is_there = before.residency == "resident" and before.lease_epoch == item.lease_epoch
            is_enough = all(granted >= used for granted, used in pairs)
            assert is_enough or not is_there, f"{item.replica_id} uses more than it has"


def play(plant: Callable[[], Service[Any]], seed: int) -> None:
    draw = random.Random(seed)  # Reproducible by design.
    Disobedient(draw.choice, plant()).play(STEP_COUNT)


def _bug(plant: Callable[[], Service[Any]], guards: str, breaks: str) -> Bug:
    return Bug(name=plant.__name__.replace("_", " "), guards=guards, breaks=breaks, play=partial(play, plant))


BUGS = (
    _bug(a_burst_of_claimed_bytes, "I1", "the same free bytes go to two; the account of facts exceeds the GPU"),
    _bug(a_grant_that_shrinks_before_its_proof, "I3", "bytes in use are promised; use exceeds the grant"),
    _bug(a_grant_that_shrinks_untold, "I1", "a wake takes bytes that another holds by the facts"),
    _bug(a_checkpoint_that_nobody_brings_back, "I4", "one that is never to be away stays away; its next fact shows it"),
    _bug(a_ladder_that_parks_whom_it_may_not, "the ladder", "one that is never to be parked is; its step shows it"),
    _bug(
        a_growth_that_is_tried_for_ever, "abilities", "an engine that cannot grow is granted more; its grant shows it"
    ),
    _bug(a_freeze_that_is_forgotten, "I4", "the owner waits for ever; the last look finds it"),
    _bug(a_ladder_that_never_ends, "I4", "who disobeys keeps what it owes; the last look finds it"),
)
SOUND = Bug(name="shares: nothing", guards="", breaks="nothing is planted", play=partial(play, lambda: SERVICE))

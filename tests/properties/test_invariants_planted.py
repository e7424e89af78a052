"""The checks can fail: each fault planted here in a copy of a service is found by one of them.

A copy differs from the real service in one handler, fold or observer; nothing in production code knows of it.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as changed
from typing import Any

import pytest
from msgspec.structs import replace

from kit.bus import subject_matches
from kit.outcomes import Context, Outcome
from kit.processor import Processor
from kit.service import Service, digest
from kit.simulation import Faults
from schemas.autoscaler import ReplicasDecided
from schemas.deployments import SwapSpec
from schemas.gateways import LoadSampled, ModelLoad
from schemas.inbox import DeployRequested
from schemas.nodes import LeaseGranted, ReplicaParked, ReplicaWaking
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import PlacementFailed
from schemas.swapper import DecisionClosed, ParkDecided, WakeDecided
from services.autoscaler.core import SERVICE as AUTOSCALER
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.core import effect, names
from services.nodeagent.inputs import WakeEngine
from services.nodeagent.simulated import HostFaults
from services.nodeagent.state import NodeState
from services.placement.core import SERVICE as PLACEMENT
from services.swapper import core as swapper_core
from services.swapper.core import SERVICE as SWAPPER
from services.swapper.state import FleetState
from tests.properties.test_invariants_system import (
    Plan,
    Step,
    Trial,
    assert_all_requests_answered,
    assert_placed_explained_or_retired,
    assert_services_agree,
)
from tests.simulation.swarm import inference, training

SEEDS = range(12)


def with_handler(service: Service[Any], kind: type, handler: Callable[..., Sequence[Outcome]]) -> Service[Any]:
    return changed(service, handlers={**service.handlers, kind: handler})


def with_fold(service: Service[Any], kind: type, fold: Callable[..., None]) -> Service[Any]:
    return changed(service, folds={**service.folds, kind: fold})


def plan(seed: int) -> Plan:
    """Models that take turns on one GPU, wanted all the time, on a bad network with crashes."""
    draw = random.Random(seed)  # Reproducible by design.
    swap = SwapSpec(warm_window_s=5.0, minimum_residency_s=3.0)
    models = (
        inference("x", weights_gb=20, portion=0.9, swap=swap),
        inference("x", weights_gb=20, portion=0.7, swap=swap),
        inference("x", weights_gb=20, portion=0.3, swap=SwapSpec(warm_window_s=1.0, cold_after_s=4.0)),
        training("x", weights_gb=10, portion=0.5),
        inference("x", weights_gb=20, portion=1.5),
    )
    kinds = ["request"] * 20 + ["storm"] * 6 + ["crash"] * 5 + ["kill engine", "silence", "silence"]
    steps = tuple(Step(draw.uniform(0, 30), draw.choice(kinds), draw.randrange(99), 8.0) for _ in range(40))
    faults = Faults(fleeting_lost_fraction=0.3, fleeting_twice_fraction=0.3, ack_lost_fraction=0.1)
    host_faults = HostFaults(park_stays_fraction=0.2, wake_fails_fraction=0.2)
    return Plan(seed, 1, 1, models, steps, faults, host_faults)


def check_everything(seed: int, services: Mapping[str, Service[Any]]) -> None:
    trial = Trial(plan(seed), services).run()
    trial.system.check()
    assert_placed_explained_or_retired(trial)
    assert_services_agree(trial)
    assert_all_requests_answered(trial)


# --- Faults, each a copy of one service -------------------------------------------------------------------------------


def a_ledger_that_forgets_residues() -> Service[Any]:
    def fold(state: NodeState, fact: ReplicaParked) -> None:
        NODEAGENT.folds[ReplicaParked](state, replace(fact, residue_bytes=0))

    return with_fold(NODEAGENT, ReplicaParked, fold)


def a_wake_that_does_not_wait_for_its_victims() -> Service[Any]:
    def handler(state: NodeState, order: WakeOrdered, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(NODEAGENT.handlers[WakeOrdered](state, order, ctx))
        replica = state.replicas.get(order.replica_id)
        is_waiting = any(isinstance(o, ReplicaWaking) and not o.is_reserved for o in outcomes)
        if replica is None or not is_waiting or not order.victim_ids:
            return outcomes
        reserved = ReplicaWaking(**names(state, replica, ctx), wake_epoch=replica.wake_epoch, is_reserved=True)
        return [*outcomes, reserved, effect(WakeEngine, replica)]

    return with_handler(NODEAGENT, WakeOrdered, handler)


def a_fold_that_drops_a_fact() -> Service[Any]:
    return changed(SWAPPER, folds={kind: fold for kind, fold in SWAPPER.folds.items() if kind is not ReplicaParked})


def a_swapper_that_ignores_minimum_residency() -> Service[Any]:
    def fold(state: FleetState, fact: LeaseGranted) -> None:
        replicas = tuple(
            replace(r, deployment=replace(r.deployment, swap=replace(r.deployment.swap, minimum_residency_s=0.0)))
            for r in fact.replicas
        )
        SWAPPER.folds[LeaseGranted](state, replace(fact, replicas=replicas))

    return with_fold(SWAPPER, LeaseGranted, fold)


def a_swapper_for_which_silence_is_idleness() -> Service[Any]:
    def handler(state: FleetState, tick: swapper_core.Tick, ctx: Context) -> Sequence[Outcome]:
        idle = tuple(
            ModelLoad(
                deployment_id=r.deployment_id, in_flight_count=0, waiting_count=0, arrived_count=0, last_arrival_s=0.0
            )
            for r in state.replicas.values()
        )
        SWAPPER.observers[LoadSampled](state, LoadSampled(gateway="clients", models=idle), ctx.now_s)
        return SWAPPER.handlers[swapper_core.Tick](state, tick, ctx)

    return with_handler(SWAPPER, swapper_core.Tick, handler)


def a_swapper_that_neither_repeats_an_order_nor_gives_it_up() -> Service[Any]:
    def handler(state: FleetState, tick: swapper_core.Tick, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(SWAPPER.handlers[swapper_core.Tick](state, tick, ctx))
        decided = {o.replica_id for o in outcomes if isinstance(o, WakeDecided | ParkDecided)}
        orders = (WakeOrdered, ParkOrdered)
        kept = [o for o in outcomes if not isinstance(o, orders) or o.replica_id in decided]
        return [o for o in kept if not isinstance(o, DecisionClosed)]

    return with_handler(SWAPPER, swapper_core.Tick, handler)


def a_placement_that_keeps_silent() -> Service[Any]:
    def handler(state: Any, command: DeployRequested, ctx: Context) -> Sequence[Outcome]:
        outcomes = PLACEMENT.handlers[DeployRequested](state, command, ctx)
        return [outcome for outcome in outcomes if not isinstance(outcome, PlacementFailed)]

    return with_handler(PLACEMENT, DeployRequested, handler)


def a_handler_that_changes_the_state_itself() -> Service[Any]:
    def handler(state: Any, fact: LeaseGranted, ctx: Context) -> Sequence[Outcome]:
        for deployment in state.deployments.values():
            deployment.problem = "touched"
        return list(PLACEMENT.handlers[LeaseGranted](state, fact, ctx))

    return with_handler(PLACEMENT, LeaseGranted, handler)


def an_agent_that_grants_whatever_is_proposed() -> Service[Any]:
    """Twice the share that was asked for: what it grants is not what its account says."""

    def fold(state: NodeState, fact: LeaseGranted) -> None:
        halved = tuple(
            replace(r, shares=tuple(replace(s, request_bytes=s.request_bytes // 2) for s in r.shares))
            for r in fact.replicas
        )
        NODEAGENT.folds[LeaseGranted](state, replace(fact, replicas=halved))

    return with_fold(NODEAGENT, LeaseGranted, fold)


PLANTED = (
    a_ledger_that_forgets_residues,
    a_wake_that_does_not_wait_for_its_victims,
    a_fold_that_drops_a_fact,
    a_swapper_that_ignores_minimum_residency,
    a_swapper_for_which_silence_is_idleness,
    a_swapper_that_neither_repeats_an_order_nor_gives_it_up,
    a_placement_that_keeps_silent,
    a_handler_that_changes_the_state_itself,
    an_agent_that_grants_whatever_is_proposed,
)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_a_planted_fault_is_found(planted: Callable[[], Service[Any]]) -> None:
    service = planted()

    assert any(_fails(seed, {service.name: service}) for seed in SEEDS), "no check has noticed it"


def _fails(seed: int, services: Mapping[str, Service[Any]]) -> bool:
    try:
        check_everything(seed, services)
    except (AssertionError, KeyError):
        return True
    return False


def test_nothing_is_found_where_nothing_is_planted() -> None:
    for seed in SEEDS:
        check_everything(seed, {})


# --- Faults of shells -------------------------------------------------------------------------------------------------


def test_a_replay_in_stream_order_is_noticed() -> None:
    """What was read last is not what was handled last: folding by sequence gives another state at some instant."""
    assert any(_differs_in_stream_order(seed) for seed in range(60))


def _differs_in_stream_order(seed: int) -> bool:
    slow = changed(plan(seed), faults=Faults(latency_s=0.2))
    trial = Trial(slow)
    trial.begin()
    for _ in range(120):
        trial.system.run_for(0.25)
        trial.system.simulation.check_replay()
        member = trial.system.simulation.members["swapper"]
        live = member.processor
        if live is None or not member.is_active or member.in_flight is not None or member.waiting:
            continue
        wrong = Processor(member.service, member.settings, writer="swapper", instance="replay")
        newest_seq = 0
        for stored in trial.system.simulation.stream:
            if any(subject_matches(pattern, stored.subject) for pattern in (wrong.prefix, *wrong.reads)):
                wrong.replay_one(stored)
                newest_seq = newest_seq if wrong.is_own(stored) else stored.seq
                wrong.fold_foreign_to(stored.seq)
        if live.cursor_seq == newest_seq and digest(wrong.state) != digest(live.state):
            return True
    return False


def test_a_decision_by_chance_is_noticed() -> None:
    """Randomness that is not the simulation's own gives another trace from the same seed."""
    chance = random.Random()  # Not reproducible, which is the point.

    def handler(state: Any, item: Any, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(AUTOSCALER.handlers[type(item)](state, item, ctx))
        return [replace(o, reason=str(chance.random())) if isinstance(o, ReplicasDecided) else o for o in outcomes]

    broken = changed(AUTOSCALER, handlers=dict.fromkeys(AUTOSCALER.handlers, handler))

    hashes = {Trial(plan(1), {"autoscaler": broken}).run().system.simulation.trace_hash() for _ in range(2)}

    assert 2 == len(hashes)

"""Faults in decisions: each is a copy of one service that differs in one handler, fold, observer or function."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import Any

from msgspec.structs import replace

from kit.bus import subject_matches
from kit.outcomes import Context, Outcome, Reply
from kit.processor import Processor
from kit.service import Service, digest
from kit.simulation import Faults
from schemas.autoscaler import ReplicasDecided
from schemas.deployments import WorkloadKind
from schemas.gateways import LoadSampled, ModelLoad
from schemas.inbox import DeployRequested, ParkRequested, RetireRequested, WakeRequested
from schemas.nodes import (
    LeaseGranted,
    NodeJoined,
    ReplicaDraining,
    ReplicaParked,
    ReplicaWaking,
    WakeRefused,
)
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import PlacementFailed, PlacementProposed
from schemas.swapper import DecisionClosed, ParkDecided, WakeDecided
from schemas.units import GiB
from services.autoscaler.core import SERVICE as AUTOSCALER
from services.autoscaler.core import Tick as ScalerTick
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.core import effect, names
from services.nodeagent.inputs import (
    EngineParked,
    EngineStayed,
    NodeProbed,
    StartEngine,
    WakeEngine,
)
from services.nodeagent.state import NodeState
from services.nodeagent.transitions import Residency
from services.placement.core import SERVICE as PLACEMENT
from services.placement.gangs import PlaceNext
from services.swapper import core as swapper_core
from services.swapper.core import SERVICE as SWAPPER
from services.swapper.state import FleetState
from tests.properties.planted.bug import Bug, with_fold, with_handler, without
from tests.properties.planted.hard_trial import HardTrial, check_everything, plan

# --- The node agent ---------------------------------------------------------------------------------------------------


def a_ledger_that_forgets_residues() -> Service[Any]:
    def fold(state: NodeState, fact: ReplicaParked) -> None:
        NODEAGENT.folds[ReplicaParked](state, replace(fact, residue_bytes=0, shard_residue_bytes=()))

    return with_fold(NODEAGENT, ReplicaParked, fold)


def an_account_that_forgets_the_reserve() -> Service[Any]:
    def fold(state: NodeState, fact: NodeJoined) -> None:
        gpus = tuple(replace(gpu, reserve_bytes=0) for gpu in fact.gpus)
        NODEAGENT.folds[NodeJoined](state, replace(fact, gpus=gpus))

    return with_fold(NODEAGENT, NodeJoined, fold)


class _Optimist(NodeState):
    """Counts who is on the way out, or on the way in, as if they were there already."""

    def held_bytes(self, gpu_uuid: str) -> int:
        moving = (Residency.DRAINING, Residency.WAKING)
        here = [r for r in self.replicas.values() if gpu_uuid in r.share_bytes]
        return sum(r.residue_bytes[gpu_uuid] if r.residency in moving else r.held_on(gpu_uuid) for r in here)


def a_transition_counted_as_its_smaller_side() -> Service[Any]:
    return changed(NODEAGENT, new_state=lambda settings: _Optimist(settings=settings))


def an_agent_that_grants_twice_what_it_books() -> Service[Any]:
    def fold(state: NodeState, fact: LeaseGranted) -> None:
        halved = tuple(replace(lease, granted_bytes=lease.granted_bytes // 2) for lease in fact.leases)
        NODEAGENT.folds[LeaseGranted](state, replace(fact, leases=halved))

    return with_fold(NODEAGENT, LeaseGranted, fold)


def an_agent_that_grants_less_than_the_request() -> Service[Any]:
    def handler(state: NodeState, fact: PlacementProposed, ctx: Context) -> Sequence[Outcome]:
        return [_less(o) for o in NODEAGENT.handlers[PlacementProposed](state, fact, ctx)]

    return with_handler(NODEAGENT, PlacementProposed, handler)


def _less(outcome: Outcome) -> Outcome:
    if not isinstance(outcome, LeaseGranted):
        return outcome
    leases = tuple(replace(lease, granted_bytes=lease.granted_bytes * 9 // 10) for lease in outcome.leases)
    return replace(outcome, leases=leases)


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


def a_park_that_is_told_before_it_has_happened() -> Service[Any]:
    """The order's answer is "parked", and whoever waits begins, while the engine still drains."""

    def handler(state: NodeState, order: Any, ctx: Context, kind: type) -> Sequence[Outcome]:
        outcomes = list(NODEAGENT.handlers[kind](state, order, ctx))
        for draining in [o for o in outcomes if isinstance(o, ReplicaDraining) and not o.is_release]:
            replica = state.replicas[draining.replica_id]
            parked = ReplicaParked(
                **names(state, replica, ctx),
                wake_epoch=replica.wake_epoch + 1,
                residue_bytes=sum(replica.residue_bytes.values()),
                shard_residue_bytes=tuple(replica.residue_bytes.values()),
                host_bytes=0,
                copied_bytes=0,
                park_s=0.0,
                drain_s=0.0,
                reason=draining.reason,
            )
            outcomes.append(parked)
        return outcomes

    return with_handler(NODEAGENT, ParkOrdered, partial(handler, kind=ParkOrdered))


def a_park_that_keeps_its_wake_epoch() -> Service[Any]:
    def handler(state: NodeState, parked: EngineParked, ctx: Context) -> Sequence[Outcome]:
        outcomes = NODEAGENT.handlers[EngineParked](state, parked, ctx)
        return [replace(o, wake_epoch=o.wake_epoch - 1) if isinstance(o, ReplicaParked) else o for o in outcomes]

    return with_handler(NODEAGENT, EngineParked, handler)


def an_agent_that_obeys_late_orders() -> Service[Any]:
    """A park that was meant for an earlier stay ends this one."""

    def handler(state: NodeState, order: ParkOrdered, ctx: Context) -> Sequence[Outcome]:
        replica = state.replicas.get(order.replica_id)
        meant = order if replica is None else replace(order, wake_epoch=replica.wake_epoch)
        return NODEAGENT.handlers[ParkOrdered](state, meant, ctx)

    return with_handler(NODEAGENT, ParkOrdered, handler)


def an_agent_that_refuses_in_silence() -> Service[Any]:
    """Small shares, say, are not worth an answer."""

    def handler(state: NodeState, fact: PlacementProposed, ctx: Context) -> Sequence[Outcome]:
        is_small = fact.replicas[0].shares[0].request_bytes < 25 * GiB
        return [] if is_small else NODEAGENT.handlers[PlacementProposed](state, fact, ctx)

    return with_handler(NODEAGENT, PlacementProposed, handler)


def an_agent_that_forgets_what_it_had_begun() -> Service[Any]:
    def handler(state: NodeState, probed: NodeProbed, ctx: Context) -> Sequence[Outcome]:
        return list(NODEAGENT.handlers[NodeProbed](state, probed, ctx))[:1]

    return with_handler(NODEAGENT, NodeProbed, handler)


def an_agent_that_starts_anew_instead_of_adopting() -> Service[Any]:
    def handler(state: NodeState, probed: NodeProbed, ctx: Context) -> Sequence[Outcome]:
        outcomes = NODEAGENT.handlers[NodeProbed](state, probed, ctx)
        return [changed(o, lease_epoch=o.lease_epoch + 1) if isinstance(o, StartEngine) else o for o in outcomes]

    return with_handler(NODEAGENT, NodeProbed, handler)


def a_wake_that_waits_for_bytes_that_nobody_gives() -> Service[Any]:
    return without(NODEAGENT, EngineStayed, WakeRefused)


# --- The swapper and the autoscaler -----------------------------------------------------------------------------------


def a_fold_that_drops_a_fact() -> Service[Any]:
    return changed(SWAPPER, folds={kind: fold for kind, fold in SWAPPER.folds.items() if kind is not ReplicaParked})


def _as_if(service: Service[Any], change: Callable[[Any], Any]) -> Service[Any]:
    """The swapper believes another deployment than the one that was granted."""

    def fold(state: FleetState, fact: LeaseGranted) -> None:
        believed = tuple(replace(r, deployment=change(r.deployment)) for r in fact.replicas)
        service.folds[LeaseGranted](state, replace(fact, replicas=believed))

    return with_fold(service, LeaseGranted, fold)


def a_swapper_that_ignores_minimum_residency() -> Service[Any]:
    return _as_if(SWAPPER, lambda d: replace(d, swap=replace(d.swap, minimum_residency_s=0.0)))


def a_swapper_that_parks_what_may_not_be_parked() -> Service[Any]:
    return _as_if(SWAPPER, lambda d: replace(d, swap=replace(d.swap, is_parkable=True)))


def a_swapper_that_lets_training_push_others_aside() -> Service[Any]:
    return _as_if(SWAPPER, lambda d: replace(d, kind=WorkloadKind.INFERENCE, priority="very-high"))


def _all_idle(observe: Callable[..., None], deployment_ids: Sequence[str], now_s: float) -> None:
    loads = tuple(
        ModelLoad(deployment_id=d, in_flight_count=0, waiting_count=0, arrived_count=0, last_arrival_s=0.0)
        for d in deployment_ids
    )
    observe(LoadSampled(gateway="clients", models=loads), now_s)


def a_swapper_for_which_silence_is_idleness() -> Service[Any]:
    def handler(state: FleetState, tick: swapper_core.Tick, ctx: Context) -> Sequence[Outcome]:
        known = [r.deployment_id for r in state.replicas.values()]
        _all_idle(partial(SWAPPER.observers[LoadSampled], state), known, ctx.now_s)
        return SWAPPER.handlers[swapper_core.Tick](state, tick, ctx)

    return with_handler(SWAPPER, swapper_core.Tick, handler)


def an_autoscaler_for_which_silence_is_idleness() -> Service[Any]:
    def handler(state: Any, tick: ScalerTick, ctx: Context) -> Sequence[Outcome]:
        _all_idle(partial(AUTOSCALER.observers[LoadSampled], state), list(state.deployments), ctx.now_s)
        return AUTOSCALER.handlers[ScalerTick](state, tick, ctx)

    return with_handler(AUTOSCALER, ScalerTick, handler)


def a_swapper_that_neither_repeats_an_order_nor_gives_it_up() -> Service[Any]:
    def handler(state: FleetState, tick: swapper_core.Tick, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(SWAPPER.handlers[swapper_core.Tick](state, tick, ctx))
        decided = {o.replica_id for o in outcomes if isinstance(o, WakeDecided | ParkDecided)}
        orders = (WakeOrdered, ParkOrdered)
        kept = [o for o in outcomes if not isinstance(o, orders) or o.replica_id in decided]
        return [o for o in kept if not isinstance(o, DecisionClosed)]

    return with_handler(SWAPPER, swapper_core.Tick, handler)


def a_swapper_whose_clock_stops_at_a_restart() -> Service[Any]:
    return changed(
        SWAPPER,
        on_start=lambda state, ctx: (
            SWAPPER.on_start(state, ctx)[:-1] if state.replicas else SWAPPER.on_start(state, ctx)
        ),
    )


# --- Placement --------------------------------------------------------------------------------------------------------


def a_placement_that_keeps_silent() -> Service[Any]:
    return without(PLACEMENT, PlaceNext, PlacementFailed)


def a_placement_that_forgets_who_asked() -> Service[Any]:
    """Every command is taken for the default tenant's."""

    def wrap(kind: type) -> Callable[..., Sequence[Outcome]]:
        return lambda state, item, ctx: PLACEMENT.handlers[kind](state, item, changed(ctx, tenant="default"))

    kinds = (ParkRequested, WakeRequested, RetireRequested)
    return changed(PLACEMENT, handlers={**PLACEMENT.handlers, **{kind: wrap(kind) for kind in kinds}})


def a_placement_that_does_not_know_a_repetition() -> Service[Any]:
    def wrap(kind: type) -> Callable[..., Sequence[Outcome]]:
        def handler(state: Any, command: Any, ctx: Context) -> Sequence[Outcome]:
            renamed = replace(command, command_id=f"{command.command_id}-{ctx.cause_seq}")
            return PLACEMENT.handlers[kind](state, renamed, ctx)

        return handler

    kinds = (ParkRequested, WakeRequested)
    return changed(PLACEMENT, handlers={**PLACEMENT.handlers, **{kind: wrap(kind) for kind in kinds}})


def a_placement_that_drops_the_minimum_grade() -> Service[Any]:
    """So that a share is placed which nobody can enforce."""

    def handler(state: Any, command: DeployRequested, ctx: Context) -> Sequence[Outcome]:
        spec = command.deployment
        weaker = replace(spec, share=replace(spec.share, minimum_grade=None))
        return PLACEMENT.handlers[DeployRequested](state, replace(command, deployment=weaker), ctx)

    return with_handler(PLACEMENT, DeployRequested, handler)


def a_placement_that_answers_twice() -> Service[Any]:
    def handler(state: Any, command: RetireRequested, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(PLACEMENT.handlers[RetireRequested](state, command, ctx))
        return [*outcomes, *(o for o in outcomes if isinstance(o, Reply))]

    return with_handler(PLACEMENT, RetireRequested, handler)


def an_inbox_cursor_one_behind() -> Service[Any]:
    return changed(PLACEMENT, inbox_cursor=lambda state: max(0, state.inbox_seq - 1))


def an_inbox_cursor_one_ahead() -> Service[Any]:
    return changed(PLACEMENT, inbox_cursor=lambda state: state.inbox_seq + 1)


def a_handler_that_changes_the_state_itself() -> Service[Any]:
    def handler(state: Any, fact: LeaseGranted, ctx: Context) -> Sequence[Outcome]:
        for deployment in state.deployments.values():
            deployment.problem = "touched"
        return list(PLACEMENT.handlers[LeaseGranted](state, fact, ctx))

    return with_handler(PLACEMENT, LeaseGranted, handler)


# --- Faults of a shell in virtual time --------------------------------------------------------------------------------


def play_a_fold_in_stream_order(seed: int) -> None:
    """What was read last is not what was handled last: folding by sequence gives another state at some instant."""
    trial = HardTrial(changed(plan(seed), faults=Faults(latency_s=0.2)))
    trial.begin()
    for _ in range(120):
        trial.system.run_for(0.25)
        member = trial.system.simulation.members["swapper"]
        live = member.processor
        if live is None or not member.is_active or member.in_flight is not None or member.waiting:
            continue
        wrong: Processor[Any] = Processor(member.service, member.settings, writer="swapper", instance="replay")
        newest_seq = 0
        for stored in trial.system.simulation.stream:
            if any(subject_matches(pattern, stored.subject) for pattern in (wrong.prefix, *wrong.reads)):
                wrong.replay_one(stored)
                newest_seq = newest_seq if wrong.is_own(stored) else stored.seq
                wrong.fold_foreign_to(stored.seq)
        if live.cursor_seq == newest_seq:
            assert digest(wrong.state) == digest(live.state), "replay differs from what was lived"


def play_a_decision_by_chance(seed: int) -> None:
    """Randomness that is not the simulation's own: the same seed must give the same trace."""
    chance = random.Random()  # Not reproducible, which is the point.

    def handler(state: Any, item: Any, ctx: Context) -> Sequence[Outcome]:
        outcomes = list(AUTOSCALER.handlers[type(item)](state, item, ctx))
        return [replace(o, reason=str(chance.random())) if isinstance(o, ReplicasDecided) else o for o in outcomes]

    broken = changed(AUTOSCALER, handlers=dict.fromkeys(AUTOSCALER.handlers, handler))
    hashes = {HardTrial(plan(seed), {"autoscaler": broken}).run().system.simulation.trace_hash() for _ in range(2)}
    assert len(hashes) == 1, "two traces of one seed"


# --- The list ---------------------------------------------------------------------------------------------------------


def _play(plant: Callable[[], Service[Any]], seed: int) -> None:
    service = plant()
    check_everything(seed, {service.name: service})


_PLANTED: tuple[tuple[Callable[[], Service[Any]], str, str], ...] = (
    (a_ledger_that_forgets_residues, "I1", "what parked engines keep is taken for free; the account from facts"),
    (an_account_that_forgets_the_reserve, "I1", "the driver's reserve is given away; the account from facts"),
    (a_transition_counted_as_its_smaller_side, "I1", "who drains or wakes counts as small; the hosts' own bytes"),
    (an_agent_that_grants_twice_what_it_books, "I1", "a lease is booked at half its size; the account from facts"),
    (an_agent_that_grants_less_than_the_request, "I2", "a guarantee is cut; each grant is held against its proposal"),
    (a_swapper_that_ignores_minimum_residency, "I2", "a victim goes too soon; each victim's stay is measured"),
    (a_swapper_that_parks_what_may_not_be_parked, "I2", "a fixed share is a victim; each victim's spec is looked up"),
    (
        a_swapper_that_lets_training_push_others_aside,
        "I2",
        "a lower priority takes room; each wake's spec is looked up",
    ),
    (a_wake_that_does_not_wait_for_its_victims, "I3", "a restore begins early; the hosts' own bytes"),
    (a_park_that_is_told_before_it_has_happened, "I3", "parked is told while it drains; the hosts' own bytes"),
    (a_placement_that_keeps_silent, "I4", "a wish that cannot be met gets no reason; the owner's invariant"),
    (an_agent_that_refuses_in_silence, "I4", "a proposal gets no answer; each must have one at the end"),
    (a_wake_that_waits_for_bytes_that_nobody_gives, "I4", "it waits for ever; all must be settled at the end"),
    (a_fold_that_drops_a_fact, "I5", "a service misses a fact; all must tell one story at the end"),
    (a_handler_that_changes_the_state_itself, "I5", "what no fact says; replay must equal what was lived"),
    (
        a_placement_that_does_not_know_a_repetition,
        "duplicate command",
        "it is carried out twice; the inbox is compared",
    ),
    (a_park_that_keeps_its_wake_epoch, "duplicate message", "old orders fit again; epochs must rise at each park"),
    (
        an_agent_that_obeys_late_orders,
        "late order",
        "it parks whom nobody wants parked now; each park needs its decision",
    ),
    (
        a_swapper_that_neither_repeats_an_order_nor_gives_it_up,
        "lost message",
        "one lost order holds a model for ever; all must be answered and settled",
    ),
    (a_swapper_for_which_silence_is_idleness, "I7", "no news is no load; each park is held against what was heard"),
    (an_autoscaler_for_which_silence_is_idleness, "I7", "no news is no load; each decision on cold likewise"),
    (a_placement_that_drops_the_minimum_grade, "I8", "an unenforced share is placed; admitted must equal wished"),
    (
        a_placement_that_forgets_who_asked,
        "wrong tenant",
        "a stranger's command is obeyed; each fact's tenant is compared with the inbox",
    ),
    (a_placement_that_answers_twice, "double answer", "a command is answered twice; answers are counted"),
    (an_inbox_cursor_one_behind, "take-over: inbox", "the last command is handled again; one fact for each"),
    (an_inbox_cursor_one_ahead, "take-over: inbox", "the next command is skipped; one fact for each"),
    (
        a_swapper_whose_clock_stops_at_a_restart,
        "take-over: timers",
        "no tick after a restart; all must be answered and settled",
    ),
    (
        an_agent_that_forgets_what_it_had_begun,
        "take-over: effects",
        "nothing is resumed; all must be settled at the end",
    ),
    (
        an_agent_that_starts_anew_instead_of_adopting,
        "take-over: effects",
        "a second engine beside the first; the host refuses",
    ),
)

BUGS = tuple(
    Bug(name=plant.__name__.replace("_", " "), guards=guards, breaks=breaks, play=partial(_play, plant))
    for plant, guards, breaks in _PLANTED
)
BUGS += (
    Bug(
        name="a fold in stream order",
        guards="I5",
        breaks="history is not folded as it was handled; replay must equal what was lived",
        play=play_a_fold_in_stream_order,
    ),
    Bug(
        name="a decision by chance",
        guards="I5",
        breaks="a seed does not give one run; traces are compared",
        play=play_a_decision_by_chance,
    ),
)
SOUND = Bug(name="nothing", guards="", breaks="", play=partial(check_everything, services={}))

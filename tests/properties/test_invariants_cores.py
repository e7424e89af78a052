"""Invariants of single cores over generated states and inputs, and of every handler when its input comes twice."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.outcomes import Context, Outcome, Under
from kit.processor import Delivery, Processor
from kit.service import Service, digest
from schemas.catalogue import decode, encode
from schemas.deployments import GRADE_ORDER, IsolationGrade
from schemas.messages import Fact
from schemas.nodes import LeaseGranted, LeaseRefused
from schemas.orders import ParkOrdered, WakeOrdered
from schemas.placement import PlacementFailed, PlacementProposed
from schemas.units import GiB
from services.autoscaler.core import SERVICE as AUTOSCALER
from services.nodeagent import core as nodeagent_core
from services.nodeagent.core import SERVICE as NODEAGENT
from services.nodeagent.inputs import NodeProbed
from services.nodeagent.settings import NodeAgentSettings
from services.placement.choosing import Choice, choose
from services.placement.core import SERVICE as PLACEMENT
from services.swapper import policy
from services.swapper.core import SERVICE as SWAPPER
from services.swapper.core import Tick
from tests.properties.test_invariants_system import Plan, Trial, plans, quick
from tests.unit.nodeagent import builders as nodes
from tests.unit.placement import builders as placements
from tests.unit.swapper.builders import Swapper

many = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


# --- Twice is once ----------------------------------------------------------------------------------------------------


def twice(service: Service[Any]) -> Service[Any]:
    """The service, with each input handed in again at once: the second time must add nothing to the state.

    Not for timers, which come once. Of facts that placement reads, each has its place in the order of its cursor and
    comes once; but for a second one it must not say the same again.
    """

    def doubled(handler: Callable[..., Sequence[Outcome]]) -> Callable[..., Sequence[Outcome]]:
        def handle(state: Any, item: Any, ctx: Context) -> Sequence[Outcome]:
            outcomes = list(handler(state, item, ctx))
            probe = copy.deepcopy(state)
            first = _fold(service, probe, outcomes)
            once = _compared(probe)
            second = _fold(service, probe, handler(probe, item, ctx))
            if service is PLACEMENT and isinstance(item, Fact):
                said = [fact for fact in first if fact in second]
                assert not said, f"{service.name} says twice after {item}: {said}"
            else:
                assert once == _compared(probe), f"{service.name} handles {item} twice"
            return outcomes

        return handle

    exempt = (Tick, NodeProbed)
    handlers = {
        kind: handler if kind in exempt or kind.__name__ in {"Tick", "PlaceNext"} else doubled(handler)
        for kind, handler in service.handlers.items()
    }
    return changed(service, handlers=handlers)


def _fold(service: Service[Any], state: Any, outcomes: Sequence[Outcome]) -> list[Fact]:
    facts = []
    for outcome in outcomes:
        plain = outcome.outcome if isinstance(outcome, Under) else outcome
        if isinstance(plain, Fact):
            fact = decode(encode(plain))
            assert isinstance(fact, Fact), fact
            service.evolve(state, fact)
            facts.append(fact)
    return facts


def _compared(state: Any) -> bytes:
    """All but the memory of commands, in which a duplicate leaves its trace."""
    if hasattr(state, "command_ids"):
        state.command_ids = dict.fromkeys(state.command_ids, "handled")
        state.inbox_seq = 0
    return digest(state)


@settings(quick, max_examples=8)
@given(plan=plans())
def test_handling_an_input_twice_equals_handling_it_once(plan: Plan) -> None:
    """Every order, signal, command, fact and result of an effect, in every state that a trial comes to."""
    Trial(plan, {s.name: twice(s) for s in (PLACEMENT, SWAPPER, AUTOSCALER, NODEAGENT)}).run()


def test_a_handler_that_answers_a_repetition_is_noticed() -> None:
    def handler(state: Any, item: WakeOrdered, ctx: Context) -> Sequence[Outcome]:
        return [nodeagent_core.released(state, replica, "again", ctx) for replica in [*state.replicas.values()][1:2]]

    agent = nodes.Agent()
    agent.resident("a", 70)
    for name in NAMES[1:3]:
        agent.granted(name, 20)
    order = agent.wake("a")
    planted = changed(NODEAGENT, handlers={**NODEAGENT.handlers, WakeOrdered: handler})

    with pytest.raises(AssertionError, match="nodeagent handles WakeOrdered"):
        twice(planted).handlers[WakeOrdered](agent.state, order, Context(now_s=1.0, writer_epoch=1))


# --- The node agent alone ---------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")
STEPS = (
    "propose",
    "release",
    "wake",
    "park",
    "started",
    "has_parked",
    "stayed",
    "woken",
    "not_woken",
    "stopped",
    "lost",
)


@many
@given(
    shares=st.lists(st.integers(1, 80), min_size=4, max_size=4),
    parkable=st.lists(st.booleans(), min_size=4, max_size=4),
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.sampled_from(NAMES), st.sets(st.sampled_from(NAMES)), st.integers(0, 3)),
        max_size=60,
    ),
)
def test_whatever_is_proposed_ordered_or_comes_back_an_agent_never_gives_more_than_it_has(
    shares: list[int], parkable: list[bool], steps: list[tuple[str, str, set[str], int]]
) -> None:
    """Sound or not, in any order: `Agent.handle` checks the account after each input."""
    agent = nodes.Agent()
    of = dict(zip(NAMES, zip(shares, parkable, strict=True), strict=True))
    for step, name, victims, residue_gib in steps:
        if step == "propose":
            gib, is_parkable = of[name]
            agent.handle(nodes.proposal(nodes.replica(name, gib, is_parkable=is_parkable)))
        elif name not in agent.state.replicas:
            continue
        elif step == "release":
            agent.handle(nodes.release(name))
        elif step == "wake":
            agent.handle(agent.wake(name, *sorted(victims)))
        elif step == "has_parked":
            agent.handle(agent.has_parked(name, residue_gib=min(residue_gib, of[name][0])))
        else:
            agent.handle(getattr(agent, step)(name))


@many
@given(newest=st.integers(1, 50), late=st.integers(0, 60), kind=st.sampled_from([WakeOrdered, ParkOrdered]))
def test_an_order_of_an_older_writer_is_refused_whatever_it_says(
    newest: int, late: int, kind: type[WakeOrdered] | type[ParkOrdered]
) -> None:
    """By the processor, before the core sees it."""
    processor = Processor(NODEAGENT, NodeAgentSettings(node="n"), writer="node.n", instance="one")

    def refusal(epoch: int) -> str:
        order = kind(node="n", writer_epoch=epoch, deadline_ms=1000, replica_id="r", wake_epoch=1)
        return processor.receive(Delivery(input=order, now_s=1.0))

    assert "" == refusal(newest)
    assert (late < newest) == bool(refusal(late))


@many
@given(given_grade=st.sampled_from(GRADE_ORDER), minimum=st.sampled_from([None, *GRADE_ORDER]))
def test_a_share_with_a_grade_that_cannot_be_given_is_refused(
    given_grade: IsolationGrade, minimum: IsolationGrade | None
) -> None:
    """By the node, whatever placement believes; and by placement, with words."""
    can_be_given = minimum is None or GRADE_ORDER.index(given_grade) <= GRADE_ORDER.index(minimum)
    agent = nodes.Agent(nodes.gpu(grade=given_grade))
    placement = placements.Placement()
    placement.join(placements.gpu("gpu-0", grade=given_grade))

    answer = agent.handle(nodes.proposal(nodes.replica("a", 10, minimum_grade=minimum)))[0]
    decided = placement.deploy(placements.spec("a", 10, minimum_grade=minimum))[-1]

    assert (LeaseGranted if can_be_given else LeaseRefused) is type(answer)
    assert (PlacementProposed if can_be_given else PlacementFailed) is type(decided)


# --- The swapper alone ------------------------------------------------------------------------------------------------


@many
@given(
    ages_s=st.dictionaries(st.sampled_from("pqr"), st.floats(0, 20)),
    busy=st.sets(st.sampled_from("pqr")),
)
def test_a_missing_measurement_is_never_zero(ages_s: dict[str, float], busy: set[str]) -> None:
    """Idle means: at least one gateway is there, all that are there spoke lately, and none of them has work for it."""
    swapper = Swapper()
    swapper.resident("a", 30)
    now_s = swapper.now_s + 100
    for gateway, age_s in ages_s.items():
        swapper.now_s = now_s - age_s
        swapper.handle(swapper.load(*(["a"] if gateway in busy else []), gateway=gateway))
    known = swapper.state.settings

    idle = policy.is_idle(swapper.state, swapper.state.replicas["a"], now_s=now_s)

    there = {g for g in ages_s if now_s - (now_s - ages_s[g]) <= known.gateway_gone_s}
    fresh = {g for g in there if now_s - (now_s - ages_s[g]) <= known.load_fresh_s}
    assert (bool(there) and there == fresh and not there & busy) == idle


@many
@given(
    wanted_gib=st.integers(1, 80),
    others=st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=6),
)
def test_victims_free_enough_and_none_of_them_could_have_stayed(
    wanted_gib: int, others: list[tuple[int, bool, bool]]
) -> None:
    swapper = Swapper()
    swapper.parked("a", wanted_gib)
    left_gib = 80 - 1
    busy = []
    for number, (gib, is_parkable, is_busy) in enumerate(others):
        if gib > left_gib:
            break
        left_gib -= gib
        swapper.resident(f"o{number}", gib, is_parkable=is_parkable)
        busy += [f"o{number}"] if is_busy else []
    swapper.now_s += 10
    swapper.handle(swapper.load(*busy))
    swapper.state.observed.wanted.clear()
    swapper.handle(swapper.wanted("a"))

    decision = swapper.state.decisions.get("a")

    missing_bytes = (wanted_gib - 1 - left_gib) * GiB
    if decision is None:
        return
    victims = [swapper.state.replicas[name] for name in decision.victim_ids]
    freed_bytes = sum(v.freed_bytes["gpu-0"] for v in victims)
    assert missing_bytes <= freed_bytes
    assert all(freed_bytes - v.freed_bytes["gpu-0"] < missing_bytes for v in victims), "one of them could have stayed"
    assert not any(v.replica_id in busy or not v.spec.swap.is_parkable for v in victims)


# --- Placement alone --------------------------------------------------------------------------------------------------


@many
@given(wishes=st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=8), gpu_count=st.integers(0, 3))
def test_what_is_placed_on_one_gpu_can_live_there_and_what_is_not_placed_is_explained(
    wishes: list[tuple[int, bool]], gpu_count: int
) -> None:
    placement = placements.Placement()
    placement.join(*(placements.gpu(f"gpu-{number}") for number in range(gpu_count)))
    for number, (gib, is_parkable) in enumerate(wishes):
        outcomes = placement.deploy(placements.spec(f"m{number}", gib, is_parkable=is_parkable))
        assert isinstance(outcomes[-1], PlacementProposed | PlacementFailed)
        if isinstance(outcomes[-1], PlacementProposed):
            placement.grant(outcomes[-1])

    for node in placement.state.nodes.values():
        for uuid, gpu in node.gpus.items():
            here = placement.state.on_gpu(uuid)
            fixed = sum(r.request_on(uuid) for r in here if not r.is_parkable)
            turns = [r.request_on(uuid) for r in here if r.is_parkable]
            for largest in turns or [0]:
                others_bytes = GiB * max(0, len(turns) - 1)
                assert fixed + largest + others_bytes <= gpu.allocatable_bytes


@many
@given(order=st.permutations(["gpu-0", "gpu-1", "gpu-2"]), gib=st.integers(1, 80))
def test_the_choice_does_not_depend_on_the_order_in_which_nodes_joined(order: list[str], gib: int) -> None:
    placement = placements.Placement()
    for uuid in order:
        placement.join(placements.gpu(uuid), node=f"node-{uuid[-1]}")

    found = choose(placement.state, placements.spec("a", gib), now_s=0.0)

    assert isinstance(found, Choice)
    assert ("gpu-0",) == found.gpu_uuids

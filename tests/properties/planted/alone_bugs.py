"""Faults in one node agent's core, tried alone: with gangs and grades, which placement does not propose yet."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from kit.outcomes import Context, Outcome
from kit.service import Service
from schemas.catalogue import decode, encode
from schemas.deployments import GRADE_ORDER
from schemas.messages import Fact
from schemas.nodes import LeaseGranted, LeaseRefused, NodeJoined
from schemas.placement import PlacementProposed
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import StartEngine
from tests.properties.contracts import Contracts
from tests.properties.planted.bug import Bug, with_handler
from tests.unit.nodeagent.builders import NODE, Agent, gpu, proposal, replica

# --- Faults -----------------------------------------------------------------------------------------------------------


def half_a_gang() -> Service[Any]:
    """What fits of a proposal is granted, the rest is not."""

    def handler(state: Any, fact: PlacementProposed, ctx: Context) -> Sequence[Outcome]:
        outcomes = SERVICE.handlers[PlacementProposed](state, fact, ctx)
        if not any(isinstance(o, LeaseRefused) for o in outcomes) or len(fact.replicas) == 1:
            return outcomes
        return SERVICE.handlers[PlacementProposed](state, replace(fact, replicas=fact.replicas[:1]), ctx)

    return with_handler(SERVICE, PlacementProposed, handler)


def a_grade_that_is_promised_and_not_enforced() -> Service[Any]:
    def handler(state: Any, fact: PlacementProposed, ctx: Context) -> Sequence[Outcome]:
        outcomes = SERVICE.handlers[PlacementProposed](state, _ungraded(fact), ctx)
        return [replace(o, replicas=fact.replicas) if isinstance(o, LeaseGranted) else o for o in outcomes]

    return with_handler(SERVICE, PlacementProposed, handler)


def _ungraded(fact: PlacementProposed) -> PlacementProposed:
    replicas = tuple(
        replace(r, deployment=replace(r.deployment, share=replace(r.deployment.share, minimum_grade=None)))
        for r in fact.replicas
    )
    return replace(fact, replicas=replicas)


# --- Playing a seed ---------------------------------------------------------------------------------------------------


def play(plant: Callable[[], Service[Any]], seed: int) -> None:
    """Ten proposals of one to three replicas with any minimum grade; each answer is judged by the contracts."""
    draw = random.Random(seed)  # Reproducible by design.
    given = draw.choice(GRADE_ORDER)
    agent, service, contracts = Agent(gpu(grade=given)), plant(), Contracts()
    contracts.judge(NodeJoined(**_joined(agent)))
    for number in range(10):
        gang = [
            replica(
                f"r{number}-{shard}",
                draw.choice([5, 20, 40]),
                is_parkable=draw.random() < 0.5,
                minimum_grade=draw.choice([None, *GRADE_ORDER]),
            )
            for shard in range(draw.choice([1, 1, 2, 3]))
        ]
        proposed = proposal(*gang)
        contracts.judge(proposed)
        agent.seq += 1
        ctx = Context(now_s=agent.now_s, writer_epoch=1, cause_seq=agent.seq)
        outcomes = service.handlers[PlacementProposed](agent.state, proposed, ctx)
        for outcome in outcomes:
            if isinstance(outcome, Fact):
                fact = decode(encode(outcome))
                assert isinstance(fact, Fact), fact
                service.evolve(agent.state, fact)
                contracts.judge(fact)
        service.check_invariants(agent.state)
        for started in [o for o in outcomes if isinstance(o, StartEngine)]:
            agent.handle(agent.started(started.replica.replica_id))
    contracts.check_proposals()


def _joined(agent: Agent) -> dict[str, Any]:
    return {
        "node": NODE,
        "at_s": agent.now_s,
        "machine_id": "m",
        "gpus": tuple(agent.state.gpus.values()),
        "host_budget_bytes": 0,
        "holder_url": "",
        "label": "simulated",
    }


_PLANTED = (
    (half_a_gang, "I4: gang", "some of a proposal is granted; each grant is held against its proposal"),
    (
        a_grade_that_is_promised_and_not_enforced,
        "I8",
        "a share's minimum grade is ignored; each grant is compared with its GPU",
    ),
)
BUGS = tuple(
    Bug(name=plant.__name__.replace("_", " "), guards=guards, breaks=breaks, play=partial(play, plant))
    for plant, guards, breaks in _PLANTED
)
SOUND = Bug(name="nothing", guards="", breaks="", play=partial(play, lambda: SERVICE))

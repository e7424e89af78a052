"""The residency machine does what its table says: random inputs reach every transition of it, and no other."""

import random
from collections import Counter
from typing import Any

import pytest

from schemas.messages import Fact
from schemas.nodes import (
    LeaseGranted,
    LeaseReleased,
    ParkAbandoned,
    ParkTier,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaSuspect,
    ReplicaWaking,
    WakeRefused,
)
from services.nodeagent.inputs import EngineDoubtful, LookDue, RestartDue, StepHung
from services.nodeagent.state import NodeState
from services.nodeagent.transitions import STATES, TRANSITIONS, Cause, Holding, Residency, Transition, target_of
from tests.unit.nodeagent.builders import Agent, gpu, proposal, release, replica
from tests.unit.nodeagent.test_leases import without

STEP_COUNT = 40_000
"""Enough by a wide margin: the rarest transition was seen 7 times in these."""
NAMES = ("a", "b", "c", "d")
BY_KIND: dict[type[Fact], Cause] = {
    LeaseReleased: Cause.RELEASED,
    ReplicaStarting: Cause.START_BEGUN,
    ReplicaResident: Cause.RESIDENT,
    ReplicaSuspect: Cause.SUSPECTED,
    ParkAbandoned: Cause.PARK_ABANDONED,
}


class Recorder(Agent):
    """An agent that notes where each of its facts brought whom."""

    def __init__(self, *, start_attempt_count: int = 5) -> None:
        self.seen: Counter[Transition] = Counter()
        super().__init__(gpu(0), gpu(1), start_attempt_count=start_attempt_count)

    def _fold(self, fact: Fact) -> None:
        before = _residencies(self.state)
        started = {name for name, lease in self.state.replicas.items() if lease.is_started}
        super()._fold(fact)
        after = _residencies(self.state)
        named = _named(fact)
        for name in named:
            row = Transition(before.get(name), _cause(fact, is_started=name in started), after.get(name))
            self.seen[row] += 1
        untouched = (before.keys() | after.keys()) - set(named)
        assert all(before.get(name) == after.get(name) for name in untouched), f"{fact} moved somebody else"


def _residencies(state: NodeState) -> dict[str, Residency]:
    return {name: lease.residency for name, lease in state.replicas.items()}


def _named(fact: Fact) -> tuple[str, ...]:
    if isinstance(fact, LeaseGranted | ReplicaReady):
        return tuple(one.replica_id for one in fact.replicas)
    is_about_one = type(fact) in BY_KIND or isinstance(fact, _TWOFOLD)
    return (fact.replica_id,) if is_about_one else ()  # type: ignore[attr-defined]


_TWOFOLD = (ReplicaDraining, ReplicaParked, ReplicaWaking, ReplicaFailed, WakeRefused)


def _cause(fact: Fact, *, is_started: bool) -> Cause:
    match fact:
        case LeaseGranted():
            return Cause.LEASE_GRANTED
        case ReplicaReady():
            return Cause.READY
        case ReplicaDraining():
            return Cause.RELEASE_BEGUN if fact.is_release else Cause.PARK_BEGUN
        case ReplicaWaking():
            return Cause.WAKE_BEGUN if fact.is_reserved else Cause.WAKE_ACCEPTED
        case ReplicaFailed():
            return Cause.GIVEN_UP if fact.is_final else Cause.FAILED
        case ReplicaParked():
            return Cause.PARKED_NOWHERE if fact.tier is ParkTier.NOWHERE else Cause.PARKED
        case WakeRefused():
            return Cause.WAKE_REFUSED if is_started else Cause.START_REFUSED
        case _:
            return BY_KIND[type(fact)]


def _some_input(agent: Recorder, draw: random.Random) -> Any:
    """Anything that an agent may be handed, fitting or not: orders, results in time, late and twice, overdue steps."""
    here = sorted(agent.state.replicas)
    absent = [name for name in NAMES if name not in here]
    if absent and draw.random() < 0.3:
        gpus = draw.choice([("gpu-0",), ("gpu-0",), ("gpu-1",), ("gpu-0", "gpu-1")])
        return proposal(replica(draw.choice(absent), draw.choice([20, 60, 70]), gpu_uuids=gpus))
    if not here:
        return agent.probed()
    name = draw.choice(here)
    lease = agent.lease(name)
    victims = draw.sample(here, k=draw.randrange(len(here) + 1))
    made = {
        "wake": lambda: agent.wake(name, *(victim for victim in victims if victim != name)),
        "park": lambda: agent.park(name),
        "started": lambda: agent.started(name),
        "parked": lambda: agent.has_parked(name),
        "parked nowhere": lambda: agent.has_parked(name, tier=ParkTier.NOWHERE),
        "stayed": lambda: agent.stayed(name),
        "woken": lambda: agent.woken(name),
        "not woken": lambda: agent.not_woken(name),
        "stopped": lambda: agent.stopped(name),
        "lost": lambda: agent.lost(name, shaken=tuple(victims)),
        "release": lambda: release(name),
        "restart": lambda: RestartDue(replica_id=name, lease_epoch=lease.lease_epoch),
        "hung": lambda: StepHung(
            replica_id=name, lease_epoch=lease.lease_epoch, deadline_s=draw.choice([lease.deadline_s, 1.0])
        ),
        "doubtful": lambda: EngineDoubtful(replica_id=name, lease_epoch=lease.lease_epoch, reason="not as it should"),
        "found": lambda: agent.found(name, is_parked=draw.random() < 0.5 and lease.is_started),
        "unexplained": lambda: agent.unexplained(name),
        "look": lambda: LookDue(replica_id=name, lease_epoch=lease.lease_epoch),
        "gpu gone": lambda: without(agent, gpu(draw.randrange(2))),
        "gpu back": agent.probed,
    }
    weights: dict[str, float] = {
        "gpu gone": 0.005,
        "lost": 0.2,
        "release": 0.15,
        "hung": 0.3,
        "doubtful": 0.3,
        "wake": 4,
        "parked": 3,
    }
    if lease.residency in (Residency.WAITING, Residency.WAKING):
        weights |= {"lost": 2, "release": 1, "hung": 1}
    kind = draw.choices(list(made), [weights.get(kind, 1.0) for kind in made])[0]
    return made[kind]()


def _walk(seed: int, *, step_count: int, start_attempt_count: int) -> Recorder:
    agent, draw = Recorder(start_attempt_count=start_attempt_count), random.Random(seed)
    late: list[Any] = []
    for _ in range(step_count):
        item = draw.choice(late) if late and draw.random() < 0.1 else _some_input(agent, draw)
        if not isinstance(item, Fact):
            late = [*late[-20:], item]
        agent.handle(item)
    return agent


def test_every_transition_of_the_table_is_reached_and_no_other() -> None:
    """An agent that gives a replica up at once does so from anywhere; one that tries again only from a failed start."""
    seen: Counter[Transition] = Counter()
    for attempt_count in (1, 5):
        seen += _walk(attempt_count, step_count=STEP_COUNT, start_attempt_count=attempt_count).seen

    assert set(TRANSITIONS) - set(seen) == set(), "never reached"
    assert set(seen) - set(TRANSITIONS) == set(), "not in the table"


def test_a_suspect_holds_what_it_held_and_stays_until_it_is_explained() -> None:
    """On every walk, at every step: doubts give no byte away, and every step has an end."""
    for seed in range(2, 6):
        agent, draw = Recorder(), random.Random(seed)
        for _ in range(3_000):
            held = {name: lease.held_bytes for name, lease in agent.state.replicas.items()}
            before = _residencies(agent.state)
            agent.handle(_some_input(agent, draw))
            for name, lease in agent.state.replicas.items():
                if lease.residency is Residency.SUSPECT and before.get(name) is not None:
                    assert held[name] == lease.held_bytes, name


def test_a_fact_that_is_not_in_the_table_stops_the_agent() -> None:
    known = {(row.source, row.cause) for row in TRANSITIONS}
    for source in (None, *Residency):
        for cause in Cause:
            if (source, cause) not in known:
                with pytest.raises(AssertionError, match="cannot follow"):
                    target_of(source, cause)


def test_every_state_has_its_row_and_a_way_in_and_a_way_out() -> None:
    assert set(Residency) == set(STATES)
    assert set(Residency) == {row.target for row in TRANSITIONS} - {None}
    assert set(Residency) == {row.source for row in TRANSITIONS} - {None}
    assert set(Cause) == {row.cause for row in TRANSITIONS}


def test_what_can_hang_has_a_deadline_and_leads_to_suspicion() -> None:
    suspected = {row.source for row in TRANSITIONS if row.cause is Cause.SUSPECTED}
    steps = {residency for residency, row in STATES.items() if row.deadline_settings}

    assert steps <= suspected
    assert all(STATES[step].holds is not Holding.NOTHING for step in steps)

"""The whole system in virtual time under faults: the invariants of the design, seed by seed."""

import pytest

from schemas.catalogue import decode
from schemas.placement import CommandFact
from tests.simulation import swarm


@pytest.mark.parametrize("seed", range(40))
def test_no_seed_breaks_an_invariant_and_every_request_is_answered_after_healing(seed: int) -> None:
    """Never oversubscribed, every deployment placed or explained, replay equals live, nobody waits for ever."""
    finished = swarm.run(seed)

    assert [] == finished.unanswered


@pytest.mark.parametrize("seed", [3, 17, 42])
def test_equal_seeds_give_equal_histories(seed: int) -> None:
    first, second = swarm.run(seed), swarm.run(seed)

    assert first.system.simulation.trace_hash() == second.system.simulation.trace_hash()


def test_different_seeds_give_different_histories() -> None:
    assert swarm.run(1).system.simulation.trace_hash() != swarm.run(2).system.simulation.trace_hash()


@pytest.mark.parametrize("seed", range(5))
def test_every_command_leads_to_exactly_one_fact_and_one_answer(seed: int) -> None:
    """Also when placement dies between reading a command and answering it."""
    simulation = swarm.run(seed).system.simulation

    named = [
        fact.inbox_seq for fact in map(decode, (s.body for s in simulation.stream)) if isinstance(fact, CommandFact)
    ]

    assert [stored.seq for stored in simulation.inbox] == sorted(named)

"""Preemption keeps its rules under faults: who may go, that all are needed, that room is kept, that all of it ends."""

import pytest

from tests.properties.planted.displacement_trial import DisplacementTrial


@pytest.mark.parametrize("seed", range(8))
def test_nobody_gives_way_against_the_rules_and_every_claim_ends(seed: int) -> None:
    DisplacementTrial(seed).run()


def test_the_trials_see_preemptions() -> None:
    trials = [DisplacementTrial(seed) for seed in range(4)]
    for trial in trials:
        trial.run()

    assert sum(trial.displacement.decided_count for trial in trials) > 10

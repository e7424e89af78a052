"""Nodes go away and come back while replicas move: nothing is promised twice, nobody is left out, everything ends.

Moves never reduce what is placed: at the end every deployment has exactly its replicas.
"""

import pytest

from tests.properties.planted.upkeep_trial import UpkeepTrial

SEEDS = 14


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_goes_away_and_moves_every_wish_is_met_once_when_all_is_healed(seed: int) -> None:
    UpkeepTrial(seed).run()


def test_the_seeds_hold_what_they_are_there_for() -> None:
    """Losses, quarantines and moves happen, else the runs above would say nothing."""
    trials = [UpkeepTrial(seed) for seed in (2, 8, 12)]
    for trial in trials:
        trial.run()

    assert sum(trial.upkeep.done_count for trial in trials) > 0
    assert any(until_s > 0 for trial in trials for until_s in trial.upkeep.closed_until_s.values())

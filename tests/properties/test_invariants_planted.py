"""The checks can fail: each planted fault (`tests/properties/planted`) is found by one of them, and nothing else is."""

from collections import Counter

import pytest

from tests.properties.planted.bug import Bug
from tests.properties.planted.catalogue import BUGS, KNOWN_SEEDS, SOUND
from tests.properties.planted.search import play, play_known, search

SEEDS_MAX = 200
"""Beyond the known one: a change elsewhere may move a fault to another seed."""
SOUND_SEEDS = 6
SOUND_NAMES = ("cores", "agent alone", "gangs", "shell", "upkeep", "displacement", "GPUs")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_fault_is_found(bug: Bug) -> None:
    if play_known(bug) or play(bug, KNOWN_SEEDS.get(bug.name, 0)):
        return
    found = search(bug, seeds_max=SEEDS_MAX)

    assert found.seed_count is not None, f"no check has noticed it; it breaks {bug.guards}: {bug.breaks}"


@pytest.mark.parametrize(
    "sound", SOUND, ids=["cores", "agent alone", "gangs", "shell", "upkeep", "displacement", "GPUs", "shares"]
)
def test_nothing_is_found_where_nothing_is_planted(sound: Bug) -> None:
    found = search(sound, seeds_max=SOUND_SEEDS)

    assert found.seed_count is None, found.reason


def test_every_invariant_that_can_be_simulated_has_planted_faults() -> None:
    """Static stability (I9) and clean bytes (I10) need real processes and the software GPU: see docs/testing.md."""
    guarded = Counter(bug.guards.partition(":")[0] for bug in BUGS)

    assert {f"I{number}" for number in range(1, 9)} <= set(guarded), guarded
    assert 25 <= len(BUGS)
    assert len({bug.name for bug in BUGS}) == len(BUGS)

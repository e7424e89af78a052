"""Tries spread over processes tell the same as tries one after another."""

import os
import signal

import pytest

from tests.faults.spread import failures
from tests.properties.planted.shell_bugs import BUGS


def odd_ones_fail(number: int) -> None:
    assert number % 2 == 0, f"{number} is odd"


@pytest.mark.parametrize("process_count", [1, 2, 3, 20])
def test_every_failure_is_told_with_its_try(process_count: int) -> None:
    found = failures(range(7), odd_ones_fail, process_count=process_count)

    assert ["1", "3", "5"] == sorted(found)
    assert all("is odd" in why for why in found.values())


@pytest.mark.parametrize("process_count", [1, 2])
def test_what_is_no_assertion_is_told_too(process_count: int) -> None:
    def breaks(number: int) -> None:
        raise ExceptionGroup("all", [KeyError(number)])

    assert {"4": "KeyError(4)"} == failures([4], breaks, process_count=process_count)


def test_a_process_that_dies_has_failed() -> None:
    def dies(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    (why,) = failures([0, 1], dies, process_count=2).values()

    assert "it ended without a word" == why


def test_faults_planted_in_the_shell_are_found_in_whichever_process_they_are_tried() -> None:
    plays = {bug.name: bug.play_known for bug in BUGS if bug.play_known is not None}

    assert set(plays) == set(failures(list(plays), lambda name: plays[name](), process_count=2))

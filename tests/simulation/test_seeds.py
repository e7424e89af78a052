"""The swarm: whatever a seed draws, nothing is broken; and what a planted defect breaks becomes a small plan."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace as changed
from typing import Any

import pytest

from schemas.nodes import ReplicaParked
from services.swapper.core import SERVICE as SWAPPER
from services.swarm.main import main, parser, plan_of
from services.swarm.plan import FAULTS, OPERATIONS, draw_plan
from services.swarm.run import Run, carry_out
from services.swarm.shrink import shrink

SHORT_S = 240.0


@pytest.mark.parametrize("seed", range(60))
def test_no_seed_breaks_anything(seed: int) -> None:
    failure = carry_out(draw_plan(seed, lasts_s=SHORT_S)).failure

    assert failure is None, f"{failure.message}\npython -m services sim --seed {seed} --seconds {SHORT_S:g}"


def test_a_gateway_that_is_dead_reads_nothing_when_the_network_heals() -> None:
    """Seed 131 cuts one off, crashes it, and heals the network before it is back."""
    assert carry_out(draw_plan(131, lasts_s=400.0)).failure is None


@pytest.mark.parametrize("seed", [1000, 1001, 1114])
def test_no_hour_breaks_anything(seed: int) -> None:
    outcome = carry_out(draw_plan(seed))

    assert outcome.failure is None, outcome.failure
    assert outcome.asked["answered"] > 100
    assert outcome.wake_count > 20
    assert sum(1 for step in outcome.plan.steps if step.is_fault) >= 10


def test_every_kind_of_step_can_be_carried_out() -> None:
    run = Run(draw_plan(1, lasts_s=10.0))

    assert {*FAULTS, *OPERATIONS} == set(run._deeds())


@pytest.mark.parametrize("seed", [3, 17])
def test_equal_seeds_give_equal_traces_in_another_process_too(seed: int) -> None:
    here = carry_out(draw_plan(seed, lasts_s=SHORT_S)).trace_hash[:16]
    command = [sys.executable, "-m", "services", "sim", "--seed", str(seed), "--seconds", f"{SHORT_S:g}"]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert there.strip().endswith(f"trace {here}")


def test_different_seeds_give_different_traces() -> None:
    hashes = {carry_out(draw_plan(seed, lasts_s=60.0)).trace_hash for seed in range(3)}

    assert 3 == len(hashes)


def forgets_residues(state: Any, fact: ReplicaParked) -> None:
    return None


def test_what_a_planted_defect_breaks_is_made_small_and_its_line_breaks_it_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The swapper's fold drops a fact: after some park the services tell different stories."""
    folds = {**SWAPPER.folds, ReplicaParked: forgets_residues}
    services = {"swapper": changed(SWAPPER, folds=folds)}
    failed = next(
        outcome
        for outcome in (carry_out(draw_plan(seed, lasts_s=SHORT_S), services) for seed in range(40))
        if outcome.failure is not None
    )

    shrunk = shrink(failed, services=services)

    assert len(shrunk.plan.steps) <= 3 < shrunk.original_count
    words = shlex.split(shrunk.replay)
    assert ["python", "-m", "services", "sim"] == words[:4]
    options = parser().parse_args(words[4:])
    again = carry_out(plan_of(options, options.seed), services)
    assert again.failure is not None
    assert (shrunk.failure.signature, shrunk.failure.at_s) == (again.failure.signature, again.failure.at_s)
    assert 0 == main(words[4:]), "the real services stand the same plan"
    assert ": ok in" in capsys.readouterr().out


def test_a_plan_can_be_read_and_taken_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["--seed", "5", "--seconds", "60", "--plan", "--only", "0,3,4", "--without", "3"])

    numbers = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " t=" in line]
    assert ["0", "4"] == numbers


def test_what_cannot_be_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["--seed", "1", "--seconds", "-5"])
    assert "error: --seconds must be above 0" in capsys.readouterr().err

    with pytest.raises(SystemExit):
        main(["--seed", "1", "--only", "one"])
    assert "argument --only: invalid numbers value: 'one'" in capsys.readouterr().err

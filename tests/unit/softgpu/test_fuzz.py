"""The short form of the fuzzer. The long ones: `python -m softgpu fuzz`."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from softgpu import fuzzing
from tests.unit.softgpu.machines import MakeMachine

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_random_operations_with_kills_leave_the_state_true() -> None:
    result = fuzzing.fuzz(seed=20261125, operations=60_000, workers=6)

    assert result.findings == []
    assert result.figures["operations"] >= 60_000
    assert result.figures["random_kills"] > 5
    idle = [name for name, (done, _) in result.figures["kinds"].items() if not done and "cgroup" not in name]
    assert idle == [], "these operations never did what they were asked"


def test_kills_just_before_a_check_leave_nobody_waiting_for_the_dead() -> None:
    """Everybody stands still for a check but the one whose locker was killed: nobody else would let it go on."""
    result = fuzzing.fuzz(
        seed=20261125, operations=60_000, workers=6, harshness=fuzzing.Harshness(kill_every=40, check_every=200)
    )

    assert result.findings == []
    assert result.figures["random_kills"] > 50


def test_failures_between_two_calls_leave_the_workers_sure_of_what_they_have() -> None:
    """A token is open, and neither its size can be asked for nor can it be closed again."""
    harshness = fuzzing.Harshness(break_every=5, failing=("cuMemGetAddressRange", "cuIpcCloseMemHandle"))

    result = fuzzing.fuzz(seed=20261125, operations=30_000, workers=6, harshness=harshness)

    assert result.findings == []
    assert result.figures["losses"] == 0
    assert result.figures["faults"] > 10


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not tell who waited")
def test_a_worker_that_sleeps_hangs_and_one_that_gets_no_processor_does_not(machine: MakeMachine) -> None:
    environment = {**os.environ, "SOFTGPU_DIR": str(machine().host.state_dir)}

    tried = subprocess.run(
        [str(fuzzing.build_fuzzer()), "try-patience"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )

    assert tried.stdout.splitlines()[-1] == "a sleeping worker hangs, a starved one does not hang"
    assert tried.returncode == 0
    assert "in the midst of: sleep" in tried.stdout  # the failure explains itself
    assert "the host's lock is free" in tried.stdout
    assert "system call" in tried.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there a process can count its own instructions")
def test_death_at_any_step_of_any_operation_leaves_nothing() -> None:
    """But for the recovery from a death inside the lock, whose million instructions take ten seconds to count."""
    result = fuzzing.kill_at_steps("quick")

    assert result.findings == []
    assert result.figures["operations"] >= 29
    assert result.figures["kills"] > 400
    assert result.figures["not_reached"] <= 5


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there a process can count its own instructions")
def test_a_checkpoint_whose_target_dies_does_not_touch_who_took_its_rows() -> None:
    result = fuzzing.race()

    assert result.findings == []
    assert result.figures["races"] > 3

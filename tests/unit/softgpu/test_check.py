"""`python -m softgpu check`: true state is called true, and every planted damage is found."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from softgpu.fuzzing import build_fuzzer
from tests.unit.softgpu.machines import Machine, MakeMachine
from tests.unit.softgpu.test_host import command_line

pytestmark = pytest.mark.processes

MiB = 1 << 20

HOLD = """
context(); small = ok(cu.cuMemAlloc(1000)); handle = ok(create(4 * MiB)); address = map_memory(handle, 4 * MiB)
say('up'); wait()"""


def planter(one: Machine, *arguments: str) -> str:
    one.is_damaged = True
    environment = {**os.environ, "SOFTGPU_DIR": str(one.host.state_dir)}
    finished = subprocess.run(
        [str(build_fuzzer()), *arguments], env=environment, capture_output=True, text=True, check=True, timeout=30
    )
    return finished.stdout


def test_a_host_in_use_is_true(machine: MakeMachine) -> None:
    one = machine(context_bytes=8 * MiB)
    child = one.start(HOLD)
    child.hear()

    assert one.host.check(is_quiet=True) == []

    child.kill()
    assert one.host.check(is_quiet=True) == []
    assert one.used_bytes() == 0


def test_every_planted_damage_is_found(machine: MakeMachine, tmp_path: Path) -> None:
    one = machine(context_bytes=8 * MiB)
    one.start(HOLD).hear()
    state = one.host.state_dir / "state"
    true_state = state.read_bytes()
    kept = one.host.state_dir.with_name(one.host.state_dir.name + "-kept")
    kept.mkdir()
    for name in one.chunk_files():
        (kept / name).hardlink_to(one.host.state_dir / name)

    unseen = []
    for kind in planter(
        one,
        "kinds",
    ).split():
        planter(one, "plant", kind)
        if not one.host.check(is_quiet=True):
            unseen.append(kind)
        with state.open("r+b") as file:  # in place: processes have it mapped
            file.write(true_state)
        (one.host.state_dir / "c999999").unlink(missing_ok=True)
        for saved in kept.iterdir():
            if not (one.host.state_dir / saved.name).exists():
                (one.host.state_dir / saved.name).hardlink_to(saved)
        assert one.host.check(is_quiet=True) == [], f"{kind} was not undone"
    for saved in kept.iterdir():
        saved.unlink()
    kept.rmdir()

    assert unseen == []


def test_the_command_says_what_is_wrong_and_fails(machine: MakeMachine) -> None:
    one = machine()
    one.start(HOLD).hear()
    true = command_line(one, "check")
    planter(one, "plant", "used")

    found = command_line(one, "check", "--json")

    assert (true.returncode, true.stdout) == (0, "the shared state is true\n")
    assert found.returncode == 1
    assert json.loads(found.stdout)["findings"][0].startswith("used_bytes of GPU 0: recorded")


def test_nobody_sleeps_beside_an_open_lock(machine: MakeMachine) -> None:
    """A process killed just after it was woken to take the lock takes the wake-up with it."""
    one = machine()

    planter(one, "lose-wakeup")

    assert one.host.check(is_quiet=True) == []

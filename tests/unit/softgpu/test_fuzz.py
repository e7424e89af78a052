"""The short form of the fuzzer. The long ones: `python -m softgpu fuzz`."""

import platform
import shutil

import pytest

from softgpu import fuzzing

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_random_operations_with_kills_leave_the_state_true() -> None:
    result = fuzzing.fuzz(seed=20261125, operations=60_000, workers=6)

    assert result.findings == []
    assert result.figures["operations"] >= 60_000
    assert result.figures["random_kills"] > 20
    idle = [name for name, (done, _) in result.figures["kinds"].items() if not done and "cgroup" not in name]
    assert idle == [], "these operations never did what they were asked"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there a process can count its own instructions")
def test_death_at_any_step_of_any_operation_leaves_nothing() -> None:
    """But for the recovery from a death inside the lock, whose million instructions take ten seconds to count."""
    result = fuzzing.kill_at_steps("quick")

    assert result.findings == []
    assert result.figures["operations"] >= 29
    assert result.figures["kills"] > 400
    assert result.figures["not_reached"] <= 5

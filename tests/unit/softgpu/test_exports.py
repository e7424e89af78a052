"""Every function that the libraries export is called by its exported name, and its answer is checked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import softgpu
from tests.unit.softgpu.machines import HERE, MakeMachine

pytestmark = pytest.mark.processes


def exports(library: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[2] for line in listed.stdout.splitlines()}
    return {name for name in names if name.startswith(("cu", "nvml"))}  # a build with counters adds those of its own


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, which comes with the C compiler")
def test_every_export_is_called_and_answers(machine: MakeMachine) -> None:
    one = machine(gpus=2, seed="exports")
    directory = softgpu.build()
    environment = {**one.environment(), "SOFTGPU_CONTROL": str(directory / "softgpu-control")}
    exported = set[str]().union(*(exports(directory / name) for name in ("libcuda.so.1", "libnvidia-ml.so.1")))

    environment["PYTHONPATH"] = f"{HERE}:{Path(softgpu.__file__).parents[1]}"
    called = set[str]()
    for program in ("exported.py", "exported_nvml.py"):
        finished = subprocess.run(
            [sys.executable, str(HERE / program)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        called |= set(json.loads(finished.stdout))

    assert called == exported
    assert one.used_bytes() == 0

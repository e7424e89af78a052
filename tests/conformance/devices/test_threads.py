"""One device, several threads."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import softgpu
from tests.conformance.devices.world import ROOT

pytestmark = pytest.mark.processes


def test_threads_swap_side_by_side_without_mixing_bytes_or_leaking() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="sublet-threads-") as directory:
        host = softgpu.Host(Path(directory), gpus=1, profile="test-1").create()

        child = subprocess.run(
            [sys.executable, "-m", "tests.conformance.devices.threads"],
            cwd=ROOT,
            env={**os.environ, **host.environment()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert child.returncode == 0, child.stderr
        assert host.status()["devices"][0]["used_bytes"] == 0

"""`CudaDevice` on a software GPU whose link has a speed: what waits for a copy that is under way, and what does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import softgpu

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import threading, time
from devices.cuda import CudaDevice
from devices.nvml import NvmlInventory

GiB = 1 << 30
device = CudaDevice(NvmlInventory().gpus()[0].uuid)
region, other = device.allocate(60 * GiB), device.allocate(GiB)
host = device.host_arena(60 * GiB)
copy = threading.Thread(target=device.copy_to_device, args=(region, host))
started_s = time.monotonic()
copy.start()
while device._regions[region.region_id].user_count == 0:
    time.sleep(0.001)
"""


def ran(rest: str, tmp_path: Path) -> str:
    host = softgpu.Host(tmp_path / "host", gpus=1, profile="h100-80", phantom=True, costs={}, context_bytes=0).create()
    try:
        finished = subprocess.run(
            [sys.executable, "-c", PROGRAM + rest], cwd=ROOT, env={**os.environ, **host.environment()},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        host.remove()
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_memory_is_cleaned_while_a_copy_is_on_the_link(tmp_path: Path) -> None:
    assert "True" == ran("device.fill(other, 0); print(copy.is_alive())", tmp_path)


def test_memory_stays_until_the_copy_into_it_is_over(tmp_path: Path) -> None:
    took_s = float(ran("device.unback(region); print(time.monotonic() - started_s)", tmp_path))

    assert took_s >= 60 * (1 << 30) / 53e9


@pytest.mark.parametrize("part", ["region_offset_bytes=GiB, ", ""])
def test_another_copy_into_the_same_memory_is_submitted_meanwhile(part: str, tmp_path: Path) -> None:
    users = ran(
        f"""
second = threading.Thread(target=device.copy_to_device, args=(region, host), kwargs=dict({part}size_bytes=GiB))
second.start()
while copy.is_alive() and device._regions[region.region_id].user_count < 2:
    time.sleep(0.001)
print(device._regions[region.region_id].user_count)
""",
        tmp_path,
    )

    assert "2" == users

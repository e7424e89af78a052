"""When the operating system refuses: one call fails, the shared state stays true, and nothing is left behind."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import softgpu
from tests.unit.softgpu.machines import Machine, MakeMachine

pytestmark = pytest.mark.processes

MiB = 1 << 20

# So many chunks as the process may have descriptors, and then everything that needs one more.
WITHOUT_DESCRIPTORS = """
import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); context(); handles = []
while (answer := create(2 * MiB))[0] == 0: handles.append(answer[1])
exported = cu.cuMemExportToShareableHandle(handles[0], FD, 0)
say(answer[0].name, error(cu.cuMemAlloc(1000)), error(exported), len(handles) > 20)
for handle in handles: ok(cu.cuMemRelease(handle))
say(error(cu.cuMemAlloc(1000))); wait()
"""

WITH_SMALL_FILES = """
import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, MiB)); context()
say(error(create(2 * MiB)), error(cu.cuMemAlloc(3 * MiB)), error(cu.cuMemAlloc(1000))); wait()
"""


def test_no_descriptor_is_left(machine: MakeMachine) -> None:
    one = machine()
    child = one.start(WITHOUT_DESCRIPTORS)
    refused = "CUDA_ERROR_OPERATING_SYSTEM"

    assert child.hear() == [refused, refused, "CUDA_ERROR_INVALID_VALUE", True]
    assert child.hear() == "CUDA_SUCCESS"
    assert one.host.check(is_quiet=True) == []
    assert one.used_bytes() == 1024


def test_files_may_not_grow(machine: MakeMachine) -> None:
    one = machine()
    child = one.start(WITH_SMALL_FILES)
    refused = "CUDA_ERROR_OPERATING_SYSTEM"

    assert child.hear() == [refused, refused, "CUDA_SUCCESS"]
    assert one.host.check(is_quiet=True) == []
    assert one.used_bytes() == 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds the tables of a host and little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_copies_and_allocations(small_disk: Path) -> None:
    one = Machine(softgpu.Host(small_disk / "host", gpus=1, profile="test-1", total_bytes=256 * MiB))
    fill = """
context(); address = ok(cu.cuMemAlloc(100 * MiB)); content = bytes(MiB); failed = 'none'
for step in range(100):
    answer = cu.cuMemcpyHtoD(int(address) + step * MiB, content, MiB)
    if answer[0] != 0: failed = answer[0].name; break
others = [cu.cuMemAlloc(2 * MiB)[0].name for _ in range(5)]
say(failed, sorted(set(others))); ok(cu.cuMemFree(address)); say(error(cu.cuMemAlloc(MiB))); wait()"""
    try:
        child = one.start(fill)

        failed, others = child.hear()

        assert failed == "CUDA_ERROR_OPERATING_SYSTEM"
        assert set(others) <= {"CUDA_ERROR_OPERATING_SYSTEM", "CUDA_SUCCESS"}
        assert child.hear() == "CUDA_SUCCESS"
        assert one.host.check(is_quiet=True) == []
    finally:
        one.close()

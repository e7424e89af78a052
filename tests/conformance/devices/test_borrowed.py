"""Memory behind addresses that another allocator of the process reserved: real implementation, software GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engines.running import SMALL_CONTEXT_BYTES, MiB, software_host

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import json
from devices.api import DeviceError, MiB
from devices.borrowed import BorrowingDevice, gpu_uuid_of
from devices.cuda import CudaDevice

def refused(act):
    try:
        act()
    except DeviceError as error:
        return error.code
    return ""

uuid = gpu_uuid_of(0)
owner, borrower, maker = CudaDevice(uuid), BorrowingDevice(uuid), CudaDevice(uuid)
place = owner.reserve(4 * MiB)
made = maker.allocate(4 * MiB)
maker.fill(made, 7)
region = borrower.borrow(place.address, place.size_bytes)
told = {"uuid": uuid, "odd": refused(lambda: borrower.borrow(place.address, 5))}

exported = maker.export_fds(made)
borrower.import_fds(exported, region=region, is_writable=True)
maker.close_export(exported)
told["seen"] = borrower.read_address(place.address, 2).hex()
told["backed"] = refused(lambda: borrower.release_addresses(region))

copy = borrower.allocate(4 * MiB)
borrower.copy_from_address(copy, place.address)
told["copied"] = borrower.read(copy, offset_bytes=4 * MiB - 1, size_bytes=1).hex()
told["unmapped_bytes"] = borrower.unback(region).released_bytes

borrower.release_addresses(region)
told["forgotten"] = refused(lambda: borrower.is_backed(region))
again = borrower.borrow(place.address, place.size_bytes)
borrower.close()
told["owner_backs"] = owner.back(place).backed_bytes  # its addresses are still its own
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a process said that borrowed."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with software_host(phantom=False, total_bytes=256 * MiB, context_bytes=SMALL_CONTEXT_BYTES) as host:
        environment = {**os.environ, **host.environment(), "PYTHONPATH": str(ROOT)}
        answer = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert answer.returncode == 0, answer.stderr
        found: dict[str, Any] = json.loads(answer.stdout)
        assert found["uuid"] == host.uuids()[0]
    return found


def test_memory_of_another_process_lies_at_the_borrowed_addresses(told: dict[str, Any]) -> None:
    assert ("0707", 4 * MiB) == (told["seen"], told["unmapped_bytes"])


def test_what_lies_at_an_address_can_be_copied_on_the_gpu(told: dict[str, Any]) -> None:
    assert told["copied"] == "07"


def test_borrowed_addresses_are_never_given_back(told: dict[str, Any]) -> None:
    assert 4 * MiB == told["owner_backs"]


def test_wrong_use_is_refused(told: dict[str, Any]) -> None:
    assert ("NOT_WHOLE_GRANULES", "BACKED", "UNKNOWN_REGION") == (told["odd"], told["backed"], told["forgotten"])

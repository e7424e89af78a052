"""The same contract on a physical GPU: `GPU_TESTS=real pytest -m gpu tests/conformance/devices`.

The first GPU has to be idle: the tests fill most of it and expect nobody else to come and go. Limits are tested where
the driver has them, as root, on cgroups made below the test's own.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.conformance.devices.contract import PortContract
from tests.conformance.devices.world import DriverWorld

CGROUP_ROOT = Path("/sys/fs/cgroup")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("GPU_TESTS") != "real", reason="set GPU_TESTS=real to use the physical GPU"),
]


@pytest.fixture(scope="module")
def shared_world() -> Iterator[DriverWorld]:
    made: list[Path] = []
    numbers = itertools.count(1)

    def make_namespace() -> tuple[str, Mapping[str, str]]:
        path = CGROUP_ROOT / f"sublet-test-{os.getpid()}-{next(numbers)}"
        path.mkdir()
        made.append(path)
        return str(path), {}

    world = DriverWorld({}, make_namespace)
    yield world
    world.close()
    for path in made:
        path.rmdir()


@pytest.fixture
def world(shared_world: DriverWorld) -> Iterator[DriverWorld]:
    yield shared_world
    shared_world.renew()


class TestReal(PortContract):
    pass

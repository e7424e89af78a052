"""The virtual-time model keeps the contract."""

from collections.abc import Iterator

import pytest

from tests.conformance.devices.contract import PortContract
from tests.conformance.devices.world import VirtualWorld


class TestVirtual(PortContract):
    @pytest.fixture
    def world(self) -> Iterator[VirtualWorld]:
        world = VirtualWorld()
        yield world
        world.host.check_invariants()

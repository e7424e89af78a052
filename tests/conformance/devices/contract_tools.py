"""What all parts of the contract use.

Sizes are small where bytes are moved, and a large part of the free memory where they are only reserved.
"""

import pytest

from devices.api import (
    Device,
    ExportedMemory,
)
from tests.conformance.devices.world import ProcessUnderTest, World

PATTERN = bytes(range(256)) * 16


@pytest.fixture
def process(world: World) -> ProcessUnderTest:
    return world.start()


@pytest.fixture
def device(process: ProcessUnderTest) -> Device:
    return process.device


@pytest.fixture
def uuid(world: World) -> str:
    return world.inventory.gpus()[0].uuid


def used_bytes(world: World) -> int:
    return world.inventory.memory(world.inventory.gpus()[0].uuid).used_bytes


def most_of_the_free(world: World) -> int:
    """So much that it fits once and not twice."""
    return world.inventory.memory(world.inventory.gpus()[0].uuid).free_bytes // 5 * 3


def close_exports(*exports: tuple[Device, ExportedMemory]) -> None:
    """Every copy of the descriptors has to be closed, or the memory would still count in the next test."""
    for device, exported in exports:
        device.close_export(exported)

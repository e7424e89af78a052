"""What a restore costs on the software H100, where only time passes and no byte moves; and that the model agrees."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import softgpu
from devices.api import Device
from devices.profiles import profile
from devices.virtual import VirtualDevice, VirtualGpu, VirtualHost
from tests.conformance.devices.world import DriverWorld

# The article's 7B model in BF16.
WEIGHTS_BYTES = 14_500_000_000
LINK_BYTES_PER_S = 53_000_000_000
# This machine is shared: the best of so many runs says what the code costs, the others what the neighbours did.
RUNS = 3
RUNS_MAX = 30
# Below the half more that a restore without overlap would take, above what a busy neighbour costs.
TOLERANCE_FRACTION = 0.25
ENOUGH_S = WEIGHTS_BYTES / LINK_BYTES_PER_S * (1 + TOLERANCE_FRACTION / 2)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="sublet-timing-") as directory:
        host = softgpu.Host(Path(directory), gpus=1, profile="h100-80", phantom=True).create()
        world = DriverWorld(host.environment(), None)
        yield world.start().device
        world.close()


@pytest.fixture
def virtual() -> Device:
    host = VirtualHost([VirtualGpu(uuid="GPU-virtual-0", profile=profile("h100-80"))])
    return VirtualDevice(host, "GPU-virtual-0", pid=host.start_process())


def best_restore_s(device: Device) -> float:
    """Of several, and of many more while a busy neighbour holds all of them up."""
    region, arena = device.reserve(WEIGHTS_BYTES), device.host_arena(WEIGHTS_BYTES)
    try:
        seconds: list[float] = []
        while len(seconds) < RUNS or (len(seconds) < RUNS_MAX and min(seconds) > ENOUGH_S):
            seconds.append(device.restore(region, arena).restore_s)
            device.unback(region)
        return min(seconds)
    finally:
        arena.close()
        device.free(region)


def test_a_restore_runs_at_link_speed_because_backing_is_hidden(device: Device) -> None:
    floor_s = WEIGHTS_BYTES / LINK_BYTES_PER_S

    assert floor_s <= best_restore_s(device) < floor_s * (1 + TOLERANCE_FRACTION)


def test_the_virtual_restore_costs_what_the_software_driver_takes(device: Device, virtual: Device) -> None:
    region, arena = virtual.reserve(WEIGHTS_BYTES), virtual.host_arena(WEIGHTS_BYTES)

    assert best_restore_s(device) == pytest.approx(virtual.restore(region, arena).restore_s, rel=TOLERANCE_FRACTION)


def test_giving_memory_back_costs_no_copy(device: Device, virtual: Device) -> None:
    for implementation in (device, virtual):
        taken_s = [implementation.free(implementation.allocate(WEIGHTS_BYTES)).unback_s for _ in range(RUNS)]

        assert min(taken_s) < 0.1


def test_both_know_the_same_gpu() -> None:
    """The numbers stand in two places, because neither folder may import the other."""
    theirs = softgpu.profiles()
    for name, ours in ((name, profile(name)) for name in ("h100-80", "h200-141", "a100-80")):
        assert theirs[name].total_bytes == ours.capacity_bytes
        assert theirs[name].context_bytes == ours.context_bytes
        assert theirs[name].h2d_bytes_per_s == ours.to_device_bytes_per_s
        assert theirs[name].d2h_bytes_per_s == ours.to_host_bytes_per_s
        assert theirs[name].pageable_bytes_per_s == ours.pageable_bytes_per_s
        assert theirs[name].name == ours.title

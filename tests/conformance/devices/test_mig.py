"""GPUs that are cut into MIG instances, through the port, over the software driver."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import softgpu
from devices.api import GiB, GpuFault, MiB, NotFound, OutOfMemory
from devices.mig import Part, struck
from tests.conformance.devices.world import DriverWorld

pytestmark = pytest.mark.processes


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    """The first of two GPUs is cut in two."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="sublet-mig-") as directory:
        yield softgpu.Host(
            Path(directory),
            gpus=2,
            profile="test-1",
            total_bytes=4 * GiB,
            reserved_bytes=0,
            context_bytes=16 * MiB,
            mig={0: ("1g.10gb", "3g.40gb")},
        ).create()


@pytest.fixture
def world(host: softgpu.Host) -> Iterator[DriverWorld]:
    def no_namespace() -> tuple[str, Mapping[str, str]]:
        raise AssertionError("not asked for")

    world = DriverWorld(host.environment(), no_namespace, lambda _: None)
    yield world
    world.close()


def test_instances_are_listed_after_all_gpus_and_their_gpu_is_not(host: softgpu.Host, world: DriverWorld) -> None:
    gpus = world.inventory.gpus()

    assert [host.uuids()[1], *host.mig_uuids()] == [gpu.uuid for gpu in gpus]
    assert [1, 2, 3] == [gpu.index for gpu in gpus]
    assert [4 * GiB, GiB // 2, 2 * GiB] == [gpu.capacity_bytes for gpu in gpus]
    whole, part = gpus[0], gpus[1]
    assert "MIG 1g.10gb" in part.name
    assert (whole.link_generation, whole.link_width_count) == (part.link_generation, part.link_width_count)
    assert whole.pci_bus_id != part.pci_bus_id


def test_a_device_is_opened_by_the_uuid_of_an_instance_and_has_its_memory(
    host: softgpu.Host, world: DriverWorld
) -> None:
    small, large = host.mig_uuids()
    device = world.open_device(small)

    assert GiB // 2 == device.memory().capacity_bytes
    with pytest.raises(OutOfMemory):
        device.allocate(GiB)
    device.allocate(256 * MiB)
    assert [272 * MiB] == list(world.inventory.process_bytes(small).values())
    assert {} == world.inventory.process_bytes(large)


def test_the_driver_has_no_limits_for_instances(host: softgpu.Host, world: DriverWorld) -> None:
    support = world.inventory.limits_support(host.mig_uuids()[0])

    assert not support.is_supported
    assert "MIG" in support.reason


def test_an_instance_is_as_hot_as_its_gpu(host: softgpu.Host, world: DriverWorld) -> None:
    host.set_health(0, temperature_c=90, is_hot=True, ecc_error_count=2)

    condition = world.inventory.condition(host.mig_uuids()[0])

    assert (90, True, 2) == (condition.temperature_c, condition.is_too_hot, condition.ecc_error_count)
    assert world.inventory.utilization_fraction(host.mig_uuids()[0]) is None


def test_an_error_of_the_gpu_is_told_of_all_its_instances(host: softgpu.Host, world: DriverWorld) -> None:
    world.inventory.faults(wait_s=0)
    host.send_xid(0, 95)

    faults = world.inventory.faults(wait_s=10)

    assert [GpuFault(gpu_uuid=uuid, xid=95) for uuid in host.mig_uuids()] == list(faults)


def test_instances_go_and_return_with_their_gpu(host: softgpu.Host, world: DriverWorld) -> None:
    host.set_lost(0)
    away = [gpu.uuid for gpu in world.inventory.gpus()]
    host.set_lost(0, is_lost=False)

    assert [host.uuids()[1]] == away
    assert 3 == len(world.inventory.gpus())
    with pytest.raises(NotFound):
        world.inventory.memory("MIG-00000000-0000-0000-0000-000000000000")


def test_an_error_of_one_instance_is_told_of_it_alone() -> None:
    parts = [Part(uuid="a", instance_id=1), Part(uuid="b", instance_id=2)]

    assert ["b"] == struck(parts, instance_id=2)
    assert ["a", "b"] == struck(parts, instance_id=0xFFFFFFFF)
    assert ["gpu"] == struck([Part(uuid="gpu", instance_id=None)], instance_id=2)

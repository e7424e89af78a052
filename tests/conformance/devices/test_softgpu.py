"""The real implementation keeps the contract over the software driver, which also provokes what hardware will not."""

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import softgpu
from devices.api import ClientEvicted, DeviceError, DeviceLost, GiB, GpuFault, MiB, NotPermitted, OutOfMemory
from tests.conformance.devices.contract import PortContract
from tests.conformance.devices.world import DriverWorld

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def host() -> Iterator[softgpu.Host]:
    """Two small GPUs that charge for contexts and keep a reserve, and are as fast as this machine."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="sublet-devices-") as directory:
        yield softgpu.Host(
            Path(directory),
            gpus=2,
            profile="test-1",
            total_bytes=4 * GiB,
            reserved_bytes=32 * MiB,
            context_bytes=16 * MiB,
        ).create()


@pytest.fixture(scope="module")
def shared_world(host: softgpu.Host) -> Iterator[DriverWorld]:
    numbers = itertools.count(1)

    def make_namespace() -> tuple[str, Mapping[str, str]]:
        name = f"group-{next(numbers)}"
        return name, host.environment(group=name)

    world = DriverWorld(host.environment(), make_namespace, lambda is_on: host.set_mps(is_on=is_on))
    yield world
    world.close()


@pytest.fixture
def world(host: softgpu.Host, shared_world: DriverWorld) -> Iterator[DriverWorld]:
    yield shared_world
    shared_world.renew()
    assert [0, 0] == [device["used_bytes"] for device in host.status()["devices"]], "the test left memory behind"


class TestSoftgpu(PortContract):
    pass


class TestProvoked:
    def test_the_software_driver_says_what_it_is(self, world: DriverWorld) -> None:
        assert all(gpu.is_software for gpu in world.inventory.gpus())

    def test_a_fault_half_way_rolls_the_restore_back(self, host: softgpu.Host, world: DriverWorld) -> None:
        device = world.start().device
        region, arena = device.reserve(256 * MiB), device.host_arena(4 * MiB)
        before_bytes = device.memory().used_bytes

        for function in ("cuMemCreate", "cuMemMap", "cuMemSetAccess"):
            host.set_fault(function, after=2, times=1, code=999)
            with pytest.raises(DeviceLost) as refused:
                device.restore(region, arena)
            host.clear_faults()

            assert function == refused.value.call
            assert not device.is_backed(region)
            assert before_bytes == device.memory().used_bytes

        device.restore(region, arena)

    def test_an_evicted_client_is_told_so(self, host: softgpu.Host, world: DriverWorld) -> None:
        device = world.start().device
        host.set_fault("cuMemCreate", times=1, code=810)

        with pytest.raises(ClientEvicted):
            device.allocate(2 * MiB)

        host.clear_faults()

    def test_when_the_host_runs_out_the_gpus_room_is_not_reported_for_it(
        self, host: softgpu.Host, world: DriverWorld
    ) -> None:
        device = world.start().device
        host.set_fault("cuMemHostAlloc", times=1, code=2)

        with pytest.raises(OutOfMemory) as refused:
            device.host_arena(MiB)

        assert (refused.value.requested_bytes, refused.value.free_bytes) == (MiB, None)
        host.clear_faults()

    def test_an_error_that_nobody_knows_keeps_its_name(self, host: softgpu.Host, world: DriverWorld) -> None:
        device = world.start().device
        host.set_fault("cuMemCreate", times=1, code=304)

        with pytest.raises(DeviceError) as refused:
            device.allocate(2 * MiB)

        assert (refused.value.call, refused.value.code) == ("cuMemCreate", "CUDA_ERROR_OPERATING_SYSTEM")
        host.clear_faults()

    def test_limits_without_permission_are_not_supported_and_say_why(
        self, host: softgpu.Host, world: DriverWorld
    ) -> None:
        uuid = world.inventory.gpus()[0].uuid
        host.set_fault("nvmlDeviceSetMemoryLimits_v1", times=-1, code=4)

        support = world.inventory.limits_support(uuid)
        with pytest.raises(NotPermitted):
            world.inventory.set_limit(uuid, "group", soft_bytes=0, hard_bytes=None)

        assert not support.is_supported
        assert "root" in support.reason
        host.clear_faults()

    def test_an_old_driver_has_no_limits(self, host: softgpu.Host, world: DriverWorld) -> None:
        host.set_fault("nvmlDeviceGetMemoryLimits_v1", times=-1, code=13)

        support = world.inventory.limits_support(world.inventory.gpus()[0].uuid)

        assert not support.is_supported
        assert "R615" in support.reason
        host.clear_faults()

    def test_a_driver_error_is_reported_once(self, host: softgpu.Host, world: DriverWorld) -> None:
        uuid = world.inventory.gpus()[1].uuid
        assert world.inventory.faults(wait_s=0) == ()  # listens from here on

        host.send_xid(1, 79)

        assert (GpuFault(gpu_uuid=uuid, xid=79),) == world.inventory.faults(wait_s=60)
        assert world.inventory.faults(wait_s=0) == ()

    def test_waiting_for_a_fault_ends_in_time(self, world: DriverWorld) -> None:
        started_s = time.monotonic()

        assert world.inventory.faults(wait_s=0.2) == ()
        assert 0.15 < time.monotonic() - started_s < 30

    def test_a_lost_gpu_is_left_out_and_refuses_everything(self, host: softgpu.Host, world: DriverWorld) -> None:
        process = world.start()
        device, region = process.device, process.device.allocate(4 * MiB)
        host.set_lost(0)
        try:
            assert len(world.inventory.gpus()) == 1
            with pytest.raises(DeviceLost):
                world.inventory.memory(device.gpu_uuid)
            with pytest.raises(DeviceLost):
                device.fill(region, 0)
            device.close()
        finally:
            host.set_lost(0, is_lost=False)
            process.kill()  # a lost GPU frees nothing; only the end of the process does

    def test_utilization_is_what_the_driver_says(self, host: softgpu.Host, world: DriverWorld) -> None:
        host.set_utilization(0, gpu_percent=37, memory_percent=0)

        assert world.inventory.utilization_fraction(world.inventory.gpus()[0].uuid) == 0.37

"""What only the virtual model can show: exact costs, queues for the link, eviction, determinism."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.api import (
    ClientEvicted,
    DeviceError,
    DeviceLost,
    GiB,
    InvalidUse,
    MiB,
    NotSupported,
    OutOfMemory,
)
from devices.checkpoint import CheckpointState
from devices.profiles import profile
from devices.virtual import VirtualDevice, VirtualGpu, VirtualHost, VirtualInventory
from devices.virtual_checkpoint import VirtualProcessCheckpoint

H100 = profile("h100-80")
GPU = "GPU-virtual-0"


def host_with(*, gpu_count: int = 1, evicts: bool = False) -> VirtualHost:
    return VirtualHost(
        [VirtualGpu(uuid=f"GPU-virtual-{index}", profile=H100) for index in range(gpu_count)], evicts=evicts
    )


def device_on(host: VirtualHost, *, namespace: str = "", gpu_uuid: str = GPU) -> VirtualDevice:
    return VirtualDevice(host, gpu_uuid, pid=host.start_process(namespace=namespace))


class TestCosts:
    def test_a_restore_takes_the_copy_and_the_first_chunk(self) -> None:
        device = device_on(host_with())
        region, arena = device.reserve(14_500_000_000), device.host_arena(14_500_000_000)

        result = device.restore(region, arena)

        copy_s = 14_500_000_000 / H100.to_device_bytes_per_s
        assert result.restore_s == pytest.approx(copy_s + result.back_s / 217, rel=1e-6)
        assert result.back_s == pytest.approx(H100.call_s + region.size_bytes / H100.back_bytes_per_s)

    def test_without_bytes_to_copy_a_restore_takes_as_long_as_backing(self) -> None:
        device = device_on(host_with())
        region = device.reserve(8 * GiB)

        result = device.restore(region, device.host_arena(1), size_bytes=0)

        assert result.restore_s == result.back_s

    def test_copies_of_one_direction_queue_for_the_link(self) -> None:
        host = host_with()
        first, second = device_on(host), device_on(host)
        one_s = GiB / H100.to_device_bytes_per_s

        durations = [
            device.copy_to_device(device.allocate(GiB), device.host_arena(GiB)).copy_s for device in (first, second)
        ]

        assert durations == pytest.approx([one_s, 2 * one_s])

    def test_the_two_directions_and_two_gpus_do_not_wait_for_each_other(self) -> None:
        host = host_with(gpu_count=2)
        first, second = device_on(host), device_on(host, gpu_uuid="GPU-virtual-1")
        region, arena = first.allocate(GiB), first.host_arena(GiB)
        one_s = GiB / H100.to_device_bytes_per_s

        durations = [
            first.copy_to_device(region, arena).copy_s,
            first.copy_to_host(region, arena).copy_s,
            second.copy_to_device(second.allocate(GiB), second.host_arena(GiB)).copy_s,
        ]

        assert durations == pytest.approx([one_s] * 3)

    def test_the_link_is_free_again_when_time_has_passed(self) -> None:
        host = host_with()
        device = device_on(host)
        region, arena = device.allocate(GiB), device.host_arena(GiB)
        one_s = device.copy_to_device(region, arena).copy_s

        host.advance_to(one_s)

        assert device.copy_to_device(region, arena).copy_s == pytest.approx(one_s)

    def test_time_does_not_go_back(self) -> None:
        host = host_with()
        host.advance_to(2)

        with pytest.raises(ValueError, match="back"):
            host.advance_to(1)

    def test_every_cost_is_in_the_sum_that_is_taken_once(self) -> None:
        device = device_on(host_with())
        assert device.take_spent_s() == H100.context_s
        region = device.reserve(GiB)

        backed, released = device.back(region), device.unback(region)

        assert device.take_spent_s() == pytest.approx(backed.back_s + released.unback_s)
        assert device.take_spent_s() == 0


class TestMemory:
    def test_the_next_owner_finds_the_last_owners_bytes_unless_they_were_scrubbed(self) -> None:
        host = host_with()
        tenant, other = device_on(host), device_on(host)
        secret = tenant.allocate(4 * MiB)
        tenant.write(secret, b"secret", offset_bytes=MiB)
        tenant.free(secret)

        found = other.allocate(4 * MiB)
        assert other.read(found, offset_bytes=MiB, size_bytes=6) == b"secret"
        other.fill(found, 0)
        other.free(found)

        assert tenant.read(tenant.allocate(4 * MiB), offset_bytes=MiB, size_bytes=6) == bytes(6)

    def test_a_limit_on_an_ancestor_counts_and_is_not_seen(self) -> None:
        host = host_with()
        device = device_on(host, namespace="/slice/pod")
        host.add_namespace("/slice")
        VirtualInventory(host).set_limit(GPU, "/slice", soft_bytes=0, hard_bytes=H100.context_bytes + GiB)

        assert device.memory().capacity_bytes == H100.capacity_bytes - H100.reserved_bytes
        with pytest.raises(OutOfMemory):
            device.allocate(2 * GiB)

    def test_an_owner_inside_its_request_evicts_the_furthest_borrower_where_that_is_on(self) -> None:
        host = host_with(evicts=True)
        inventory = VirtualInventory(host)
        owner, modest, greedy = (device_on(host, namespace=name) for name in ("owner", "modest", "greedy"))
        inventory.set_limit(GPU, "owner", soft_bytes=40 * GiB, hard_bytes=None)
        inventory.set_limit(GPU, "modest", soft_bytes=30 * GiB, hard_bytes=None)
        modest.allocate(29 * GiB)
        greedy.allocate(40 * GiB)
        with pytest.raises(OutOfMemory):  # above its request, the modest one may not evict
            modest.allocate(20 * GiB)

        owner.allocate(30 * GiB)

        with pytest.raises(ClientEvicted):
            greedy.memory()
        assert modest.memory().free_bytes > 0
        host.check_invariants()

    def test_without_eviction_a_guarantee_is_no_room(self) -> None:
        host = host_with()
        owner, greedy = device_on(host, namespace="owner"), device_on(host)
        VirtualInventory(host).set_limit(GPU, "owner", soft_bytes=40 * GiB, hard_bytes=None)
        greedy.allocate(60 * GiB)

        with pytest.raises(OutOfMemory):
            owner.allocate(30 * GiB)

    def test_a_host_without_limits_says_so(self) -> None:
        host = VirtualHost([VirtualGpu(uuid=GPU, profile=H100)], has_limits=False)
        inventory = VirtualInventory(host)

        assert not inventory.limits_support(GPU).is_supported
        with pytest.raises(NotSupported):
            inventory.limit(GPU, "group")

    def test_a_lost_gpu_is_reported_once_and_refuses_everything(self) -> None:
        host = host_with(gpu_count=2)
        inventory, device = VirtualInventory(host), device_on(host)
        region = device.allocate(MiB)

        host.lose_gpu(GPU)

        assert [fault.xid for fault in inventory.faults(wait_s=0)] == [79]
        assert inventory.faults(wait_s=0) == ()
        assert [gpu.index for gpu in inventory.gpus()] == [1]
        for act in (lambda: inventory.memory(GPU), device.memory, lambda: device.fill(region, 0)):
            with pytest.raises(DeviceLost):
                act()
        device.close()


class TestCheckpoint:
    def test_a_parked_process_holds_no_device_memory_and_returns_with_it(self) -> None:
        host = host_with()
        device, checkpoint = device_on(host), VirtualProcessCheckpoint(host)
        region = device.allocate(10 * GiB)
        device.write(region, b"weights")
        before = VirtualInventory(host).memory(GPU)

        checkpoint.lock(device.pid, timeout_s=1)
        out_s = checkpoint.checkpoint(device.pid)
        parked = VirtualInventory(host).memory(GPU)
        back_s = checkpoint.restore(device.pid)
        checkpoint.unlock(device.pid)

        moved_bytes = 10 * GiB + H100.context_bytes
        assert before.used_bytes - parked.used_bytes == moved_bytes
        assert out_s == pytest.approx(moved_bytes / H100.checkpoint_bytes_per_s)
        assert back_s == pytest.approx(moved_bytes / H100.restore_bytes_per_s)
        assert VirtualInventory(host).memory(GPU) == before
        assert device.read(region, size_bytes=7) == b"weights"

    def test_steps_out_of_order_are_refused(self) -> None:
        host = host_with()
        device, checkpoint = device_on(host), VirtualProcessCheckpoint(host)

        for act in (checkpoint.checkpoint, checkpoint.restore, checkpoint.unlock):
            with pytest.raises(InvalidUse):
                act(device.pid)
        checkpoint.lock(device.pid, timeout_s=1)
        with pytest.raises(InvalidUse):
            checkpoint.lock(device.pid, timeout_s=1)
        with pytest.raises(InvalidUse):
            device.memory()

    def test_a_restore_that_does_not_fit_leaves_the_process_parked(self) -> None:
        host = host_with()
        device, other, checkpoint = device_on(host), device_on(host), VirtualProcessCheckpoint(host)
        device.allocate(50 * GiB)
        checkpoint.lock(device.pid, timeout_s=1)
        checkpoint.checkpoint(device.pid)
        other.allocate(50 * GiB)

        with pytest.raises(OutOfMemory):
            checkpoint.restore(device.pid)

        assert checkpoint.state(device.pid) is CheckpointState.CHECKPOINTED
        host.end_process(device.pid)
        host.check_invariants()

    def test_shared_memory_cannot_be_parked(self) -> None:
        host = host_with()
        device, other, checkpoint = device_on(host), device_on(host), VirtualProcessCheckpoint(host)
        other.import_fds(device.export_fds(device.allocate(MiB)))
        checkpoint.lock(device.pid, timeout_s=1)

        with pytest.raises(NotSupported):
            checkpoint.checkpoint(device.pid)


ACTIONS = (
    "allocate",
    "reserve",
    "restore",
    "unback",
    "back",
    "free",
    "export",
    "kill",
    "limit",
    "clear",
    "park",
    "wake",
)


def run(script: list[tuple[str, int, int]]) -> list[object]:
    """Three processes do what the script says; what each step answered, with the invariants checked after it."""
    host = host_with(gpu_count=2, evicts=True)
    inventory, checkpoint = VirtualInventory(host), VirtualProcessCheckpoint(host)
    devices = [device_on(host, namespace=f"group-{number}") for number in range(3)]
    regions = [[device.reserve(MiB)] for device in devices]
    trace: list[object] = []
    for (action, who, amount), tick in zip(script, itertools.count(1), strict=False):
        device, mine, size_bytes = devices[who], regions[who], (amount + 1) * GiB
        region = mine[amount % len(mine)]
        host.advance_to(tick / 10)
        try:
            match action:
                case "allocate":
                    mine.append(device.allocate(size_bytes))
                case "reserve":
                    mine.append(device.reserve(size_bytes))
                case "restore":
                    trace.append(device.restore(region, device.host_arena(size_bytes)))
                case "unback":
                    trace.append(device.unback(region))
                case "back":
                    trace.append(device.back(region))
                case "free":
                    trace.append(device.free(region))
                case "export":
                    exported = device.export_fds(region)
                    other = devices[(who + 1) % 3]
                    regions[(who + 1) % 3].append(other.import_fds(exported))
                    device.close_export(exported)
                case "kill":
                    host.end_process(device.pid)
                    devices[who], regions[who] = device_on(host, namespace=f"group-{who}"), []
                    regions[who].append(devices[who].reserve(MiB))
                case "limit":
                    inventory.set_limit(GPU, f"group-{who}", soft_bytes=size_bytes, hard_bytes=2 * size_bytes)
                case "clear":
                    inventory.clear_limit(GPU, f"group-{who}")
                case "park":
                    checkpoint.lock(device.pid, timeout_s=1)
                    trace.append(checkpoint.checkpoint(device.pid))
                case "wake":
                    trace.append(checkpoint.restore(device.pid))
                    checkpoint.unlock(device.pid)
        except DeviceError as error:
            trace.append(str(error))
        host.check_invariants()
        trace.append(inventory.memory(GPU))
    return trace


scripts = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2), st.integers(0, 40)), max_size=40)


@given(scripts)
def test_no_history_oversubscribes_and_the_same_history_gives_the_same_trace(
    script: list[tuple[str, int, int]],
) -> None:
    assert run(script) == run(script)

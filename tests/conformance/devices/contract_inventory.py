"""The contract of `Inventory`."""

import pytest

from devices.api import (
    ClientEvicted,
    InvalidUse,
    MiB,
    NotFound,
    OutOfMemory,
)
from tests.conformance.devices.contract_tools import used_bytes
from tests.conformance.devices.world import World


class InventoryContract:
    def test_lists_gpus_by_index_with_distinct_uuids(self, world: World) -> None:
        gpus = world.inventory.gpus()

        assert list(range(len(gpus))) == [gpu.index for gpu in gpus]
        assert len({gpu.uuid for gpu in gpus}) == len(gpus) > 0
        assert all(0 <= gpu.reserved_bytes < gpu.capacity_bytes for gpu in gpus)

    def test_memory_adds_up_and_counts_the_reserve_as_used(self, world: World) -> None:
        for gpu in world.inventory.gpus():
            memory = world.inventory.memory(gpu.uuid)

            assert gpu.capacity_bytes == memory.capacity_bytes == memory.used_bytes + memory.free_bytes
            assert memory.used_bytes >= gpu.reserved_bytes

    def test_an_unknown_gpu_is_not_found(self, world: World) -> None:
        with pytest.raises(NotFound):
            world.inventory.memory("GPU-00000000-0000-0000-0000-000000000000")

    def test_names_each_process_with_its_bytes(self, world: World, uuid: str) -> None:
        before_bytes = used_bytes(world)
        first, second = world.start(), world.start()
        first.device.allocate(96 * MiB)

        by_pid = world.inventory.process_bytes(uuid)

        assert {first.pid, second.pid} <= set(by_pid)
        assert by_pid[first.pid] == (by_pid[second.pid] or 0) + 96 * MiB  # the context costs both the same
        assert used_bytes(world) - before_bytes == sum(by_pid[pid] or 0 for pid in (first.pid, second.pid))

    def test_a_killed_process_leaves_nothing_behind(self, world: World, uuid: str) -> None:
        before_bytes = used_bytes(world)
        process = world.start()
        process.device.allocate(96 * MiB)

        process.kill()

        assert process.pid not in world.inventory.process_bytes(uuid)
        assert before_bytes == used_bytes(world)

    def test_utilization_is_a_fraction_or_unknown(self, world: World, uuid: str) -> None:
        fraction = world.inventory.utilization_fraction(uuid)

        assert fraction is None or 0 <= fraction <= 1

    def test_a_gpu_tells_how_it_is_or_that_it_cannot(self, world: World, uuid: str) -> None:
        condition = world.inventory.condition(uuid)

        assert condition.temperature_c is None or 0 < condition.temperature_c < 120
        assert condition.is_too_hot in (None, False, True)
        assert condition.ecc_error_count is None or condition.ecc_error_count >= 0

    def test_the_condition_of_an_unknown_gpu_is_not_found(self, world: World) -> None:
        with pytest.raises(NotFound):
            world.inventory.condition("GPU-00000000-0000-0000-0000-000000000000")

    def test_direct_links_lead_to_other_gpus_of_the_host_at_some_rate(self, world: World) -> None:
        uuids = {gpu.uuid for gpu in world.inventory.gpus()}
        for uuid in uuids:
            rates = world.inventory.peer_bytes_per_s(uuid)

            assert rates.keys() <= uuids - {uuid}
            assert all(rate > 0 for rate in rates.values())

    def test_no_fault_is_an_empty_answer(self, world: World) -> None:
        assert world.inventory.faults(wait_s=0) == ()

    def test_a_closed_inventory_answers_nothing(self, world: World) -> None:
        world.inventory.close()
        world.inventory.close()

        with pytest.raises(InvalidUse):
            world.inventory.gpus()


class LimitsContract:
    def test_without_a_limit_a_group_has_no_request_and_no_ceiling(self, world: World, uuid: str) -> None:
        limit = world.inventory.limit(uuid, world.namespace())

        assert (limit.soft_bytes, limit.hard_bytes, limit.used_bytes) == (0, None, 0)

    def test_a_limit_is_read_back_as_set_and_can_be_cleared_twice(self, world: World, uuid: str) -> None:
        group = world.namespace()

        world.inventory.set_limit(uuid, group, soft_bytes=300 * MiB, hard_bytes=500 * MiB)
        limit = world.inventory.limit(uuid, group)
        world.inventory.clear_limit(uuid, group)
        world.inventory.clear_limit(uuid, group)
        cleared = world.inventory.limit(uuid, group)

        assert (300 * MiB, 500 * MiB) == (limit.soft_bytes, limit.hard_bytes)
        assert (cleared.soft_bytes, cleared.hard_bytes) == (0, None)

    def test_a_group_cannot_pass_its_hard_limit_though_the_gpu_has_room(self, world: World, uuid: str) -> None:
        group = world.namespace()
        process = world.start(namespace=group)
        context_bytes = world.inventory.limit(uuid, group).used_bytes
        world.inventory.set_limit(uuid, group, soft_bytes=0, hard_bytes=context_bytes + 128 * MiB)
        process.device.allocate(96 * MiB)

        with pytest.raises(OutOfMemory):
            process.device.allocate(64 * MiB)

        assert context_bytes + 96 * MiB == world.inventory.limit(uuid, group).used_bytes

    def test_a_raised_limit_counts_at_once(self, world: World, uuid: str) -> None:
        group = world.namespace()
        process = world.start(namespace=group)
        context_bytes = world.inventory.limit(uuid, group).used_bytes
        world.inventory.set_limit(uuid, group, soft_bytes=0, hard_bytes=context_bytes + 32 * MiB)
        with pytest.raises(OutOfMemory):
            process.device.allocate(64 * MiB)

        world.inventory.set_limit(uuid, group, soft_bytes=0, hard_bytes=context_bytes + 64 * MiB)

        process.device.allocate(64 * MiB)

    def test_a_limit_below_use_takes_nothing_back(self, world: World, uuid: str) -> None:
        group = world.namespace()
        process = world.start(namespace=group)
        region = process.device.allocate(64 * MiB)
        used = world.inventory.limit(uuid, group).used_bytes

        world.inventory.set_limit(uuid, group, soft_bytes=0, hard_bytes=used - 32 * MiB)

        assert process.device.is_backed(region)
        assert used == world.inventory.limit(uuid, group).used_bytes
        with pytest.raises(OutOfMemory):
            process.device.allocate(2 * MiB)

    def test_inside_the_group_the_hard_limit_is_the_size_of_the_gpu(self, world: World, uuid: str) -> None:
        group = world.namespace()
        world.inventory.set_limit(uuid, group, soft_bytes=0, hard_bytes=1024 * MiB)

        memory = world.start(namespace=group).device.memory()

        assert memory.capacity_bytes == 1024 * MiB

    def test_one_group_does_not_limit_another(self, world: World, uuid: str) -> None:
        group = world.namespace()
        world.inventory.set_limit(uuid, group, soft_bytes=0, hard_bytes=2 * MiB)

        world.start().device.allocate(64 * MiB)

    def test_a_request_above_the_ceiling_is_refused(self, world: World, uuid: str) -> None:
        with pytest.raises(InvalidUse):
            world.inventory.set_limit(uuid, world.namespace(), soft_bytes=2 * MiB, hard_bytes=1 * MiB)

    def test_a_directory_that_does_not_exist_is_not_found(self, world: World, uuid: str) -> None:
        world.namespace()  # skips where there are no limits

        with pytest.raises(NotFound):
            world.inventory.set_limit(uuid, "/sys/fs/cgroup/no/such/group", soft_bytes=0, hard_bytes=None)

    def test_a_borrower_is_evicted_for_an_owner_inside_its_request(self, world: World, uuid: str) -> None:
        world.let_evict()
        total_bytes = world.inventory.memory(uuid).free_bytes
        namespaces = world.namespace(), world.namespace()
        half_bytes = total_bytes // 2
        for namespace, soft_bytes in zip(namespaces, (half_bytes, 0), strict=True):
            world.inventory.set_limit(
                uuid, namespace, soft_bytes=soft_bytes, hard_bytes=None if soft_bytes else total_bytes
            )
        owner, borrower = (world.start(namespace=namespace) for namespace in namespaces)
        borrower.device.allocate(total_bytes * 3 // 4)

        owner.device.allocate(total_bytes // 3)

        with pytest.raises(ClientEvicted):
            borrower.device.allocate(2 * MiB)
        assert world.inventory.limit(uuid, namespaces[1]).used_bytes == 0
        for namespace in namespaces:
            world.inventory.clear_limit(uuid, namespace)
        borrower.kill()

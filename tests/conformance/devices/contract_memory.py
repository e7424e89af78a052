"""The contract of `Device`: regions and copies."""

import pytest

from devices.api import (
    Device,
    DeviceSettings,
    InvalidUse,
    MiB,
    NotFound,
    OutOfMemory,
    Region,
)
from tests.conformance.devices.contract_tools import PATTERN, most_of_the_free, used_bytes
from tests.conformance.devices.world import ProcessUnderTest, World


class RegionContract:
    def test_opening_an_unknown_gpu_is_refused(self, world: World) -> None:
        with pytest.raises(NotFound):
            world.open_device("GPU-00000000-0000-0000-0000-000000000000")

    def test_addresses_cost_no_memory(self, world: World, device: Device) -> None:
        before_bytes = used_bytes(world)

        region = device.reserve(most_of_the_free(world))

        assert before_bytes == used_bytes(world)
        assert not device.is_backed(region)

    def test_sizes_are_rounded_up_to_the_granularity(self, device: Device) -> None:
        region = device.reserve(1)

        assert device.granularity_bytes == region.size_bytes
        assert region.address % device.granularity_bytes == 0

    def test_regions_do_not_overlap(self, device: Device) -> None:
        first, second = sorted((device.reserve(6 * MiB), device.reserve(6 * MiB)), key=lambda region: region.address)

        assert first.address + first.size_bytes <= second.address

    def test_the_chunk_size_is_a_setting(self, world: World) -> None:
        device = world.start(settings=DeviceSettings(chunk_bytes=3 * MiB)).device

        assert device.chunk_bytes == 4 * MiB
        assert 10 * MiB == device.back(device.reserve(10 * MiB)).backed_bytes

    def test_memory_comes_and_goes_behind_the_same_addresses(self, world: World, device: Device) -> None:
        region = device.reserve(130 * MiB)
        before_bytes = used_bytes(world)

        for _ in range(3):
            backed = device.back(region)
            resident_bytes = used_bytes(world)
            released = device.unback(region)

            assert region.size_bytes == backed.backed_bytes == released.released_bytes == resident_bytes - before_bytes
            assert before_bytes == used_bytes(world)

    def test_backing_twice_is_refused_and_unbacking_twice_does_nothing(self, device: Device) -> None:
        region = device.allocate(4 * MiB)
        with pytest.raises(InvalidUse):
            device.back(region)

        device.unback(region)

        assert device.unback(region).released_bytes == 0
        assert not device.is_backed(region)

    def test_addresses_of_backed_memory_cannot_be_released(self, device: Device) -> None:
        region = device.allocate(4 * MiB)

        with pytest.raises(InvalidUse):
            device.release_addresses(region)

        assert device.is_backed(region)

    def test_a_released_region_is_unknown(self, device: Device) -> None:
        region = device.reserve(4 * MiB)
        device.release_addresses(region)

        for act in (device.back, device.unback, device.free, device.is_backed, device.release_addresses):
            with pytest.raises(InvalidUse):
                act(region)

    def test_a_region_of_another_device_is_unknown(self, world: World, device: Device) -> None:
        foreign = Region(region_id=10**6, gpu_uuid=device.gpu_uuid, address=0x1000_0000, size_bytes=2 * MiB)

        with pytest.raises(InvalidUse):
            device.back(foreign)

    def test_free_works_backed_or_not(self, world: World, device: Device) -> None:
        before_bytes = used_bytes(world)

        assert 4 * MiB == device.free(device.allocate(4 * MiB)).released_bytes
        assert device.free(device.reserve(4 * MiB)).released_bytes == 0
        assert before_bytes == used_bytes(world)

    @pytest.mark.parametrize("size_bytes", [0, -1])
    def test_no_memory_has_that_size(self, device: Device, size_bytes: int) -> None:
        with pytest.raises(InvalidUse):
            device.reserve(size_bytes)
        with pytest.raises(InvalidUse):
            device.host_arena(size_bytes)

    def test_what_does_not_fit_leaves_nothing_and_says_the_numbers(self, world: World, device: Device) -> None:
        wanted_bytes = most_of_the_free(world)
        device.allocate(wanted_bytes)
        before_bytes, free_bytes = used_bytes(world), device.memory().free_bytes

        with pytest.raises(OutOfMemory) as refused:
            device.allocate(wanted_bytes)

        assert before_bytes == used_bytes(world)
        assert free_bytes == refused.value.free_bytes
        assert 0 <= refused.value.requested_bytes - wanted_bytes < device.granularity_bytes

    def test_capacity_is_shared_by_processes_and_freed_by_death(self, world: World, device: Device) -> None:
        other = world.start()
        wanted_bytes = most_of_the_free(world)
        other.device.allocate(wanted_bytes)
        region = device.reserve(wanted_bytes)
        with pytest.raises(OutOfMemory):
            device.back(region)

        other.kill()

        device.back(region)

    def test_memory_as_seen_from_inside_adds_up(self, device: Device) -> None:
        before = device.memory()
        device.allocate(64 * MiB)

        after = device.memory()

        assert before.capacity_bytes == after.capacity_bytes == after.used_bytes + after.free_bytes
        assert before.free_bytes - 64 * MiB == after.free_bytes

    def test_closing_gives_everything_back(self, world: World) -> None:
        before_bytes = used_bytes(world)
        device = world.start().device
        region = device.allocate(64 * MiB)
        arena = device.host_arena(2 * MiB)

        device.close()
        device.close()

        assert before_bytes == used_bytes(world)
        assert arena.is_closed
        for act in (device.memory, device.synchronize, lambda: device.back(region), lambda: device.reserve(1)):
            with pytest.raises(InvalidUse):
                act()


class CopyContract:
    def test_bytes_survive_the_way_there_and_back(self, device: Device) -> None:
        region, source, target = device.allocate(6 * MiB), device.host_arena(6 * MiB), device.host_arena(6 * MiB)
        for offset in (0, 3 * MiB - 100, 6 * MiB - len(PATTERN)):
            source.write(PATTERN, offset_bytes=offset)

        up, down = device.copy_to_device(region, source), device.copy_to_host(region, target)

        assert (6 * MiB, 6 * MiB) == (up.copied_bytes, down.copied_bytes)
        assert up.copy_s > 0
        for offset in (0, 3 * MiB - 100, 6 * MiB - len(PATTERN)):
            assert target.read(offset_bytes=offset, size_bytes=len(PATTERN)) == PATTERN
            assert device.read(region, offset_bytes=offset, size_bytes=len(PATTERN)) == PATTERN

    def test_offsets_and_sizes_move_that_part_only(self, device: Device) -> None:
        region, arena = device.allocate(4 * MiB), device.host_arena(4 * MiB)
        device.fill(region, 9)
        arena.write(PATTERN, offset_bytes=1000)

        result = device.copy_to_device(
            region, arena, region_offset_bytes=50_000, host_offset_bytes=1000, size_bytes=len(PATTERN)
        )

        assert len(PATTERN) == result.copied_bytes
        assert device.read(region, offset_bytes=50_000 - 1, size_bytes=len(PATTERN) + 2) == b"\x09" + PATTERN + b"\x09"

    def test_without_a_size_a_copy_ends_where_the_smaller_side_ends(self, device: Device) -> None:
        region, arena = device.allocate(4 * MiB), device.host_arena(3 * MiB)

        assert 3 * MiB == device.copy_to_device(region, arena).copied_bytes
        assert 1 * MiB == device.copy_to_device(region, arena, region_offset_bytes=3 * MiB).copied_bytes
        assert 2 * MiB == device.copy_to_host(region, arena, host_offset_bytes=1 * MiB).copied_bytes

    def test_a_copy_across_chunks_is_whole(self, world: World) -> None:
        device = world.start(settings=DeviceSettings(chunk_bytes=2 * MiB)).device
        region, arena = device.allocate(8 * MiB), device.host_arena(8 * MiB)
        arena.write(PATTERN, offset_bytes=2 * MiB - 64)

        device.copy_to_device(region, arena, region_offset_bytes=MiB, size_bytes=5 * MiB)

        assert device.read(region, offset_bytes=3 * MiB - 64, size_bytes=len(PATTERN)) == PATTERN

    @pytest.mark.parametrize(
        ("region_offset", "host_offset", "size"),
        [(0, 0, 5 * MiB), (-1, 0, 10), (0, -1, 10), (4 * MiB - 5, 0, 10), (0, 4 * MiB - 5, 10), (0, 0, -1)],
    )
    def test_a_copy_outside_is_refused(self, device: Device, region_offset: int, host_offset: int, size: int) -> None:
        region, arena = device.allocate(4 * MiB), device.host_arena(4 * MiB)

        for copy in (device.copy_to_device, device.copy_to_host):
            with pytest.raises(InvalidUse):
                copy(
                    region,
                    arena,
                    region_offset_bytes=region_offset,
                    host_offset_bytes=host_offset,
                    size_bytes=size,
                )

    def test_nothing_reaches_memory_that_is_not_there(self, device: Device) -> None:
        region, arena = device.reserve(4 * MiB), device.host_arena(4 * MiB)

        for act in (
            lambda: device.copy_to_device(region, arena),
            lambda: device.copy_to_host(region, arena),
            lambda: device.fill(region, 0),
            lambda: device.read(region, size_bytes=1),
            lambda: device.write(region, b"x"),
            lambda: device.export_fds(region),
        ):
            with pytest.raises(InvalidUse):
                act()

    def test_fill_sets_a_part_on_the_device(self, device: Device) -> None:
        region = device.allocate(4 * MiB)

        device.fill(region, 1)
        device.fill(region, 2, offset_bytes=100, size_bytes=50)

        assert device.read(region, offset_bytes=99, size_bytes=52) == b"\x01" + b"\x02" * 50 + b"\x01"
        assert device.read(region, offset_bytes=4 * MiB - 1, size_bytes=1) == b"\x01"

    def test_reads_and_writes_are_for_small_ranges(self, device: Device) -> None:
        region = device.allocate(4 * MiB)
        device.write(region, b"x" * 65536, offset_bytes=7)

        assert device.read(region, offset_bytes=7, size_bytes=65536) == b"x" * 65536
        with pytest.raises(InvalidUse):
            device.write(region, b"x" * 65537)
        with pytest.raises(InvalidUse):
            device.read(region, size_bytes=65537)
        with pytest.raises(InvalidUse):
            device.read(region, offset_bytes=4 * MiB - 1, size_bytes=2)

    def test_host_memory_is_written_read_filled_and_closed(self, device: Device) -> None:
        arena = device.host_arena(10_000)
        arena.fill(3)
        arena.write(b"hello", offset_bytes=9_995)

        assert arena.read(offset_bytes=9_994, size_bytes=6) == b"\x03hello"
        with pytest.raises(InvalidUse):
            arena.write(b"hello", offset_bytes=9_996)
        arena.close()
        arena.close()
        assert arena.is_closed
        with pytest.raises(InvalidUse):
            arena.read(size_bytes=1)
        with pytest.raises(InvalidUse):
            device.copy_to_device(device.allocate(2 * MiB), arena)

    def test_restore_backs_and_fills(self, world: World, device: Device) -> None:
        region, arena = device.reserve(130 * MiB), device.host_arena(130 * MiB)
        marks = (0, 64 * MiB - 10, 130 * MiB - len(PATTERN))
        for offset in marks:
            arena.write(PATTERN, offset_bytes=offset)

        result = device.restore(region, arena)

        assert 130 * MiB == result.restored_bytes
        assert 0 < result.back_s < result.restore_s
        for offset in marks:
            assert device.read(region, offset_bytes=offset, size_bytes=len(PATTERN)) == PATTERN

    def test_restore_of_less_than_the_region_backs_all_of_it(self, device: Device) -> None:
        region, arena = device.reserve(8 * MiB), device.host_arena(4 * MiB)
        arena.write(PATTERN, offset_bytes=MiB)

        result = device.restore(region, arena, host_offset_bytes=MiB, size_bytes=2 * MiB)

        assert 2 * MiB == result.restored_bytes
        assert device.read(region, size_bytes=len(PATTERN)) == PATTERN
        device.write(region, b"end", offset_bytes=8 * MiB - 3)

    def test_a_restore_that_does_not_fit_leaves_nothing(self, world: World, device: Device) -> None:
        wanted_bytes = most_of_the_free(world)
        device.allocate(wanted_bytes)
        region, arena = device.reserve(wanted_bytes), device.host_arena(4 * MiB)
        before_bytes = used_bytes(world)

        with pytest.raises(OutOfMemory):
            device.restore(region, arena)

        assert before_bytes == used_bytes(world)
        assert not device.is_backed(region)

    def test_restore_needs_an_unbacked_region_and_an_open_arena(self, device: Device) -> None:
        region, arena = device.reserve(4 * MiB), device.host_arena(4 * MiB)
        device.restore(region, arena)
        with pytest.raises(InvalidUse):
            device.restore(region, arena)
        device.unback(region)
        with pytest.raises(InvalidUse):
            device.restore(region, arena, size_bytes=5 * MiB)
        arena.close()
        with pytest.raises(InvalidUse):
            device.restore(region, arena)

        assert not device.is_backed(region)

    def test_two_processes_pin_the_same_file(self, world: World, process: ProcessUnderTest) -> None:
        other = world.start()
        file = world.shared_file(4 * MiB)
        mine, theirs = process.shared_arena(file, 4 * MiB), other.shared_arena(file, 4 * MiB)
        mine.write(PATTERN, offset_bytes=2 * MiB)

        region = other.device.reserve(4 * MiB)
        other.device.restore(region, theirs)

        assert other.device.read(region, offset_bytes=2 * MiB, size_bytes=len(PATTERN)) == PATTERN
        with pytest.raises(InvalidUse):
            process.shared_arena(file, 5 * MiB)

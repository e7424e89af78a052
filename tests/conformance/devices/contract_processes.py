"""The contract between processes: shared memory, and checkpoints of another process."""

import pytest

from devices.api import (
    Device,
    InvalidUse,
    MiB,
    NotFound,
    NotSupported,
    OutOfMemory,
)
from devices.checkpoint import CheckpointState
from tests.conformance.devices.contract_tools import PATTERN, close_exports, most_of_the_free, used_bytes
from tests.conformance.devices.world import ProcessUnderTest, World


class SharingContract:
    def test_two_processes_see_the_same_bytes_and_they_count_once(self, world: World, device: Device) -> None:
        other = world.start()
        region = device.allocate(130 * MiB)
        device.write(region, PATTERN, offset_bytes=100 * MiB)
        before_bytes = used_bytes(world)
        exported = device.export_fds(region)

        theirs = world.hand_over(exported, to=other)
        seen = other.device.import_fds(theirs)

        assert region.size_bytes == exported.size_bytes == seen.size_bytes
        assert other.device.read(seen, offset_bytes=100 * MiB, size_bytes=len(PATTERN)) == PATTERN
        assert before_bytes == used_bytes(world)
        close_exports((device, exported), (other.device, theirs))

    def test_an_import_is_read_only_unless_asked_otherwise(self, world: World, device: Device) -> None:
        other = world.start()
        region = device.allocate(4 * MiB)
        device.fill(region, 0)
        exported = device.export_fds(region)
        theirs = world.hand_over(exported, to=other)

        read_only = other.device.import_fds(theirs)
        with pytest.raises(InvalidUse):
            other.device.write(read_only, b"no")
        with pytest.raises(InvalidUse):
            other.device.fill(read_only, 1)
        with pytest.raises(InvalidUse):
            other.device.copy_to_device(read_only, other.device.host_arena(4 * MiB))
        writable = other.device.import_fds(theirs, is_writable=True)
        other.device.write(writable, b"yes")

        assert device.read(region, size_bytes=3) == b"yes"
        assert other.device.read(read_only, size_bytes=3) == b"yes"
        close_exports((device, exported), (other.device, theirs))

    def test_an_import_keeps_its_addresses_over_park_and_wake(self, world: World, device: Device) -> None:
        other = world.start()
        place = other.device.reserve(4 * MiB)
        for mark in (b"one", b"two"):
            region = device.allocate(4 * MiB)
            device.write(region, mark)
            exported = device.export_fds(region)
            theirs = world.hand_over(exported, to=other)

            assert place == other.device.import_fds(theirs, region=place)
            assert mark == other.device.read(place, size_bytes=3)
            other.device.unback(place)
            device.close_export(exported)
            other.device.close_export(theirs)
            device.free(region)

    def test_memory_is_free_only_when_nobody_can_reach_it(self, world: World) -> None:
        owner, reader = world.start(), world.start()
        before_bytes = used_bytes(world)
        region = owner.device.allocate(64 * MiB)
        owner.device.write(region, PATTERN)
        exported = owner.device.export_fds(region)
        theirs = world.hand_over(exported, to=reader)
        owner.device.close_export(exported)
        owner.device.free(region)
        assert before_bytes + 64 * MiB == used_bytes(world)  # a descriptor keeps it

        seen = reader.device.import_fds(theirs)
        reader.device.close_export(theirs)
        assert before_bytes + 64 * MiB == used_bytes(world)  # a mapping keeps it
        assert reader.device.read(seen, size_bytes=len(PATTERN)) == PATTERN

        reader.device.free(seen)
        assert before_bytes == used_bytes(world)

    def test_memory_outlives_its_killed_owner_while_it_is_mapped(self, world: World) -> None:
        reader = world.start()
        before_bytes = used_bytes(world)
        owner = world.start()
        region = owner.device.allocate(64 * MiB)
        owner.device.write(region, PATTERN)
        exported = owner.device.export_fds(region)
        theirs = world.hand_over(exported, to=reader)
        seen = reader.device.import_fds(theirs)
        reader.device.close_export(theirs)
        owner.device.close_export(exported)

        owner.kill()

        assert reader.device.read(seen, size_bytes=len(PATTERN)) == PATTERN
        assert before_bytes + 64 * MiB == used_bytes(world)
        reader.device.unback(seen)
        assert before_bytes == used_bytes(world)

    def test_an_import_that_does_not_match_is_refused(self, world: World, device: Device) -> None:
        other = world.start()
        exported = device.export_fds(device.allocate(4 * MiB))
        theirs = world.hand_over(exported, to=other)
        small, backed = other.device.reserve(2 * MiB), other.device.allocate(4 * MiB)

        with pytest.raises(InvalidUse):
            other.device.import_fds(theirs, region=small)
        with pytest.raises(InvalidUse):
            other.device.import_fds(theirs, region=backed)

        assert not other.device.is_backed(small)
        close_exports((device, exported), (other.device, theirs))

    def test_an_import_is_not_exported_again(self, world: World, device: Device) -> None:
        other = world.start()
        exported = device.export_fds(device.allocate(4 * MiB))
        theirs = world.hand_over(exported, to=other)
        seen = other.device.import_fds(theirs)

        with pytest.raises(NotSupported):
            other.device.export_fds(seen)

        close_exports((device, exported), (other.device, theirs))


class CheckpointContract:
    def test_a_checkpointed_process_leaves_the_gpu_and_returns_whole(
        self, world: World, process: ProcessUnderTest
    ) -> None:
        checkpoint = world.checkpoint()
        region = process.device.allocate(64 * MiB)
        process.device.write(region, PATTERN)
        resident_bytes = used_bytes(world)

        checkpoint.lock(process.pid, timeout_s=5)
        assert checkpoint.state(process.pid) is CheckpointState.LOCKED
        checkpoint.checkpoint(process.pid)
        assert checkpoint.state(process.pid) is CheckpointState.CHECKPOINTED
        assert used_bytes(world) <= resident_bytes - 64 * MiB
        checkpoint.restore(process.pid)
        checkpoint.unlock(process.pid)

        assert checkpoint.state(process.pid) is CheckpointState.RUNNING
        assert resident_bytes == used_bytes(world)
        assert process.device.read(region, size_bytes=len(PATTERN)) == PATTERN

    def test_steps_out_of_order_are_refused(self, world: World, process: ProcessUnderTest) -> None:
        checkpoint = world.checkpoint()

        for act in (checkpoint.checkpoint, checkpoint.restore, checkpoint.unlock):
            with pytest.raises(InvalidUse):
                act(process.pid)

    def test_a_process_without_a_gpu_is_not_found(self, world: World) -> None:
        checkpoint = world.checkpoint()

        with pytest.raises(NotFound):
            checkpoint.state(1)

    def test_a_return_that_does_not_fit_leaves_the_process_checkpointed(
        self, world: World, process: ProcessUnderTest
    ) -> None:
        checkpoint = world.checkpoint()
        wanted_bytes = most_of_the_free(world)
        process.device.allocate(wanted_bytes)
        checkpoint.lock(process.pid, timeout_s=5)
        checkpoint.checkpoint(process.pid)
        other = world.start()
        other.device.allocate(wanted_bytes)

        with pytest.raises(OutOfMemory):
            checkpoint.restore(process.pid)

        assert checkpoint.state(process.pid) is CheckpointState.CHECKPOINTED
        process.kill()

    def test_a_saved_process_leaves_its_memory_in_our_buffers_and_returns_whole(
        self, world: World, process: ProcessUnderTest
    ) -> None:
        agent, checkpoint = world.agent()
        regions = [process.device.allocate(size * MiB) for size in (4, 64, 2)]
        for number, region in enumerate(regions):
            process.device.write(region, PATTERN + bytes([number]), offset_bytes=MiB)
        resident_bytes = used_bytes(world)
        buffers = {agent.gpu_uuid: agent.host_arena(80 * MiB)}
        checkpoint.lock(process.pid, timeout_s=5)

        image = checkpoint.save(process.pid, buffers)

        assert checkpoint.state(process.pid) is CheckpointState.CHECKPOINTED
        assert dict(image.bytes_by_gpu) == {agent.gpu_uuid: 70 * MiB}
        assert used_bytes(world) <= resident_bytes - 70 * MiB
        assert buffers[agent.gpu_uuid].read(offset_bytes=5 * MiB, size_bytes=len(PATTERN)) == PATTERN
        with pytest.raises((InvalidUse, NotFound)):  # the driver has nothing to restore from
            checkpoint.restore(process.pid)
        checkpoint.load(process.pid, buffers)
        checkpoint.unlock(process.pid)
        assert resident_bytes == used_bytes(world)
        for number, region in enumerate(regions):
            expected = PATTERN + bytes([number])
            assert process.device.read(region, offset_bytes=MiB, size_bytes=len(expected)) == expected

    def test_what_is_in_the_buffers_is_what_comes_back(self, world: World, process: ProcessUnderTest) -> None:
        agent, checkpoint = world.agent()
        region = process.device.allocate(2 * MiB)
        process.device.write(region, b"ours")
        buffers = {agent.gpu_uuid: agent.host_arena(2 * MiB)}
        checkpoint.lock(process.pid, timeout_s=5)
        checkpoint.save(process.pid, buffers)

        buffers[agent.gpu_uuid].write(b"OURS")
        checkpoint.load(process.pid, buffers)
        checkpoint.unlock(process.pid)

        assert process.device.read(region, size_bytes=4) == b"OURS"

    def test_a_saved_process_that_does_not_fit_stays_away(self, world: World, process: ProcessUnderTest) -> None:
        agent, checkpoint = world.agent()
        wanted_bytes = most_of_the_free(world)
        region = process.device.allocate(wanted_bytes)
        buffers = {agent.gpu_uuid: agent.host_arena(region.size_bytes)}
        checkpoint.lock(process.pid, timeout_s=5)
        checkpoint.save(process.pid, buffers)
        other = world.start()
        other.device.allocate(wanted_bytes)

        with pytest.raises(OutOfMemory):
            checkpoint.load(process.pid, buffers)

        assert checkpoint.state(process.pid) is CheckpointState.CHECKPOINTED
        process.kill()

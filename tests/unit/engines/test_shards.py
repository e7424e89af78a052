"""An engine's memory over several GPUs: as much on each as on every other, and all of it or nothing."""

import pytest

from devices.api import GiB, MiB, OutOfMemory, Region
from devices.profiles import profile
from devices.virtual import VirtualDevice, VirtualGpu, VirtualHost
from engines.errors import DamagedError
from engines.gpu import OpenedGpu
from engines.simulated.memory import plan_memory
from engines.simulated.shards import ShardedMemory
from engines.training.progress import beginning
from engines.training.shards import ShardedTrainingMemory

GRANULE = 2 * MiB
PLAN = plan_memory(memory_bytes=4 * GiB, weights_bytes=GiB, context_bytes=500 * MiB, granularity_bytes=GRANULE)


def opened_gpus(count: int = 2) -> list[OpenedGpu]:
    host = VirtualHost([VirtualGpu(uuid=f"GPU-{index}", profile=profile("h100-80")) for index in range(count)])
    pid = host.start_process()
    devices = [VirtualDevice(host, f"GPU-{index}", pid=pid) for index in range(count)]
    return [
        OpenedGpu(
            device=device,
            is_software=False,
            context_bytes=host.processes[pid].contexts[f"GPU-{index}"],
            is_context_measured=True,
        )
        for index, device in enumerate(devices)
    ]


def free_bytes(gpus: list[OpenedGpu]) -> list[int]:
    return [gpu.device.memory().free_bytes for gpu in gpus]


def fill(gpu: OpenedGpu, *, leaving_bytes: int) -> Region:
    """Take all of the GPU but so much."""
    return gpu.device.allocate((gpu.device.memory().free_bytes - leaving_bytes) // GRANULE * GRANULE)


def taken(gpus: list[OpenedGpu], before: list[int]) -> list[int]:
    return [earlier - now for earlier, now in zip(before, free_bytes(gpus), strict=True)]


def test_weights_and_kv_memory_lie_on_every_gpu_and_go_from_every_gpu() -> None:
    gpus = opened_gpus()
    memory = ShardedMemory(gpus, plan=PLAN, label="m", generation=1)
    before = free_bytes(gpus)

    memory.weights.load()
    memory.weights.drop()
    restored = memory.weights.restore()
    memory.weights.verify()
    memory.grow_kv(4)

    each_bytes = GiB + 4 * PLAN.slab_bytes
    assert [each_bytes, each_bytes] == taken(gpus, before)
    assert 2 * GiB == restored.copied_bytes == memory.weights.size_bytes
    assert (4 * memory.slab_bytes, 4) == (memory.kv.size_bytes, memory.kv.backed_count)
    assert 2 * each_bytes == memory.drop_all()
    assert [0, 0] == taken(gpus, before)


def test_weights_that_do_not_fit_on_one_gpu_stay_on_none() -> None:
    gpus = opened_gpus()
    memory = ShardedMemory(gpus, plan=PLAN, label="m", generation=1)
    memory.weights.load()
    memory.weights.drop()
    fill(gpus[1], leaving_bytes=100 * MiB)
    before = free_bytes(gpus)

    with pytest.raises(OutOfMemory):
        memory.weights.restore()

    assert [0, 0] == taken(gpus, before)
    assert not memory.weights.is_resident
    assert before[1] == memory.free_bytes()


def test_kv_memory_grows_to_what_the_fuller_gpu_has_room_for() -> None:
    gpus = opened_gpus()
    memory = ShardedMemory(gpus, plan=PLAN, label="m", generation=1)
    fill(gpus[1], leaving_bytes=3 * PLAN.slab_bytes)

    with pytest.raises(OutOfMemory):
        memory.kv.grow(10)

    assert (3, 3 * memory.slab_bytes) == (memory.kv.backed_count, memory.kv.size_bytes)
    with pytest.raises(OutOfMemory):
        memory.grow_kv(10)
    assert 3 == memory.kv.backed_count


def test_a_workspace_that_one_gpu_has_no_room_for_is_taken_on_none() -> None:
    gpus = opened_gpus()
    memory = ShardedMemory(gpus, plan=PLAN, label="m", generation=1)
    fill(gpus[1], leaving_bytes=0)
    before = free_bytes(gpus)

    with pytest.raises(OutOfMemory):
        memory.workspace.take()

    assert [0, 0] == taken(gpus, before)


def test_damage_on_any_gpu_is_noticed() -> None:
    gpus = opened_gpus()
    memory = ShardedMemory(gpus, plan=PLAN, label="m", generation=1)
    memory.weights.load()
    second = memory._shards[1].weights
    gpus[1].device.write(second._region, bytes(8))

    with pytest.raises(DamagedError):
        memory.weights.verify()


def test_a_training_job_steps_swaps_and_goes_on_on_every_gpu() -> None:
    gpus = opened_gpus()
    before = free_bytes(gpus)
    job = ShardedTrainingMemory(gpus, label="job", size_bytes=64 * MiB)
    progress = beginning("job", seed=1)
    job.place(progress)
    progress = job.step(progress)

    saved = job.save()
    assert 128 * MiB == saved.copied_bytes == saved.freed_bytes == job.size_bytes
    assert [0, 0] == taken(gpus, before)
    job.restore()
    job.verify(progress)
    assert [64 * MiB, 64 * MiB] == taken(gpus, before)
    assert job.step(progress).step_count == 2


def test_a_training_job_that_does_not_fit_on_one_gpu_comes_back_on_none() -> None:
    gpus = opened_gpus()
    job = ShardedTrainingMemory(gpus, label="job", size_bytes=64 * MiB)
    progress = beginning("job", seed=1)
    job.place(progress)
    job.save()
    wall = fill(gpus[1], leaving_bytes=10 * MiB)
    before = free_bytes(gpus)

    with pytest.raises(OutOfMemory):
        job.restore()
    assert [0, 0] == taken(gpus, before)

    gpus[1].device.unback(wall)
    job.restore()
    job.verify(progress)


def test_a_training_job_notices_a_step_that_one_gpu_has_not_made() -> None:
    gpus = opened_gpus()
    job = ShardedTrainingMemory(gpus, label="job", size_bytes=64 * MiB)
    progress = beginning("job", seed=1)
    job.place(progress)
    job._shards[0].place(progress.next())

    with pytest.raises(DamagedError):
        job.step(progress)

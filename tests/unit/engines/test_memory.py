"""The engines' device memory over the virtual device: what is held when, and what is noticed."""

import itertools

import pytest

from devices.api import GiB, MiB, OutOfMemory
from devices.profiles import profile
from devices.virtual import VirtualDevice, VirtualGpu, VirtualHost
from engines.backing import OwnBacking
from engines.errors import DamagedError
from engines.gpu import OpenedGpu
from engines.probes import PROBE_BYTES, PROBES_MAX, probe_content, probe_offsets
from engines.simulated.memory import SLAB_BYTES_MAX, EngineMemory, KvSlabs, MemoryPlan, Weights, plan_memory
from engines.training.memory import TrainingMemory
from engines.training.progress import beginning

GRANULE = 2 * MiB


def opened_gpu(*, is_software: bool = False) -> OpenedGpu:
    host = VirtualHost([VirtualGpu(uuid="GPU-1", profile=profile("h100-80"))])
    device = VirtualDevice(host, "GPU-1", pid=host.start_process())
    context_bytes = host.processes[device.pid].contexts["GPU-1"]
    return OpenedGpu(device=device, is_software=is_software, context_bytes=context_bytes, is_context_measured=True)


def plan(memory_bytes: int = 4 * GiB, *, weights_bytes: int = GiB) -> MemoryPlan:
    return plan_memory(
        memory_bytes=memory_bytes, weights_bytes=weights_bytes, context_bytes=500 * MiB, granularity_bytes=GRANULE
    )


def free_bytes(gpu: OpenedGpu) -> int:
    return gpu.device.memory().free_bytes


# ---- the plan ----


@pytest.mark.parametrize("memory_bytes", [2 * GiB, 3 * GiB + 12345, 40 * GiB, 80 * GiB])
def test_a_plan_uses_the_budget_but_for_less_than_one_slab(memory_bytes: int) -> None:
    subject = plan(memory_bytes)
    whole_bytes = subject.fixed_bytes + subject.slab_count(memory_bytes) * subject.slab_bytes

    assert 0 <= memory_bytes - whole_bytes < subject.slab_bytes <= SLAB_BYTES_MAX


@pytest.mark.parametrize("memory_bytes", [GiB + 600 * MiB, 2 * GiB, 3 * GiB, 40 * GiB, 80 * GiB, 141 * GiB])
def test_a_broker_is_asked_for_few_slabs(memory_bytes: int) -> None:
    subject = plan_memory(
        memory_bytes=memory_bytes,
        weights_bytes=GiB,
        context_bytes=500 * MiB,
        granularity_bytes=GRANULE,
        is_brokered=True,
    )

    assert 1 <= subject.slab_count(memory_bytes) <= 64
    assert subject.slab_bytes % (64 * MiB if subject.slab_bytes >= 64 * MiB else GRANULE) == 0
    assert subject.slab_bytes >= 64 * MiB or subject.slab_count(memory_bytes) <= 16


def test_sizes_are_rounded_up_to_the_granularity() -> None:
    subject = plan(weights_bytes=GiB + 1)

    assert subject.weights_bytes == GiB + GRANULE
    assert subject.slab_bytes % GRANULE == 0


def test_a_budget_below_the_minimum_has_no_slab() -> None:
    subject = plan(GiB)

    assert subject.slab_count(GiB) == 0
    assert subject.slab_count(subject.minimum_bytes) == 1
    assert subject.slab_count(subject.minimum_bytes - 1) == 0


# ---- probes ----


@pytest.mark.parametrize("size_bytes", [PROBE_BYTES, 2 * PROBE_BYTES, GRANULE, 14 * GiB])
def test_probes_lie_at_both_ends_and_between_and_do_not_overlap(size_bytes: int) -> None:
    offsets = probe_offsets(size_bytes)

    assert (offsets[0], offsets[-1]) == (0, size_bytes - PROBE_BYTES)
    assert len(offsets) <= PROBES_MAX
    assert all(right - left >= PROBE_BYTES for left, right in itertools.pairwise(offsets))


def test_each_probe_is_its_own() -> None:
    contents = {
        probe_content(label, generation=generation, offset_bytes=offset)
        for label in ("a", "b")
        for generation in (1, 2)
        for offset in (0, 4096)
    }

    assert len(contents) == 8


# ---- weights ----


def weights_on(gpu: OpenedGpu) -> Weights:
    subject = Weights(gpu, label="m", size_bytes=64 * MiB, generation=1)
    subject.load()
    return subject


def test_weights_come_back_to_the_same_address_as_they_were() -> None:
    subject = weights_on(opened_gpu())
    address = subject.address
    for _ in range(3):
        assert subject.drop() == 64 * MiB
        assert not subject.is_resident
        subject.restore()
        subject.verify()
        assert subject.is_resident

    assert subject.address == address


def test_weights_that_have_not_changed_are_not_copied_on_the_way_out() -> None:
    gpu = opened_gpu()
    subject = weights_on(gpu)
    before_bytes = free_bytes(gpu)

    assert subject.seal() == 0
    assert subject.drop() == free_bytes(gpu) - before_bytes == 64 * MiB
    assert subject.drop() == 0


def test_updated_weights_are_copied_once_and_come_back_as_they_are_now() -> None:
    subject = weights_on(opened_gpu())
    first = subject.digest()
    subject.update()
    updated = subject.digest()

    assert (64 * MiB, 0) == (subject.seal(), subject.seal())
    subject.drop()
    subject.restore()
    subject.verify()
    assert first != updated == subject.digest()


def test_an_update_that_was_not_sealed_is_noticed_when_it_is_gone() -> None:
    subject = weights_on(opened_gpu())
    subject.update()
    subject.drop()
    subject.restore()

    with pytest.raises(DamagedError):
        subject.verify()


@pytest.mark.parametrize("probe", [0, 1, -1])
def test_a_changed_byte_in_the_weights_is_noticed(probe: int) -> None:
    gpu = opened_gpu()
    subject = weights_on(gpu)
    offset = probe_offsets(64 * MiB)[probe]
    gpu.device.write(subject._region, bytes(8), offset_bytes=offset + 77)

    with pytest.raises(DamagedError) as raised:
        subject.verify()
    assert raised.value.offsets_bytes == (offset,)


def test_on_a_software_gpu_that_moves_bytes_all_of_the_weights_are_checked() -> None:
    gpu = opened_gpu(is_software=True)
    subject = weights_on(gpu)
    assert subject.is_bulk_checked
    gpu.device.write(subject._region, bytes(8), offset_bytes=probe_offsets(64 * MiB)[3])

    with pytest.raises(DamagedError):
        subject.verify()


# ---- KV memory ----


def test_kv_slabs_grow_and_shrink_one_by_one() -> None:
    gpu = opened_gpu()
    before_bytes = free_bytes(gpu)
    subject = KvSlabs(OwnBacking(gpu.device), slab_bytes=64 * MiB)

    subject.grow(10)
    assert subject.size_bytes == before_bytes - free_bytes(gpu) == 640 * MiB
    assert subject.shrink(3) == 7 * 64 * MiB
    subject.grow(2)
    assert subject.backed_count == 3


def engine_memory(gpu: OpenedGpu) -> EngineMemory:
    layout = plan_memory(
        memory_bytes=4 * GiB, weights_bytes=GiB, context_bytes=gpu.context_bytes, granularity_bytes=GRANULE
    )
    return EngineMemory(gpu, plan=layout, label="m", generation=1)


def test_kv_memory_that_does_not_fit_is_rolled_back() -> None:
    gpu = opened_gpu()
    subject = engine_memory(gpu)
    subject.grow_kv(5)
    before_bytes = free_bytes(gpu)

    with pytest.raises(OutOfMemory):
        subject.grow_kv(100_000)
    assert free_bytes(gpu) == before_bytes
    assert subject.kv.backed_count == 5


def test_the_books_agree_with_the_device() -> None:
    gpu = opened_gpu()
    empty_bytes = free_bytes(gpu) + gpu.context_bytes
    subject = engine_memory(gpu)
    assert subject.held_bytes == gpu.context_bytes
    subject.weights.load()
    subject.grow_kv(20)
    subject.workspace.take()

    assert subject.held_bytes == empty_bytes - free_bytes(gpu)
    subject.drop_all()
    assert subject.held_bytes == gpu.context_bytes == empty_bytes - free_bytes(gpu)
    assert subject.drop_all() == 0


# ---- training ----


def test_a_training_job_goes_on_after_a_swap() -> None:
    gpu = opened_gpu()
    subject = TrainingMemory(gpu, label="job", size_bytes=64 * MiB)
    progress = beginning("job", seed=1)
    subject.place(progress)
    for _ in range(3):
        progress = subject.step(progress)
        saved = subject.save()
        assert saved.copied_bytes == saved.freed_bytes == 64 * MiB
        assert subject.save().freed_bytes == 0
        subject.restore()
        subject.verify(progress)

    assert subject.step(progress).step_count == 4


def test_a_training_job_notices_foreign_bytes_at_its_next_step() -> None:
    gpu = opened_gpu()
    subject = TrainingMemory(gpu, label="job", size_bytes=64 * MiB)
    progress = beginning("job", seed=1)
    subject.place(progress)
    gpu.device.write(subject._region, b"\xff" * 8, offset_bytes=100)

    with pytest.raises(DamagedError):
        subject.step(progress)


def test_a_training_job_notices_foreign_bytes_after_a_wake() -> None:
    gpu = opened_gpu()
    subject = TrainingMemory(gpu, label="job", size_bytes=64 * MiB)
    progress = beginning("job", seed=1)
    subject.place(progress)
    subject.save()
    subject.restore()
    gpu.device.write(subject._region, b"\xff" * 8, offset_bytes=64 * MiB - 8)

    with pytest.raises(DamagedError):
        subject.verify(progress)

"""GPUs that are cut into MIG instances, as NVML and CUDA show them."""

from pathlib import Path

import pytest

import softgpu
from softgpu.errors import HostError
from tests.unit.softgpu.machines import MakeMachine

pytestmark = pytest.mark.processes

MIB = 1 << 20
CUT = {0: ("1g.10gb", "2g.20gb")}
INSTANCES = """
nv.nvmlInit()
whole = nv.nvmlDeviceGetHandleByIndex(0)
parts = [nv.nvmlDeviceGetMigDeviceHandleByIndex(whole, i) for i in range(2)]
number = lambda told: getattr(told, 'value', told)  # pynvml gives some as ctypes
"""


def test_the_instances_of_a_gpu_are_found_and_count_as_no_gpus(machine: MakeMachine) -> None:
    one = machine(gpus=2, mig=CUT)

    told = one.run(
        INSTANCES
        + """
mode = nv.nvmlDeviceGetMigMode(whole)
try: nv.nvmlDeviceGetMigDeviceHandleByIndex(whole, 2)
except nv.NVMLError_NotFound: end = 'end'
say(nv.nvmlDeviceGetCount(), mode, number(nv.nvmlDeviceGetMaxMigDeviceCount(whole)), end,
    [nv.nvmlDeviceGetUUID(p) for p in parts], [nv.nvmlDeviceGetName(p) for p in parts],
    [number(nv.nvmlDeviceGetGpuInstanceId(p)) for p in parts],
    [nv.nvmlDeviceGetUUID(nv.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(p)) for p in parts],
    [number(nv.nvmlDeviceIsMigDeviceHandle(p)) for p in [whole, *parts]])"""
    )

    uuids = list(one.host.mig_uuids())
    assert all(uuid.startswith("MIG-") for uuid in uuids)
    assert [2, [1, 1], 7, "end", uuids] == told[:5]
    assert ["Softgpu Test 1GiB MIG 1g.10gb", "Softgpu Test 1GiB MIG 2g.20gb"] == told[5]
    assert [[1, 2], [one.host.uuids()[0]] * 2, [0, 1, 1]] == told[6:]


def test_each_instance_has_its_part_of_the_memory_and_the_gpu_shows_the_sum_of_what_is_used(
    machine: MakeMachine,
) -> None:
    one = machine(mig=CUT)

    told = one.run(
        INSTANCES
        + """
sizes = [nv.nvmlDeviceGetMemoryInfo(p).total // MiB for p in [whole, *parts]]
attributes = [nv.nvmlDeviceGetAttributes(p) for p in parts]
context(2); cu.cuMemAlloc(20 * MiB)
used = [nv.nvmlDeviceGetMemoryInfo(p).used // MiB for p in [whole, *parts]]
try: nv.nvmlDeviceGetTemperature(parts[0], 0)
except nv.NVMLError_NotSupported: heat = 'no'
say(sizes, [(a.gpuInstanceSliceCount, a.memorySizeMB) for a in attributes], used, heat,
    [[p.pid == os.getpid() for p in nv.nvmlDeviceGetComputeRunningProcesses(h)] for h in [whole, *parts]])"""
    )

    assert [[256, 32, 64], [[1, 32], [2, 64]], [20, 0, 20], "no", [[True], [], [True]]] == told


def test_what_is_beyond_an_instance_is_not_to_be_had_and_the_gpu_itself_takes_no_context(machine: MakeMachine) -> None:
    one = machine(mig=CUT)

    assert ["CUDA_ERROR_OUT_OF_MEMORY", "CUDA_SUCCESS"] == one.run(
        "context(1); say(error(cu.cuMemAlloc(40 * MiB)), error(cu.cuMemAlloc(30 * MiB)))"
    )
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE" == one.run("cu.cuInit(0); say(error(cu.cuDevicePrimaryCtxRetain(0)))")


def test_instances_are_lost_and_struck_with_their_gpu(machine: MakeMachine) -> None:
    one = machine(mig=CUT, context_bytes=2 * MIB)
    child = one.start("context(1); say('up'); wait(); say(error(cu.cuMemGetInfo()))")
    child.hear()

    one.host.strike(0, 95)
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" == child.ask()

    one.host.set_lost(0)
    assert "lost" == one.run(f"""
nv.nvmlInit()
try: nv.nvmlDeviceGetMemoryInfo(nv.nvmlDeviceGetHandleByUUID('{one.host.mig_uuids()[0]}'))
except nv.NVMLError_GpuIsLost: say('lost')""")


def test_limits_and_mig_exclude_each_other(machine: MakeMachine) -> None:
    one = machine(mig=CUT)

    assert "Not Supported" == one.run("""
try: set_limits('team', 0, MiB)
except nv.NVMLError as refused: say(str(refused))""")


@pytest.mark.parametrize("cut", [{0: ("4g.40gb", "4g.40gb")}, {1: ("1g.10gb",)}, {0: ("5g.50gb",)}])
def test_a_gpu_that_cannot_be_cut_so_is_refused(tmp_path: Path, cut: dict[int, tuple[str, ...]]) -> None:
    with pytest.raises(HostError):
        softgpu.Host(tmp_path / "host", gpus=1, mig=cut)

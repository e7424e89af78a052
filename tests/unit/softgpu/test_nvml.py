"""What pynvml reports, and the limits it sets."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.unit.softgpu.machines import MakeMachine

pytestmark = pytest.mark.processes

MiB = 1 << 20
HOLD = "context(); address = ok(cu.cuMemAlloc(int(os.environ['BYTES']))); say('up'); wait()"


def test_memory_is_what_cuda_processes_hold(machine: MakeMachine) -> None:
    one = machine(context_bytes=8 * MiB, reserved_bytes=4 * MiB)
    one.start(HOLD, BYTES=str(100 * MiB)).hear()

    second, first = one.run("""
second = nv.nvmlDeviceGetMemoryInfo(gpu(), version=nv.nvmlMemory_v2); first = nv.nvmlDeviceGetMemoryInfo(gpu())
mib = lambda *sizes: [size // MiB for size in sizes]
say(mib(second.total, second.reserved, second.used, second.free), mib(first.used, first.free))""")

    assert second == [256, 4, 108, 144]
    assert first == [112, 144]


def test_each_process_is_listed_with_its_bytes(machine: MakeMachine) -> None:
    one = machine(gpus=2, context_bytes=8 * MiB)
    children = [one.start(HOLD, BYTES=str(size * MiB)) for size in (100, 20)]
    for child in children:
        child.hear()

    listed = one.run("""
found = [nv.nvmlDeviceGetComputeRunningProcesses(gpu(index)) for index in (0, 1)]
say([sorted([process.pid, process.usedGpuMemory // MiB] for process in on_device) for on_device in found])""")

    assert listed == [sorted([[children[0].pid, 108], [children[1].pid, 28]]), []]


def test_a_dead_process_is_not_listed(machine: MakeMachine) -> None:
    one = machine()
    child = one.start(HOLD, BYTES=str(100 * MiB))
    child.hear()
    child.kill()

    assert one.run("say(len(nv.nvmlDeviceGetComputeRunningProcesses(gpu())))") == 0


def test_pids_are_those_of_the_asker(machine: MakeMachine) -> None:
    """As for containers: the process inside has one pid, the agent outside sees another."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    one = machine()
    program = "from words import *\ncontext(); address = ok(cu.cuMemAlloc(50 * MiB)); say(os.getpid()); wait()"
    inside = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program],
        env=one.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert inside.stdin is not None
    assert inside.stdout is not None
    with inside:
        own_pid = inside.stdout.readline()
        if not own_pid:
            pytest.skip("pid namespaces are not allowed here")
        listed = one.run("say([p.pid for p in nv.nvmlDeviceGetComputeRunningProcesses(gpu())])")
        inside.stdin.write("\n")

    assert len(listed) == 1
    assert listed[0] != int(own_pid)


def test_a_device_answers_the_usual_questions(machine: MakeMachine) -> None:
    one = machine(profile="h100-80", total_bytes=None, temperature_c=55, power_mw=300_000, utilization_gpu_percent=70)
    assert one.run("""
handle = gpu(); rates = nv.nvmlDeviceGetUtilizationRates(handle)
say(nv.nvmlDeviceGetName(handle), nv.nvmlDeviceGetTemperature(handle, 0), nv.nvmlDeviceGetPowerUsage(handle), rates.gpu,
    nv.nvmlDeviceGetMaxPcieLinkGeneration(handle), nv.nvmlDeviceGetCurrPcieLinkWidth(handle),
    nv.nvmlDeviceGetCudaComputeCapability(handle), nv.nvmlDeviceGetPciInfo(handle).busId,
    nv.nvmlSystemGetDriverVersion(), nv.nvmlSystemGetCudaDriverVersion())""") == [
        "NVIDIA H100 80GB HBM3",
        55,
        300_000,
        70,
        5,
        16,
        [9, 0],
        "00000000:10:00.0",
        "615.00.00-softgpu",
        13041,
    ]


ASK_HEALTH = """
say(nv.nvmlDeviceGetTemperature(gpu(), 0), nv.nvmlDeviceGetCurrentClocksEventReasons(gpu()),
    nv.nvmlDeviceGetTotalEccErrors(gpu(), nv.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nv.NVML_VOLATILE_ECC),
    nv.nvmlDeviceGetTotalEccErrors(gpu(), nv.NVML_MEMORY_ERROR_TYPE_CORRECTED, nv.NVML_VOLATILE_ECC))"""


def test_heat_and_memory_errors_are_told(machine: MakeMachine) -> None:
    one = machine(temperature_c=41)
    well = one.run(ASK_HEALTH)

    one.host.set_health(0, temperature_c=92, is_hot=True, ecc_error_count=3)

    assert [41, 0, 0, 0] == well
    assert [92, 0x60, 3, 0] == one.run(ASK_HEALTH)
    one.host.set_health(0, is_hot=False)
    assert [92, 0, 3, 0] == one.run(ASK_HEALTH)


def test_a_memory_error_that_strikes_is_counted(machine: MakeMachine) -> None:
    one = machine()

    one.host.strike(0, 95)
    one.host.send_xid(0, 31)

    assert 1 == one.run(ASK_HEALTH)[2]


def test_there_is_no_mig(machine: MakeMachine) -> None:
    assert (
        machine().run("""
try: nv.nvmlDeviceGetMigMode(gpu())
except nv.NVMLError_NotSupported as refused: say(str(refused))""")
        == "Not Supported"
    )


def test_an_xid_reaches_who_waits_for_it(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    child = one.start("""
events = nv.nvmlEventSetCreate() if not nv.nvmlInit() else None
nv.nvmlDeviceRegisterEvents(gpu(1), nv.nvmlEventTypeXidCriticalError, events); say('up')
event = nv.nvmlEventSetWait_v2(events, 10000); say(event.eventType, event.eventData)
try: nv.nvmlEventSetWait_v2(events, 20)
except nv.NVMLError_Timeout: say('timeout')""")
    child.hear()
    one.host.send_xid(0, 13)
    one.host.send_xid(1, 79)

    assert child.hear() == [8, 79]
    assert child.hear() == "timeout"


def test_a_lost_device_says_so_in_both_libraries(machine: MakeMachine) -> None:
    one = machine()
    child = one.start("""
context(); handle = gpu(); say('up'); wait()
try: nv.nvmlDeviceGetMemoryInfo(handle)
except nv.NVMLError_GpuIsLost: say('lost', error(cu.cuMemGetInfo()))
wait(); say(nv.nvmlDeviceGetMemoryInfo(handle).total // MiB, error(cu.cuMemGetInfo()))""")
    child.hear()

    one.host.set_lost(0)
    assert child.ask() == ["lost", "CUDA_ERROR_UNKNOWN"]
    one.host.set_lost(0, is_lost=False)
    assert child.ask() == [256, "CUDA_SUCCESS"]


ASK = "context()\nfor line in sys.stdin: say(error(cu.cuMemAlloc(int(line) * MiB)), *free_and_total())"


def test_a_group_s_hard_limit_is_its_ceiling_and_its_view_of_the_device(machine: MakeMachine) -> None:
    one = machine()
    one.run("set_limits('team-a', 64 * MiB, 100 * MiB)")
    inside, outside = one.start(ASK, group="team-a"), one.start(ASK)

    assert inside.ask(60) == ["CUDA_SUCCESS", 40, 100]
    assert inside.ask(60) == ["CUDA_ERROR_OUT_OF_MEMORY", 40, 100]
    assert outside.ask(60) == ["CUDA_SUCCESS", 136, 256]


def test_all_processes_of_a_group_share_its_limit_contexts_included(machine: MakeMachine) -> None:
    one = machine(context_bytes=10 * MiB)
    one.run("set_limits('team-a', 0, 100 * MiB)")
    first, second = one.start(ASK, group="team-a"), one.start(ASK, group="team-a")

    assert first.ask(50)[0] == "CUDA_SUCCESS"
    assert second.ask(50)[0] == "CUDA_ERROR_OUT_OF_MEMORY"
    assert second.ask(30)[0] == "CUDA_SUCCESS"
    assert one.run("say(limits('team-a'))") == [0, 100 * MiB, 100 * MiB]


def test_limits_change_while_the_group_runs(machine: MakeMachine) -> None:
    """Below its use a limit takes nothing away: it stops growth, which is how a borrower is frozen."""
    one = machine()
    child = one.start(ASK, group="team-a")
    assert child.ask(100)[0] == "CUDA_SUCCESS"

    one.run("set_limits('team-a', 0, 50 * MiB)")
    assert child.ask(2) == ["CUDA_ERROR_OUT_OF_MEMORY", 0, 50]
    one.run("set_limits('team-a', 0, 200 * MiB)")
    assert child.ask(50) == ["CUDA_SUCCESS", 50, 200]


def test_a_dead_member_frees_its_group_s_room(machine: MakeMachine) -> None:
    one = machine()
    one.run("set_limits('team-a', 0, 100 * MiB)")
    first, second = one.start(ASK, group="team-a"), one.start(ASK, group="team-a")
    assert first.ask(90)[0] == "CUDA_SUCCESS"
    assert second.ask(20)[0] == "CUDA_ERROR_OUT_OF_MEMORY"

    first.kill()

    assert second.ask(20)[0] == "CUDA_SUCCESS"


def test_limits_are_read_back_and_max_removes_them(machine: MakeMachine) -> None:
    one = machine()
    assert one.run("""
unset = limits('team-a'); set_limits('team-a', 10 * MiB, 20 * MiB); low = limits('team-a')
set_limits('team-a', 0, None); say(unset, low, limits('team-a'), nv.NVML_DEVICE_MEMORY_LIMIT_MAX)""") == [
        [0, 2**64 - 1, 0],
        [10 * MiB, 20 * MiB, 0],
        [0, 2**64 - 1, 0],
        2**64 - 1,
    ]
    assert one.host.status()["groups"] == []


def test_a_soft_limit_above_the_hard_one_is_refused(machine: MakeMachine) -> None:
    assert (
        machine().run("""
try: set_limits('team-a', 20 * MiB, 10 * MiB)
except nv.NVMLError_InvalidArgument: say('refused')""")
        == "refused"
    )


def test_a_missing_cgroup_is_not_found(machine: MakeMachine) -> None:
    assert (
        machine().run("""
try: limits('/sys/fs/cgroup/no-such-group')
except nv.NVMLError_NotFound: say('not found')""")
        == "not found"
    )


def test_a_real_cgroup_is_a_group(machine: MakeMachine) -> None:
    """Membership is read from /proc/self/cgroup: nothing is declared."""
    roots = [root for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified") if Path(root, "cgroup.procs").exists()]
    if not roots or os.geteuid() or not os.access(roots[0], os.W_OK):
        pytest.skip("no writable cgroup v2")
    group = Path(roots[0], f"softgpu-{uuid.uuid4().hex[:8]}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no writable cgroup v2: {error}")
    try:
        one = machine()
        one.run(f"set_limits('{group}', 0, 100 * MiB)")
        answers = one.run(f"""
open('{group}/cgroup.procs', 'w').write(str(os.getpid())); context()
say(free_and_total(), error(cu.cuMemAlloc(90 * MiB)), error(cu.cuMemAlloc(20 * MiB)), limits('{group}')[2] // MiB)""")
    finally:
        group.rmdir()

    assert answers == [[100, 100], "CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY", 90]

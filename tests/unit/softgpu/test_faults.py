"""Provoked trouble: slow and hanging calls, wrong bytes, answers that lie, errors that strike contexts."""

import time

import pytest

import softgpu
from tests.unit.softgpu.machines import MakeMachine, quickest

pytestmark = pytest.mark.processes

MiB = 1 << 20
ASK = "context(); say('up')\nfor line in sys.stdin: answer = cu.cuMemAlloc(int(line) * MiB); say(error(answer))"


def test_a_slow_call_is_late_and_its_neighbours_are_not(machine: MakeMachine) -> None:
    one = machine()

    def measure() -> list[float]:
        one.host.set_fault("cuMemCreate", kind="delay", delay_s=0.3)
        return list(one.run(DELAYED))

    slow_s, next_s, other_s = quickest(measure, (0.6, 0.2, 0.2))

    assert 0.3 <= slow_s < 0.6
    assert max(next_s, other_s) < 0.2


DELAYED = """
context()
def timed(call):
    start = time.perf_counter(); call(); return time.perf_counter() - start
other = timed(lambda: cu.cuMemAlloc(2 * MiB))
say(timed(lambda: create(2 * MiB)), timed(lambda: create(2 * MiB)), other)
"""


def test_a_call_hangs_until_the_faults_are_cleared(machine: MakeMachine) -> None:
    one = machine()
    child = one.start(ASK)
    child.hear()
    one.host.set_fault("cuMemAlloc", kind="hang")
    child.tell(2)
    time.sleep(1.0)
    assert one.used_bytes() == 0
    assert one.run("context(); say(error(cu.cuMemAlloc(2 * MiB)))") == "CUDA_SUCCESS"  # one call hangs, not all

    one.host.clear_faults()

    assert child.hear() == "CUDA_SUCCESS"


def test_a_hanging_call_keeps_its_process_from_being_locked(machine: MakeMachine) -> None:
    one = machine()
    child = one.start(ASK)
    child.hear()
    one.host.set_fault("cuMemAlloc", kind="hang")
    child.tell(2)

    assert (
        one.run(f"""
context(); arguments = cu.CUcheckpointLockArgs(); arguments.timeoutMs = 100
while (answer := error(cu.cuCheckpointProcessLock({child.pid}, arguments))) != "CUDA_ERROR_NOT_READY":
    if answer == "CUDA_SUCCESS": ok(cu.cuCheckpointProcessUnlock({child.pid}, None))  # It has not begun the call yet.
    time.sleep(0.05)
say(answer)""")
        == "CUDA_ERROR_NOT_READY"
    )


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyHtoD", "cuMemcpyDtoH"])
def test_a_copy_can_arrive_with_one_bit_flipped(machine: MakeMachine, call: str) -> None:
    one = machine()
    one.host.set_fault(call, kind="corrupt")
    way = "HtoD" if "HtoD" in call else "DtoH"
    stream = ", stream" if "Async" in call else ""
    flipped = one.run(f"""
context(); device = ok(cu.cuMemAlloc(2 * MiB)); size = MiB; host = int(ok(cu.cuMemHostAlloc(size, 0)))
stream = ok(cu.cuStreamCreate(1)); ctypes.memset(host, 7, size)
first, second = (device, host) if '{way}' == 'HtoD' else (host, device)
if '{way}' == 'DtoH': ok(cu.cuMemcpyHtoD(device, host, size))
ok(cu.{call}(first, second, size{stream})); ok(cu.cuStreamSynchronize(stream))
got = peek(device, size) if '{way}' == 'HtoD' else ctypes.string_at(host, size)
say([byte for byte in got if byte != 7])""")

    assert flipped == [6]


def test_a_limit_can_be_ignored_and_be_read_as_none(machine: MakeMachine) -> None:
    one = machine()
    one.host.set_fault("nvmlDeviceSetMemoryLimits_v1", kind="lie")
    assert one.run("set_limits('a', 1 * MiB, 2 * MiB); say(limits('a'))") == [0, softgpu.NO_LIMIT, 0]

    one.host.set_fault("nvmlDeviceGetMemoryLimits_v1", kind="lie")
    assert one.run("set_limits('a', 1 * MiB, 2 * MiB); say(limits('a'), limits('a'))") == [
        [0, softgpu.NO_LIMIT, 0],
        [1 * MiB, 2 * MiB, 0],
    ]


def test_memory_can_be_stale_halved_or_empty(machine: MakeMachine) -> None:
    one = machine()
    one.host.set_fault("nvmlDeviceGetMemoryInfo", kind="stale")
    one.start("context(); a = ok(cu.cuMemAlloc(100 * MiB)); say('up'); wait()").hear()
    used = "info = nv.nvmlDeviceGetMemoryInfo(gpu()); say(info.used // MiB, info.total // MiB)"

    assert one.run(used) == [0, 256]
    assert one.run(used) == [100, 256]
    one.host.set_fault("nvmlDeviceGetMemoryInfo", kind="lie")
    assert one.run(used) == [50, 256]
    one.host.set_fault("nvmlDeviceGetMemoryInfo", kind="empty")
    assert one.run(used) == [0, 0]


def test_processes_can_be_missing_or_without_bytes(machine: MakeMachine) -> None:
    one = machine()
    child = one.start("context(); a = ok(cu.cuMemAlloc(100 * MiB)); say('up'); wait()")
    child.hear()
    listed = "say([[p.pid, p.usedGpuMemory] for p in nv.nvmlDeviceGetComputeRunningProcesses(gpu())])"

    one.host.set_fault("nvmlDeviceGetComputeRunningProcesses", kind="empty")
    assert one.run(listed) == []
    one.host.set_fault("nvmlDeviceGetComputeRunningProcesses", kind="unknown")
    assert one.run(listed) == [[child.pid, None]]
    assert one.run(listed) == [[child.pid, 100 * MiB]]


def test_an_error_strikes_the_contexts_of_one_process(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    victim, neighbour = one.start(ASK), one.start(ASK)
    assert ["up", "up"] == [victim.hear(), neighbour.hear()]
    assert [victim.ask(2), neighbour.ask(2)] == ["CUDA_SUCCESS"] * 2

    one.host.strike(0, 31, pid=victim.pid)

    assert [victim.ask(2), victim.ask(2)] == ["CUDA_ERROR_ILLEGAL_ADDRESS"] * 2
    assert neighbour.ask(2) == "CUDA_SUCCESS"


@pytest.mark.parametrize(("xid", "pid_named", "mps"), [(95, False, False), (13, True, True)])
def test_some_errors_strike_everybody_on_the_gpu(machine: MakeMachine, xid: int, pid_named: bool, mps: bool) -> None:
    """An uncontained memory error; and under MPS, where clients share one fate, any fatal one."""
    one = machine(gpus=2, mps=mps)
    first, second = one.start(ASK), one.start(ASK)
    assert ["up", "up"] == [first.hear(), second.hear()]
    elsewhere = one.start(ASK.replace("context()", "context(1)"))
    elsewhere.hear()
    assert [first.ask(2), second.ask(2), elsewhere.ask(2)] == ["CUDA_SUCCESS"] * 3

    one.host.strike(0, xid, pid=first.pid if pid_named else None)

    assert (
        first.ask(2) == second.ask(2) == ("CUDA_ERROR_ECC_UNCORRECTABLE" if xid == 95 else "CUDA_ERROR_LAUNCH_FAILED")
    )
    assert elsewhere.ask(2) == "CUDA_SUCCESS"
    first.kill()
    second.kill()
    assert one.run("context(); say(error(cu.cuMemAlloc(250 * MiB)))") == "CUDA_SUCCESS"


def test_a_failed_checkpoint_ends_the_process_s_calls(machine: MakeMachine) -> None:
    one = machine()
    child = one.start(ASK)
    child.hear()
    assert child.ask(2) == "CUDA_SUCCESS"

    one.host.fail_checkpoint(child.pid)

    assert child.ask(2) == "CUDA_ERROR_UNKNOWN"
    assert one.run(f"""
context()
say(ok(cu.cuCheckpointProcessGetState({child.pid})).name, error(cu.cuCheckpointProcessLock({child.pid}, None)))
""") == ["CU_PROCESS_STATE_FAILED", "CUDA_ERROR_ILLEGAL_STATE"]
    child.kill()
    assert one.used_bytes() == 0

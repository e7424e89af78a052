"""Checkpoints of another process: the protocol's states, what moves, what is refused, and who may die when."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

import softgpu
from tests.unit.softgpu.machines import Child, Machine, MakeMachine

pytestmark = pytest.mark.processes

MiB = 1 << 20

# Answers one line with one: what it has at its address, and where.
TARGET = """
context(); size = int(os.environ.get('BYTES', 64 * MiB)); address = ok(cu.cuMemAlloc(size))
poke(address, b'weights!', size - 8); poke(address, b'first'); say(int(address))
for line in sys.stdin: say(int(address), peek(address, 8, size - 8).decode(), peek(address, 5).decode())
"""

# Runs the calls that it is told, by name, and answers with the result's name.
DRIVER = """
ok(cu.cuInit(0))
def lock(pid, timeout_ms=5000):
    arguments = cu.CUcheckpointLockArgs(); arguments.timeoutMs = int(timeout_ms)
    return cu.cuCheckpointProcessLock(pid, arguments)
def state(pid):
    answer = cu.cuCheckpointProcessGetState(pid)
    return answer if answer[0] else (answer[1],)
def remap(pid, *uuids):
    arguments = cu.CUcheckpointRestoreArgs(); pairs = []
    for old, new in zip(uuids[::2], uuids[1::2]):
        pair = cu.CUcheckpointGpuPair(); pair.oldUuid, pair.newUuid = uuid_of(old), uuid_of(new); pairs.append(pair)
    arguments.gpuPairs = pairs; arguments.gpuPairsCount = len(pairs)
    return cu.cuCheckpointProcessRestore(pid, arguments)
def uuid_of(text):
    value = cu.CUuuid(); ctypes.memmove(value.getPtr(), bytes.fromhex(text.split('-', 1)[1].replace('-', '')), 16)
    return value
calls = {
    'lock': lock, 'state': state, 'remap': remap,
    'unlock': lambda pid: cu.cuCheckpointProcessUnlock(pid, None),
    'checkpoint': lambda pid: cu.cuCheckpointProcessCheckpoint(pid, None),
    'restore': lambda pid: cu.cuCheckpointProcessRestore(pid, None),
}
say('up')
for line in sys.stdin:
    name, pid, *rest = line.split()
    say(error(calls[name](int(pid), *rest)))
"""

DONE = "CUDA_SUCCESS"


def driver(one: Machine) -> Child:
    child = one.start(DRIVER)
    assert child.hear() == "up"
    return child


def target(one: Machine, size: int = 64 * MiB) -> tuple[Child, int]:
    child = one.start(TARGET, BYTES=str(size))
    return child, child.hear()


def steps(acting: Child, pid: int, *names: str) -> list[str]:
    return [acting.ask(f"{name} {pid}") for name in names]


def state(acting: Child, pid: int) -> str:
    return str(acting.ask(f"state {pid}")).removeprefix("CU_PROCESS_STATE_").lower()


def away(one: Machine, pid: int, index: int = 0) -> int:
    return next(
        entry["away_bytes"] for entry in one.host.status()["devices"][index]["processes"] if entry["pid"] == pid
    )


def test_a_process_leaves_the_gpu_and_returns_whole(machine: MakeMachine) -> None:
    one = machine(context_bytes=8 * MiB)
    child, address = target(one)
    acting = driver(one)
    states = [state(acting, child.pid)]

    for name in ("lock", "checkpoint", "restore", "unlock"):
        assert acting.ask(f"{name} {child.pid}") == DONE
        states.append(state(acting, child.pid))
        if name == "checkpoint":
            assert one.used_bytes() == 0
            assert away(one, child.pid) == 72 * MiB

    assert states == ["running", "locked", "checkpointed", "locked", "running"]
    assert one.used_bytes() == 72 * MiB
    assert child.ask() == [address, "weights!", "first"]


def test_steps_out_of_order_are_refused(machine: MakeMachine) -> None:
    one = machine()
    child, _ = target(one)
    acting = driver(one)

    assert steps(acting, child.pid, "checkpoint", "restore", "unlock") == ["CUDA_ERROR_ILLEGAL_STATE"] * 3
    assert steps(acting, child.pid, "lock", "lock", "restore") == [DONE, *["CUDA_ERROR_ILLEGAL_STATE"] * 2]
    assert steps(acting, child.pid, "checkpoint", "unlock", "checkpoint", "lock") == [
        DONE,
        *["CUDA_ERROR_ILLEGAL_STATE"] * 3,
    ]


def test_pids_that_use_no_cuda_are_told_apart(machine: MakeMachine) -> None:
    one = machine()
    acting = driver(one)

    assert acting.ask("state 1") == "CUDA_ERROR_NOT_INITIALIZED"
    assert acting.ask("state 999999999") == "CUDA_ERROR_INVALID_VALUE"
    assert acting.ask("state -1") == "CUDA_ERROR_INVALID_VALUE"


def test_calls_of_a_locked_process_wait_and_go_on(machine: MakeMachine) -> None:
    one = machine()
    child, _ = target(one)
    acting = driver(one)
    assert steps(acting, child.pid, "lock", "checkpoint") == [DONE] * 2
    child.tell()
    assert child.process.stdout is not None
    assert select.select([child.process.stdout], [], [], 0.3)[0] == []

    assert steps(acting, child.pid, "restore", "unlock") == [DONE] * 2

    assert child.hear()[1:] == ["weights!", "first"]


def test_a_lock_waits_for_queued_work_and_gives_up_in_time(machine: MakeMachine) -> None:
    one = machine(h2d_bytes_per_s=16 * MiB)
    child = one.start("""
context(); device = ok(cu.cuMemAlloc(64 * MiB)); host = int(ok(cu.cuMemHostAlloc(64 * MiB, 0)))
stream = ok(cu.cuStreamCreate(1)); say('up'); wait()
ok(cu.cuMemcpyHtoDAsync(device, host, 64 * MiB, stream)); say('go')
wait(); say('still', free_and_total()[0]); wait()""")
    child.hear()
    acting = driver(one)
    child.ask()

    started_s = time.monotonic()
    assert acting.ask(f"lock {child.pid} 50") == "CUDA_ERROR_NOT_READY"
    assert time.monotonic() - started_s < 3, "the copy takes four"
    assert state(acting, child.pid) == "running"
    assert child.ask() == ["still", 192]
    assert acting.ask(f"lock {child.pid} 60000") == DONE


def test_a_return_that_does_not_fit_can_be_tried_again(machine: MakeMachine) -> None:
    one = machine()
    child, _ = target(one, 200 * MiB)
    acting = driver(one)
    assert steps(acting, child.pid, "lock", "checkpoint") == [DONE] * 2
    other, _ = target(one, 100 * MiB)

    assert acting.ask(f"restore {child.pid}") == "CUDA_ERROR_OUT_OF_MEMORY"
    assert state(acting, child.pid) == "checkpointed"
    assert one.used_bytes() == 100 * MiB

    other.kill()
    assert steps(acting, child.pid, "restore", "unlock") == [DONE] * 2
    assert child.ask()[1] == "weights!"


def test_a_group_s_limit_holds_for_the_return_too(machine: MakeMachine) -> None:
    one = machine()
    one.run("set_limits('team-a', 0, 200 * MiB)")
    child = one.start(TARGET, BYTES=str(150 * MiB), group="team-a")
    child.hear()
    acting = driver(one)
    assert steps(acting, child.pid, "lock", "checkpoint") == [DONE] * 2
    assert one.run("say(limits('team-a')[2])") == 0
    other = one.start(TARGET, BYTES=str(100 * MiB), group="team-a")
    other.hear()

    assert acting.ask(f"restore {child.pid}") == "CUDA_ERROR_OUT_OF_MEMORY"


def test_a_process_can_return_to_another_gpu(machine: MakeMachine) -> None:
    one = machine(gpus=2, context_bytes=8 * MiB)
    child, address = target(one)
    acting = driver(one)
    first, second = one.host.uuids()
    assert steps(acting, child.pid, "lock", "checkpoint") == [DONE] * 2

    assert acting.ask(f"remap {child.pid} {second} {first}") == "CUDA_ERROR_INVALID_VALUE"  # first is not named
    assert acting.ask(f"remap {child.pid} {first} {second}") == DONE
    assert acting.ask(f"unlock {child.pid}") == DONE

    assert [one.used_bytes(0), one.used_bytes(1)] == [0, 72 * MiB]
    assert child.ask() == [address, "weights!", "first"]
    child.kill()
    assert [one.used_bytes(0), one.used_bytes(1)] == [0, 0]


def test_after_a_move_new_memory_comes_from_the_new_gpu(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    child = one.start(
        "context(); first = ok(cu.cuMemAlloc(2 * MiB)); say('up'); wait(); ok(cu.cuMemAlloc(30 * MiB))\n"
        "say(free_and_total()[0]); wait()"
    )
    child.hear()
    acting = driver(one)
    first, second = one.host.uuids()
    assert steps(acting, child.pid, "lock", "checkpoint") == [DONE] * 2
    assert acting.ask(f"remap {child.pid} {first} {second} {second} {first}") == DONE
    assert acting.ask(f"unlock {child.pid}") == DONE

    assert child.ask() == 224
    assert [one.used_bytes(0), one.used_bytes(1)] == [0, 32 * MiB]


def test_shared_memory_is_not_supported(machine: MakeMachine) -> None:
    one = machine()
    child = one.start("""
context(); handle = ok(create(4 * MiB)); descriptor = ok(cu.cuMemExportToShareableHandle(handle, FD, 0)); say('up')
wait(); os.close(descriptor); say('closed'); wait()""")
    child.hear()
    acting = driver(one)

    assert steps(acting, child.pid, "lock", "checkpoint", "unlock") == [DONE, "CUDA_ERROR_NOT_SUPPORTED", DONE]
    assert child.ask() == "closed"
    assert steps(acting, child.pid, "lock", "checkpoint") == [DONE] * 2


def test_a_process_killed_while_it_is_away_leaves_nothing(machine: MakeMachine) -> None:
    one = machine(context_bytes=8 * MiB)
    child, _ = target(one)
    acting = driver(one)
    assert steps(acting, child.pid, "lock", "checkpoint") == [DONE] * 2

    child.kill()

    assert acting.ask(f"restore {child.pid}") == "CUDA_ERROR_INVALID_VALUE"
    assert one.used_bytes() == 0
    assert one.chunk_files() == []


def until_begun(looking: Child, pid: int) -> None:
    """A checkpoint or a restore of that process is on its way."""
    ends_at_s = time.monotonic() + 60
    while state(looking, pid) not in ("checkpointing", "restoring"):
        assert time.monotonic() < ends_at_s


@pytest.mark.parametrize("step", ["checkpoint", "restore"])
def test_when_the_driving_process_dies_in_a_step_another_takes_it_up(machine: MakeMachine, step: str) -> None:
    one = machine(costs={step: softgpu.CallCost(call_ns=10_000_000_000)}, context_bytes=8 * MiB)
    child, _ = target(one)
    acting = driver(one)
    for name in ("lock",) if step == "checkpoint" else ("lock", "checkpoint"):
        assert acting.ask(f"{name} {child.pid}") == DONE
    acting.tell(f"{step} {child.pid}")
    second = driver(one)
    until_begun(second, child.pid)
    assert second.ask(f"{step} {child.pid}") == "CUDA_ERROR_ILLEGAL_STATE"  # somebody is at it
    acting.kill()

    assert state(second, child.pid) == ("locked" if step == "checkpoint" else "checkpointed")
    assert one.used_bytes() == (72 * MiB if step == "checkpoint" else 0)


def test_a_process_given_up_within_a_step_stays_given_up(machine: MakeMachine) -> None:
    one = machine(costs={"checkpoint": softgpu.CallCost(call_ns=3_000_000_000)})
    child, _ = target(one)
    acting, looking = driver(one), driver(one)
    acting.ask(f"lock {child.pid}")
    acting.tell(f"checkpoint {child.pid}")
    until_begun(looking, child.pid)

    one.host.fail_checkpoint(child.pid)

    assert acting.hear() == "CUDA_ERROR_ILLEGAL_STATE"
    assert state(acting, child.pid) == "failed"
    assert one.used_bytes() == 64 * MiB


def test_when_the_locking_process_dies_the_target_goes_on_by_itself(machine: MakeMachine) -> None:
    one = machine(h2d_bytes_per_s=32 * MiB)
    child = one.start("""
context(); device = ok(cu.cuMemAlloc(64 * MiB)); host = int(ok(cu.cuMemHostAlloc(64 * MiB, 0)))
stream = ok(cu.cuStreamCreate(1)); ok(cu.cuMemcpyHtoDAsync(device, host, 64 * MiB, stream)); say('up')
wait(); say(free_and_total()[0]); wait()""")
    child.hear()
    acting = driver(one)
    acting.tell(f"lock {child.pid} 60000")
    time.sleep(0.2)
    child.tell()
    acting.kill()  # and nobody else looks at the host, who would tidy up

    assert child.process.stdout is not None
    assert select.select([child.process.stdout], [], [], 30)[0], "it waits for a dead process"
    assert child.hear() == 192


def test_a_stopped_driving_process_holds_up_only_its_target(machine: MakeMachine) -> None:
    one = machine(costs={"checkpoint": softgpu.CallCost(call_ns=300_000_000)})
    child, _ = target(one)
    acting = driver(one)
    acting.ask(f"lock {child.pid}")
    acting.tell(f"checkpoint {child.pid}")
    time.sleep(0.1)
    acting.process.send_signal(signal.SIGSTOP)

    assert one.run("context(); say(error(cu.cuMemAlloc(100 * MiB)))") == DONE

    acting.process.send_signal(signal.SIGCONT)
    assert acting.hear() == DONE


def test_a_target_in_another_pid_namespace_is_known_by_its_pid_here(machine: MakeMachine) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    one = machine()
    program = "from words import *\ncontext(); a = ok(cu.cuMemAlloc(8 * MiB)); poke(a, b'in'); say(os.getpid())\n"
    program += "wait(); say(peek(a, 2).decode())"
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
        if not inside.stdout.readline():
            pytest.skip("pid namespaces are not allowed here")
        pid = one.host.status()["devices"][0]["processes"][0]["pid"]
        assert pid > 10
        acting = driver(one)
        assert steps(acting, pid, "lock", "checkpoint", "restore", "unlock") == [DONE] * 4
        thread = one.run(f"say(ok(cu.cuCheckpointProcessGetRestoreThreadId({pid})))")
        inside.stdin.write("\n")
        inside.stdin.flush()
        assert inside.stdout.readline() == '"in"\n'

    assert thread == pid


def test_a_process_can_lock_and_checkpoint_itself(machine: MakeMachine) -> None:
    assert (
        machine().run("""
context(); address = ok(cu.cuMemAlloc(8 * MiB)); poke(address, b'mine'); pid = os.getpid()
ok(cu.cuCheckpointProcessLock(pid, None)); ok(cu.cuCheckpointProcessCheckpoint(pid, None))
ok(cu.cuCheckpointProcessRestore(pid, None)); ok(cu.cuCheckpointProcessUnlock(pid, None))
say(peek(address, 4).decode())""")
        == "mine"
    )


# ---- custom storage ----

STORAGE = """
context()
class Info(ctypes.Structure):
    _fields_ = [('handle', ctypes.c_void_p), ('blocks', ctypes.POINTER(ctypes.c_uint64)), ('count', ctypes.c_uint)]
def custom(call, arguments, pid):
    slot = ctypes.c_void_p(); arguments.customStorageInfo_out = ctypes.addressof(slot)
    answer = call(pid, arguments)
    return (error(answer), ctypes.cast(slot, ctypes.POINTER(Info)).contents if answer[0] == 0 else None)
def save(pid): return custom(cu.cuCheckpointProcessCheckpoint, cu.CUcheckpointCheckpointArgs(), pid)
def load(pid): return custom(cu.cuCheckpointProcessRestore, cu.CUcheckpointRestoreArgs(), pid)
def complete(info): return error(cu.cuCheckpointOperationComplete(cu.CUcheckpointOperationHandle(info.handle)))
def state(pid): return ok(cu.cuCheckpointProcessGetState(pid)).name.removeprefix('CU_PROCESS_STATE_').lower()
pid = int(os.environ['TARGET']); ok(cu.cuCheckpointProcessLock(pid, None))
"""


def test_custom_storage_carries_the_memory_out_and_back(machine: MakeMachine) -> None:
    one = machine(context_bytes=8 * MiB)
    child, address = target(one)
    acting = one.start(
        STORAGE
        + """
result, info = save(pid); address, size, stream = info.blocks[0], info.blocks[1], info.blocks[2]
say(result, state(pid), info.count, size); image = ctypes.create_string_buffer(size)
ok(cu.cuMemcpyDtoHAsync(image, address, size, stream)); say(complete(info), state(pid)); wait()
say(error(cu.cuCheckpointProcessRestore(pid, None)))
result, info = load(pid); say(result, state(pid), info.blocks[1] == size)
ok(cu.cuMemcpyHtoDAsync(info.blocks[0], image, size, info.blocks[2])); say(complete(info), state(pid))
say(error(cu.cuCheckpointProcessUnlock(pid, None))); wait()""",
        TARGET=str(child.pid),
    )

    assert acting.hear() == [DONE, "checkpointing", 1, 64 * MiB]
    assert acting.hear() == [DONE, "checkpointed"]
    assert one.used_bytes() == 8 * MiB  # the driving process's context
    assert acting.ask() == "CUDA_ERROR_INVALID_VALUE"  # its content is not with the driver
    assert acting.hear() == [DONE, "restoring", True]
    assert acting.hear() == [DONE, "locked"]
    assert acting.hear() == DONE
    assert child.ask() == [address, "weights!", "first"]
    assert one.used_bytes() == 80 * MiB


def test_a_forgotten_copy_to_custom_storage_shows(machine: MakeMachine) -> None:
    one = machine()
    child, _ = target(one)
    acting = one.start(
        STORAGE
        + """
result, info = save(pid); complete(info); result, info = load(pid); complete(info)
ok(cu.cuCheckpointProcessUnlock(pid, None)); say('done'); wait()""",
        TARGET=str(child.pid),
    )
    acting.hear()

    with pytest.raises(AssertionError):
        child.ask()  # not even text any more


def test_custom_storage_needs_the_caller_s_contexts_and_another_process(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    child = one.start("context(1); address = ok(cu.cuMemAlloc(2 * MiB)); say('up'); wait()")
    child.hear()
    assert one.start(STORAGE + "say(save(pid)[0], state(pid))", TARGET=str(child.pid)).hear() == [
        "CUDA_ERROR_INVALID_CONTEXT",
        "locked",
    ]
    assert (
        one.run(
            """
os.environ['TARGET'] = str(os.getpid())"""
            + STORAGE
            + "say(save(pid)[0])"
        )
        == "CUDA_ERROR_NOT_SUPPORTED"
    )


@pytest.mark.parametrize("step", ["save", "load"])
def test_custom_storage_survives_its_caller(machine: MakeMachine, step: str) -> None:
    """Killed before it completes: back to the state before, and the next one does the whole step."""
    one = machine()
    child, _ = target(one)
    first = "result, info = save(pid)" + ("; complete(info); result, info = load(pid)" if step == "load" else "")
    acting = one.start(STORAGE + first + "; say(result, state(pid)); wait()", TARGET=str(child.pid))
    assert acting.hear() == [DONE, "checkpointing" if step == "save" else "restoring"]
    acting.kill()

    second = driver(one)
    assert state(second, child.pid) == ("locked" if step == "save" else "checkpointed")
    assert one.used_bytes() == (64 * MiB if step == "save" else 0)
    if step == "save":
        assert second.ask(f"unlock {child.pid}") == DONE
        assert child.ask()[1] == "weights!"


def test_a_target_killed_in_custom_storage_is_told_at_completion(machine: MakeMachine) -> None:
    one = machine()
    child, _ = target(one)
    acting = one.start(
        STORAGE + "result, info = save(pid); say(result); wait(); say(complete(info)); wait()", TARGET=str(child.pid)
    )
    assert acting.hear() == DONE
    child.kill()
    assert one.used_bytes() == 64 * MiB  # still mapped by the one who copies

    assert acting.ask() == "CUDA_ERROR_ILLEGAL_STATE"
    assert one.used_bytes() == 0
    assert one.chunk_files() == []


def test_cuda_core_s_own_checkpoints_run_on_it(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    child, address = target(one)
    first, second = (uuid.removeprefix("GPU-") for uuid in one.host.uuids())

    states = one.run(f"""
from cuda.core import checkpoint
process = checkpoint.Process({child.pid}); states = [process.state]
process.lock(timeout_ms=5000); process.checkpoint(); states.append(process.state)
process.restore(gpu_mapping={{'{first}': '{second}', '{second}': '{first}'}}); states.append(process.state)
process.unlock(); say([str(state) for state in [*states, process.state]], process.restore_thread_id == {child.pid})""")

    assert states == [["running", "checkpointed", "locked", "running"], True]
    assert child.ask() == [address, "weights!", "first"]
    assert one.used_bytes(1) == 64 * MiB

"""cuIpc: memory and events of one process in another; who may open, and what happens when the owner dies first."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.unit.softgpu.machines import Child, Machine, MakeMachine

pytestmark = pytest.mark.processes

MiB = 1 << 20

OWNER = """
context(); address = ok(cu.cuMemAlloc(4 * MiB)); poke(address, b'hello ipc')
stream = ok(cu.cuStreamCreate(1)); event = ok(cu.cuEventCreate(6))
text = lambda handle: ctypes.string_at(handle.getPtr(), 64).hex()
say(text(ok(cu.cuIpcGetMemHandle(address))), text(ok(cu.cuIpcGetEventHandle(event))))
"""
OTHER = """
context()
def memory(text, flags=1):
    handle = cu.CUipcMemHandle(); ctypes.memmove(handle.getPtr(), bytes.fromhex(text), 64)
    return cu.cuIpcOpenMemHandle(handle, flags)
def event(text):
    handle = cu.CUipcEventHandle(); ctypes.memmove(handle.getPtr(), bytes.fromhex(text), 64)
    return cu.cuIpcOpenEventHandle(handle)
"""


def owner(one: Machine, rest: str = "wait()") -> tuple[Child, str, str]:
    child = one.start(OWNER + rest)
    memory, event = child.hear()
    return child, memory, event


def test_an_open_handle_is_counted(machine: MakeMachine) -> None:
    one = machine()
    child, memory, _ = owner(one)

    assert one.run(f"""{OTHER}
first, second = ok(memory('{memory}')), ok(memory('{memory}')); ok(cu.cuIpcCloseMemHandle(first))
text = peek(second, 9).decode(); ok(cu.cuIpcCloseMemHandle(second))
say(int(first) == int(second), text, error(cu.cuIpcCloseMemHandle(second)), error(memory('{memory}', 0)))""") == [
        True,
        "hello ipc",
        "CUDA_ERROR_INVALID_VALUE",
        "CUDA_ERROR_INVALID_VALUE",
    ]
    assert child.process.poll() is None


def test_threads_that_open_a_handle_at_once_get_one_address(machine: MakeMachine) -> None:
    one = machine()
    child, memory, _ = owner(one)

    assert (
        one.run(f"""{OTHER}
import threading
sys.setswitchinterval(1e-6)
def open_it():
    context(); barrier.wait(); opened.append(int(ok(memory('{memory}'))))
apart = 0
for _ in range(300):
    barrier = threading.Barrier(4); opened = []
    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    apart += len(opened) != 4 or len(set(opened)) > 1
    for address in opened: ok(cu.cuIpcCloseMemHandle(address))
say(apart)""")
        == 0
    )
    assert child.process.poll() is None


def test_opened_memory_outlives_its_owner_and_is_charged_to_nobody_then(machine: MakeMachine) -> None:
    one = machine()
    child, memory, _ = owner(one)
    user = one.start(
        f"{OTHER}address = ok(memory('{memory}')); say('open'); wait(); say(peek(address, 9).decode())\n"
        "wait(); ok(cu.cuIpcCloseMemHandle(address)); say('closed'); wait()"
    )
    user.hear()
    child.kill()

    assert user.ask() == "hello ipc"
    assert one.used_bytes() == 4 * MiB
    assert one.host.status()["devices"][0]["processes"] == []
    assert user.ask() == "closed"
    assert one.used_bytes() == 0
    assert one.run(f"{OTHER}say(error(memory('{memory}')))") == "CUDA_ERROR_INVALID_VALUE"


def test_an_event_passes_in_another_process(machine: MakeMachine) -> None:
    one = machine(h2d_bytes_per_s=8 * MiB)
    child, _, event = owner(
        one,
        """
host = int(ok(cu.cuMemHostAlloc(4 * MiB, 0))); big = ok(cu.cuMemAlloc(32 * MiB)); wait()
source = int(ok(cu.cuMemHostAlloc(32 * MiB, 0)))
ok(cu.cuMemcpyHtoDAsync(big, source, 32 * MiB, stream)); ok(cu.cuEventRecord(event, stream))
say('recorded'); wait()""",
    )
    user = one.start(f"""{OTHER}
event = ok(event('{event}')); say(error(cu.cuEventQuery(event))); wait(); start = time.perf_counter()
pending = error(cu.cuEventQuery(event)); stream = ok(cu.cuStreamCreate(1)); ok(cu.cuStreamWaitEvent(stream, event, 0))
ok(cu.cuStreamSynchronize(stream)); say(pending, time.perf_counter() - start, error(cu.cuEventQuery(event))); wait()""")
    assert user.hear() == "CUDA_SUCCESS"  # never recorded: passed
    assert child.ask() == "recorded"

    pending, waited_s, after = user.ask()

    assert (pending, after) == ("CUDA_ERROR_NOT_READY", "CUDA_SUCCESS")
    assert 0.2 < waited_s < 30


def test_who_waits_for_a_dead_process_s_event_goes_on(machine: MakeMachine) -> None:
    one = machine(h2d_bytes_per_s=MiB)
    child, _, event = owner(
        one,
        """
source = int(ok(cu.cuMemHostAlloc(4 * MiB, 0))); ok(cu.cuMemcpyHtoDAsync(address, source, 4 * MiB, stream))
ok(cu.cuEventRecord(event, stream)); say('recorded'); wait()""",
    )
    assert child.hear() == "recorded"
    user = one.start(
        f"{OTHER}event = ok(event('{event}')); say('open')\nok(cu.cuEventSynchronize(event)); say('on'); wait()"
    )
    user.hear()

    child.kill()

    assert user.hear() == "on"


def test_an_event_must_be_made_for_it_and_live(machine: MakeMachine) -> None:
    one = machine()
    child, _, event = owner(one)
    assert one.run("""
context(); plain = ok(cu.cuEventCreate(2)); say(error(cu.cuIpcGetEventHandle(plain)), error(cu.cuEventCreate(4)))
""") == ["CUDA_ERROR_INVALID_HANDLE", "CUDA_ERROR_INVALID_VALUE"]
    child.kill()
    assert one.run(f"{OTHER}say(error(event('{event}')))") == "CUDA_ERROR_INVALID_VALUE"


def test_many_events_come_and_go(machine: MakeMachine) -> None:
    """More than the host's table holds, one after the other; and no more at once than it holds."""
    assert machine().run("""
context()
for _ in range(300): ok(cu.cuEventDestroy(ok(cu.cuEventCreate(6))))
answers = [cu.cuEventCreate(6) for _ in range(129)]; say([error(answer) for answer in answers[-2:]])""") == [
        "CUDA_SUCCESS",
        "CUDA_ERROR_OUT_OF_MEMORY",
    ]


def test_another_ipc_namespace_may_not_open(machine: MakeMachine) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    one = machine()
    _, memory, event = owner(one)
    finished = subprocess.run(
        [
            "unshare",
            "--ipc",
            sys.executable,
            "-c",
            f"from words import *\n{OTHER}say(error(memory('{memory}')), error(event('{event}')))",
        ],
        env=one.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if "unshare" in finished.stderr:
        pytest.skip("IPC namespaces are not allowed here")

    assert finished.stdout.strip() == '["CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_INVALID_VALUE"]'

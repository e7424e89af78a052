"""Memory that several processes share: capacity, lifetime, who is charged."""

import array
import os
import socket
from pathlib import Path

import pytest

from tests.unit.softgpu.machines import Child, Machine, MakeMachine

pytestmark = pytest.mark.processes

MiB = 1 << 20

HOLD = "context(); address = ok(cu.cuMemAlloc(int(os.environ['BYTES']))); say('up'); wait()"


def test_capacity_is_one_for_all_processes(machine: MakeMachine) -> None:
    one = machine()
    owner = one.start(HOLD, BYTES=str(200 * MiB))
    owner.hear()

    assert one.run("context(); say(error(cu.cuMemAlloc(100 * MiB)), free_and_total()[0])") == [
        "CUDA_ERROR_OUT_OF_MEMORY",
        56,
    ]


def test_a_killed_process_leaves_nothing(machine: MakeMachine) -> None:
    one = machine(context_bytes=8 * MiB)
    owner = one.start(HOLD, BYTES=str(100 * MiB))
    owner.hear()
    assert one.used_bytes() == 108 * MiB

    owner.kill()

    assert one.run("context(); say(error(cu.cuMemAlloc(240 * MiB)))") == "CUDA_SUCCESS"
    assert one.used_bytes() == 0
    assert one.chunk_files() == []


EXPORT = """
context()
handle = ok(create(64 * MiB)); address = map_memory(handle, 64 * MiB)
poke(address, b'weights!', 3 * MiB)
descriptor = ok(cu.cuMemExportToShareableHandle(handle, FD, 0))
socket.send_fds(connect(), [b'x'], [descriptor]); os.close(descriptor)
say('exported'); wait()
say(peek(address, 8, 3 * MiB).decode()); wait()
"""

IMPORT = """
context()
_, descriptors, _, _ = socket.recv_fds(connect(), 1, 1)
handle = ok(cu.cuMemImportFromShareableHandle(descriptors[0], FD)); os.close(descriptors[0])
address = map_memory(handle, 64 * MiB); ok(cu.cuMemRelease(handle))
say(peek(address, 8, 3 * MiB).decode()); poke(address, b'changed!', 3 * MiB); say('written'); wait()
say(peek(address, 8, 3 * MiB).decode()); wait()
ok(cu.cuMemUnmap(address, 64 * MiB)); ok(cu.cuMemAddressFree(address, 64 * MiB)); say('unmapped'); wait()
"""


def export_and_import(one: Machine) -> tuple[Child, Child]:
    left, right = socket.socketpair()
    with left, right:
        owner = one.start(EXPORT, descriptors=(left.fileno(),), TEST_SOCKET=str(left.fileno()))
        user = one.start(IMPORT, descriptors=(right.fileno(),), TEST_SOCKET=str(right.fileno()))
    assert owner.hear() == "exported"
    assert user.hear() == "weights!"
    assert user.hear() == "written"
    return owner, user


def test_two_processes_map_the_same_bytes_and_pay_once(machine: MakeMachine) -> None:
    one = machine()
    owner, _user = export_and_import(one)

    assert owner.ask() == "changed!"
    assert one.used_bytes() == 64 * MiB


def test_memory_outlives_its_creator_exactly_while_it_is_mapped(machine: MakeMachine) -> None:
    one = machine()
    owner, user = export_and_import(one)

    owner.kill()
    assert one.used_bytes() == 64 * MiB
    assert user.ask() == "changed!"

    assert user.ask() == "unmapped"
    assert one.used_bytes() == 0


def test_shared_memory_is_charged_to_its_creator(machine: MakeMachine) -> None:
    one = machine()
    owner, _user = export_and_import(one)

    processes = one.host.status()["devices"][0]["processes"]

    assert [(process["pid"], process["used_bytes"]) for process in processes] == [(owner.pid, 64 * MiB)]


def test_a_descriptor_in_a_socket_keeps_memory_alive(machine: MakeMachine) -> None:
    one = machine()
    left, right = socket.socketpair()
    with left, right:
        program = """
context(); handle = ok(create(32 * MiB)); descriptor = ok(cu.cuMemExportToShareableHandle(handle, FD, 0))
socket.send_fds(connect(), [b'x'], [descriptor]); os._exit(0)"""
        owner = one.start(program, descriptors=(left.fileno(),), TEST_SOCKET=str(left.fileno()))
        owner.process.wait(timeout=20)
        left.close()
        assert one.used_bytes() == 32 * MiB

        _, descriptors, _, _ = socket.recv_fds(right, 1, 1)
        assert one.used_bytes() == 32 * MiB
        os.close(descriptors[0])

    assert one.used_bytes() == 0


def test_a_foreign_descriptor_is_no_memory(machine: MakeMachine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))

    assert (
        machine().run(f"""
context(); descriptor = os.open({str(path)!r}, os.O_RDWR)
say(error(cu.cuMemImportFromShareableHandle(descriptor, FD)))""")
        == "CUDA_ERROR_INVALID_VALUE"
    )


def test_an_ipc_handle_opens_another_process_s_allocation(machine: MakeMachine) -> None:
    one = machine()
    owner = one.start("""
context(); address = ok(cu.cuMemAlloc(4 * MiB)); poke(address, b'hello ipc')
say(ctypes.string_at(ok(cu.cuIpcGetMemHandle(address)).getPtr(), 64).hex()); wait()""")
    token = owner.hear()

    assert (
        one.run(f"""
context(); handle = cu.CUipcMemHandle(); ctypes.memmove(handle.getPtr(), bytes.fromhex('{token}'), 64)
address = ok(cu.cuIpcOpenMemHandle(handle, 1)); text = peek(address, 9).decode()
ok(cu.cuIpcCloseMemHandle(address)); say(text)""")
        == "hello ipc"
    )


def test_a_forked_child_is_uninitialised_and_holds_no_memory(machine: MakeMachine) -> None:
    one = machine()
    program = """
context(); address = ok(cu.cuMemAlloc(64 * MiB)); pid = os.fork()
if pid == 0:
    say(error(cu.cuMemGetInfo())); wait(); os._exit(0)
ok(cu.cuMemFree(address)); wait(); os.waitpid(pid, 0)"""
    parent = one.start(program)

    assert parent.hear() == "CUDA_ERROR_NOT_INITIALIZED"
    assert one.used_bytes() == 0
    parent.tell("\n")


def test_a_process_killed_inside_the_lock_stops_nobody(machine: MakeMachine) -> None:
    """The robust mutex: the worst place to die is between two writes to the tables."""
    one = machine(context_bytes=4 * MiB)
    churn = """
context()
while True:
    handles = [answer[1] for answer in (create(2 * MiB) for _ in range(8)) if answer[0] == 0]
    for handle in handles: ok(cu.cuMemRelease(handle))
"""
    for delay_ms in array.array("i", [1, 3, 7, 12, 19]):
        victims = [one.start(f"say('up')\n{churn}") for _ in range(2)]
        for victim in victims:
            victim.hear()
        one.run(f"time.sleep(0.2 + {delay_ms} / 1000)")
        for victim in victims:
            victim.kill()

    assert one.run("context(); say(error(cu.cuMemAlloc(250 * MiB)))") == "CUDA_SUCCESS"
    assert one.used_bytes() == 0
    assert one.chunk_files() == []

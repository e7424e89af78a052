"""Children that die with their parent, gates, and identities that a reused pid does not fool."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from kit.process import CANNOT_RUN_CODE, Child, ProcessIdentity, free_port, identity_of, is_alive, spawn

pytestmark = [pytest.mark.anyio, pytest.mark.processes]
ENVIRONMENT = {"PATH": os.environ["PATH"]}
ROOT = Path(__file__).resolve().parents[3]


def start(tmp_path: Path, script: str, *, is_gated: bool = False) -> Child:
    return spawn(["sh", "-c", script], environment=ENVIRONMENT, log_path=tmp_path / "log", is_gated=is_gated)


def text_of(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text()


async def until(condition: Callable[[], bool]) -> None:
    """For what no event tells: the end of a process that is not our child, the output of one that is."""
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.01)


def python(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True)


async def log_holds(tmp_path: Path, text: str) -> None:
    await until(lambda: text in text_of(tmp_path))


async def test_a_child_gets_exactly_its_environment_and_writes_to_its_log(tmp_path: Path) -> None:
    child = spawn(["env"], environment=ENVIRONMENT | {"A": "1"}, log_path=tmp_path / "log")

    assert await child.exited() == 0

    lines = {line for line in text_of(tmp_path).splitlines() if not line.startswith(("LC_CTYPE=", "PWD=", "_="))}
    assert {"A=1", f"PATH={ENVIRONMENT['PATH']}"} == lines


async def test_a_program_that_cannot_be_run_says_so_in_its_log(tmp_path: Path) -> None:
    child = spawn(["no-such-program"], environment=ENVIRONMENT, log_path=tmp_path / "log")

    assert await child.exited() == CANNOT_RUN_CODE
    assert text_of(tmp_path) == "cannot run no-such-program: No such file or directory\n"


async def test_nothing_runs_before_the_gate_opens(tmp_path: Path) -> None:
    child = start(tmp_path, "echo ran", is_gated=True)

    with anyio.move_on_after(0.2):
        await child.exited()
    was_gated = child.is_gated
    assert text_of(tmp_path) == ""
    child.open_gate()
    child.open_gate()

    assert await child.exited() == 0
    assert (was_gated, child.is_gated) == (True, False)
    assert text_of(tmp_path) == "ran\n"


async def test_a_gated_child_stops_at_sigterm(tmp_path: Path) -> None:
    child = start(tmp_path, "echo ran", is_gated=True)

    assert await child.stop(grace_s=5) == -signal.SIGTERM
    assert text_of(tmp_path) == ""
    child.open_gate()


async def test_one_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = start(tmp_path, "trap '' TERM; echo up; while :; do sleep 1; done")
    await log_holds(tmp_path, "up")

    assert await child.stop(grace_s=0.05) == -signal.SIGKILL


async def test_the_rest_of_a_group_ends_with_its_leader(tmp_path: Path) -> None:
    child = start(tmp_path, "sleep 1000 & echo $!; exit 3")

    assert await child.exited() == 3

    await gone(int(text_of(tmp_path)))


async def test_several_tasks_may_wait_for_one_child(tmp_path: Path) -> None:
    child = start(tmp_path, "exit 4", is_gated=True)
    codes: list[int] = []

    async def wait() -> None:
        codes.append(await child.exited())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        child.open_gate()

    assert [4, 4] == codes
    assert child.exit_code == 4


async def test_an_identity_is_not_fooled_by_a_stranger_with_the_same_pid(tmp_path: Path) -> None:
    child = start(tmp_path, "sleep 1000")

    assert identity_of(child.pid) == child.identity
    assert is_alive(child.identity)
    assert not is_alive(ProcessIdentity(pid=child.pid, started_ticks=child.identity.started_ticks - 1))
    await child.stop(grace_s=5)
    assert not is_alive(child.identity)
    assert identity_of(child.pid) is None


async def test_a_program_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """Also one at its gate, and one that ignores every signal that can be ignored."""
    parent_script = f"""
import pathlib, sys, time
from kit.process import spawn
log = pathlib.Path({str(tmp_path / "log")!r})
script = "trap '' TERM HUP INT; echo up $$; while :; do sleep 1; done"
children = [spawn(["sh", "-c", script], environment={ENVIRONMENT!r}, log_path=log, is_gated=gated) for gated in (0, 1)]
print(*[child.pid for child in children], flush=True)
time.sleep(1000)
"""
    parent = python(parent_script)
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    await log_holds(tmp_path, "up")

    parent.kill()

    for pid in pids:
        await gone(pid)
    parent.wait()
    parent.stdout.close()


async def gone(pid: int) -> None:
    await until(lambda: not ((identity := identity_of(pid)) and is_alive(identity)))


def test_spawning_from_another_thread_is_refused(tmp_path: Path) -> None:
    """It would kill the child when that thread ends."""
    refused: list[RuntimeError] = []

    def other() -> None:
        try:
            start(tmp_path, "true")
        except RuntimeError as error:
            refused.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()

    assert "main thread" in str(refused[0])


def test_a_free_port_can_be_listened_on_and_is_none_of_those_taken() -> None:
    port = free_port()
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()

        class All:
            """Everything below 40,000 is taken, so that the range that is tried first gives nothing."""

            def __contains__(self, port: object) -> bool:
                return isinstance(port, int) and port < 40_000

        assert free_port(taken={port}) != port
        assert free_port(taken=All()) >= 40_000

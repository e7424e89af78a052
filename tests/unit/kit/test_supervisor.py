"""The development supervisor: order, readiness, restarts, and nothing left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from kit.process import free_port, identity_of, is_alive
from kit.supervisor import (
    Backoff,
    EventKind,
    Interrupted,
    NotReady,
    ProcessEvent,
    ProcessSpec,
    ReadyCheck,
    holds,
    log_tail,
    supervise,
)

pytestmark = [pytest.mark.anyio, pytest.mark.processes]
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {"PATH": os.environ["PATH"]}
FOREVER = "trap 'echo stopped; exit 0' TERM; echo up; while :; do sleep 0.02; done"
QUICK = Backoff(first_s=0.01, longest_s=0.05)


class Story:
    """What happened, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self.events: list[ProcessEvent] = []
        self._news = anyio.Event()

    def __call__(self, event: ProcessEvent) -> None:
        self.events.append(event)
        self._news.set()
        self._news = anyio.Event()

    def lines(self) -> list[str]:
        return [f"{event.name} {event.kind}" for event in self.events]

    async def until(self, happened: Callable[[ProcessEvent], bool]) -> ProcessEvent:
        with anyio.fail_after(60):
            while True:
                for event in self.events:
                    if happened(event):
                        return event
                await self._news.wait()


def spec(tmp_path: Path, name: str, script: str = FOREVER, **more: object) -> ProcessSpec:
    given: dict[str, object] = {
        "name": name, "arguments": ("sh", "-c", script), "environment": ENVIRONMENT,
        "log_path": tmp_path / f"{name}.log",
    }  # fmt: skip
    return ProcessSpec(**(given | more))  # type: ignore[arg-type]


def python(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True)


def up(tmp_path: Path, name: str) -> ReadyCheck:
    """Ready when its log says so."""
    return lambda: "up" in (tmp_path / f"{name}.log").read_text()


async def test_each_starts_when_the_one_before_is_ready_and_all_stop_in_reverse_order(tmp_path: Path) -> None:
    story = Story()
    stopped = tmp_path / "stopped"
    script = f"trap 'echo $0 >> {stopped}; exit 0' TERM; echo up; while :; do sleep 0.02; done"
    specs = [
        spec(
            tmp_path, name, arguments=("sh", "-c", script, name), depends_on_ready=up(tmp_path, name), stop_order=order
        )
        for name, order in (("bus", 1), ("placement", 0), ("gateway", 0))
    ]

    async with supervise(specs, on_event=story) as supervisor:
        pid = supervisor.pid("bus")

    assert pid is not None
    assert supervisor.pid("bus") is None
    assert [
        "bus started", "bus ready", "placement started", "placement ready", "gateway started", "gateway ready",
    ] == story.lines()  # fmt: skip
    assert ["gateway", "placement", "bus"] == stopped.read_text().split()


async def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    story = Story()
    async with supervise(
        [spec(tmp_path, "a", depends_on_ready=up(tmp_path, "a"))], on_event=story, backoff=QUICK
    ) as all_:
        first = all_.pid("a")
        assert first is not None
        os.kill(first, signal.SIGKILL)

        again = await story.until(lambda event: event.kind is EventKind.RESTARTED)

        assert again.pid == all_.pid("a") != first
        await story.until(lambda event: event.kind is EventKind.READY and event.pid == again.pid)
    died = next(event for event in story.events if event.kind is EventKind.DIED)
    assert (died.pid, died.exit_code, died.next_start_s) == (first, -signal.SIGKILL, 0.01)


async def test_one_that_is_not_to_be_restarted_is_given_up(tmp_path: Path) -> None:
    story = Story()
    async with supervise([spec(tmp_path, "once", "exit 3", restart=False)], on_event=story):
        await story.until(lambda event: event.kind is EventKind.GAVE_UP)

    assert ["once started", "once ready", "once died", "once gave up"] == story.lines()
    assert [3, 3] == [event.exit_code for event in story.events[2:]]


async def test_a_crash_loop_slows_down(tmp_path: Path) -> None:
    story = Story()
    async with supervise([spec(tmp_path, "a", "exit 1")], on_event=story, backoff=QUICK):
        await story.until(lambda event: event.next_start_s == QUICK.longest_s)

    delays = [event.next_start_s for event in story.events if event.kind is EventKind.DIED]
    assert [0.01, 0.02, 0.04, 0.05] == delays[:4]


def test_the_back_off_doubles_up_to_its_longest() -> None:
    backoff = Backoff()

    assert [0.1, 0.2, 0.4] == [backoff.delay_s(short_life_count=count) for count in (1, 2, 3)]
    assert backoff.delay_s(short_life_count=7) == 5.0
    assert backoff.delay_s(short_life_count=10_000) == 5.0


async def test_one_that_ends_before_it_is_ready_is_told_with_its_code_and_the_end_of_its_log(tmp_path: Path) -> None:
    story = Story()
    broken = spec(tmp_path, "broken", "seq 100; echo no such file; exit 7", depends_on_ready=lambda: False)

    with pytest.raises(NotReady) as caught:
        async with supervise([spec(tmp_path, "bus"), broken], on_event=story):
            pytest.fail("the body must not run")

    assert caught.value.exit_code == 7
    lines = str(caught.value).splitlines()
    assert lines[0] == f"broken ended with exit code 7 before it was ready; the end of {tmp_path / 'broken.log'}:"
    assert ["  87", "  no such file"] == [lines[1], lines[-1]]
    assert len(lines) == 16
    bus = story.events[0]
    assert identity_of(bus.pid) is None


async def test_one_that_does_not_get_ready_in_time_is_told_and_stopped(tmp_path: Path) -> None:
    story = Story()

    with pytest.raises(NotReady, match=r"slow was not ready after 0.2 s \(still running, no exit code\)"):
        async with supervise(
            [spec(tmp_path, "slow", depends_on_ready=lambda: False)], on_event=story, ready_timeout_s=0.2
        ):
            pytest.fail("the body must not run")

    assert identity_of(story.events[0].pid) is None


async def test_an_exception_of_the_body_comes_out_as_it_is_after_all_has_stopped(tmp_path: Path) -> None:
    story = Story()

    with pytest.raises(KeyError, match="mine"):
        async with supervise([spec(tmp_path, "a")], on_event=story):
            raise KeyError("mine")

    assert identity_of(story.events[0].pid) is None


async def test_cancelling_stops_everything(tmp_path: Path) -> None:
    story = Story()

    with anyio.CancelScope() as scope:
        async with supervise([spec(tmp_path, "a")], on_event=story):
            scope.cancel()
            await anyio.sleep_forever()

    assert identity_of(story.events[0].pid) is None


async def test_one_that_ignores_sigterm_is_killed_within_the_deadline_for_all(tmp_path: Path) -> None:
    story = Story()
    deaf = [
        spec(tmp_path, name, "trap '' TERM; echo up; while :; do sleep 0.1; done", depends_on_ready=up(tmp_path, name),
             stop_grace_s=60.0)
        for name in ("a", "b")
    ]  # fmt: skip

    with anyio.fail_after(60):
        async with supervise(deaf, on_event=story, stop_timeout_s=0.1):
            pass

    assert [None, None] == [identity_of(event.pid) for event in story.events if event.kind is EventKind.STARTED]


async def test_a_signal_ends_the_body_and_says_which(tmp_path: Path) -> None:
    async with supervise([spec(tmp_path, "a")]) as supervisor:
        os.kill(os.getpid(), signal.SIGTERM)
        await anyio.sleep_forever()

    assert supervisor.signal_received == signal.SIGTERM


async def test_a_signal_before_the_body_is_an_exception_of_its_own(tmp_path: Path) -> None:
    def interrupts() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(Interrupted, match="SIGTERM while starting"):
        async with supervise([spec(tmp_path, "a", depends_on_ready=interrupts)]):
            pytest.fail("the body ran")


async def test_nothing_is_left_when_the_supervisor_itself_is_killed(tmp_path: Path) -> None:
    script = f"""
import anyio, pathlib
from kit.supervisor import ProcessSpec, supervise
async def main():
    specs = [ProcessSpec(name=name, arguments=("sh", "-c", {FOREVER!r}), environment={ENVIRONMENT!r},
                         log_path=pathlib.Path({str(tmp_path)!r}) / name) for name in ("a", "b")]
    async with supervise(specs) as supervisor:
        print(supervisor.pid("a"), supervisor.pid("b"), flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""
    process = python(script)
    assert process.stdout
    children = [identity_of(int(pid)) for pid in process.stdout.readline().split()]
    assert len(children) == 2

    process.kill()

    with anyio.fail_after(60):
        while any(child and is_alive(child) for child in children):
            await anyio.sleep(0.01)
    process.wait()
    process.stdout.close()


async def test_addresses_as_readiness_checks(tmp_path: Path) -> None:
    port = free_port()
    assert not await holds(f"tcp://127.0.0.1:{port}")
    assert not await holds(f"unix://{tmp_path / 'socket'}")

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            request = await stream.receive()
            code = b"200 OK" if request.startswith(b"GET /healthz?x=1 ") else b"503 Not Now"
            await stream.send(b"HTTP/1.1 " + code + b"\r\n\r\n")

    async with anyio.create_task_group() as tasks:
        server = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
        tasks.start_soon(server.serve, answer)
        assert await holds(f"http://127.0.0.1:{port}/healthz?x=1")
        assert not await holds(f"http://127.0.0.1:{port}")
        tasks.cancel_scope.cancel()
    await server.aclose()
    with pytest.raises(ValueError, match="use http://"):
        await holds("ftp://nowhere")


def test_two_processes_of_one_name_are_refused(tmp_path: Path) -> None:
    async def start() -> None:
        async with supervise([spec(tmp_path, "a"), spec(tmp_path, "a")]):
            pass

    with pytest.raises(ValueError, match="two processes of one name: a, a"):
        anyio.run(start)


def test_a_log_that_is_not_there_has_no_tail(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "none") == []

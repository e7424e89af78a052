"""A holder as its callers meet it: engines over the private socket, route leases over TCP, real processes."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import aiohttp
import anyio
import anyio.to_thread
import msgspec
import pytest

from kit.process import ProcessIdentity, free_port, is_alive
from schemas.holders import EngineStart, EngineView, HolderRefused, HolderView, RouteClosed, RouteLease, RouteLeaseWish
from services.holder import cgroups, remains
from services.holder.engines import Engines
from services.holder.logs import rotate
from services.holder.main import AlreadyRunning, Holder, running
from services.holder.settings import HolderSettings

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")

FOREVER = "echo up; exec sleep 1000"
DEAF = "trap '' TERM; echo up; while :; do sleep 0.1; done"


class Agent:
    """The node agent's side of the private socket."""

    def __init__(self, path: Path) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), base_url="http://holder")

    async def close(self) -> None:
        await self._session.close()

    async def ask(self, method: str, path: str, kind: type[T], *, status: int = 200, **body: object) -> T:
        async with self._session.request(method, path, data=msgspec.json.encode(body) if body else None) as answer:
            content = await answer.read()
            assert answer.status == status, content
            return msgspec.json.decode(content or b"null", type=kind)

    async def start(
        self, replica_id: str, *arguments: str, epoch: int = 1, status: int = 200, **more: object
    ) -> EngineView:
        wish = EngineStart(replica_id=replica_id, lease_epoch=epoch, arguments=arguments, environment={}, gpu_uuids=())
        body = msgspec.to_builtins(wish) | more
        return await self.ask("POST", "/engines", EngineView, status=status, **body)

    async def run(self, replica_id: str, script: str, **more: object) -> EngineView:
        """Start, open the gate, and wait for it to say that it is up."""
        view = await self.start(replica_id, "sh", "-c", script, **more)  # type: ignore[arg-type]
        await self.open_gate(replica_id)
        await log_holds(view, "up\n")
        return view

    async def open_gate(self, replica_id: str) -> EngineView:
        return await self.ask("POST", f"/engines/{quote(replica_id, safe='')}/gate", EngineView)

    async def stop(self, replica_id: str, *, grace_s: float = 20.0, query: str = "") -> EngineView:
        return await self.ask("POST", f"/engines/{quote(replica_id, safe='')}/stop{query}", EngineView, grace_s=grace_s)

    async def wait(self, replica_id: str, *, timeout_s: float = 60.0) -> EngineView:
        return await self.ask("GET", f"/engines/{quote(replica_id, safe='')}/wait?timeout_s={timeout_s}", EngineView)

    async def refused(self, method: str, path: str, *, status: int, **body: object) -> str:
        return (await self.ask(method, path, HolderRefused, status=status, **body)).reason


async def until(condition: Callable[[], bool]) -> None:
    """For what no event tells: the end of a process that is not our child, the output of one that is."""
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.01)


def log_of(view: EngineView) -> str:
    return Path(view.log_path).read_text()


def runs(view: EngineView) -> bool:
    return is_alive(ProcessIdentity(pid=view.pid, started_ticks=view.started_ticks))


async def log_holds(view: EngineView, text: str) -> None:
    await until(lambda: text in log_of(view))


async def gone(view: EngineView) -> None:
    await until(lambda: not runs(view))


def settings_for(tmp_path: Path, **more: object) -> HolderSettings:
    given: dict[str, object] = {"state_dir": str(tmp_path / "state"), "port": 0, "term_s": 0.3, "stop_grace_s": 5.0}
    given["has_broker"] = False
    return msgspec.convert(given | more, HolderSettings)


@asynccontextmanager
async def holder_and_agent(tmp_path: Path, **more: object) -> AsyncIterator[tuple[Holder, Agent]]:
    async with running(settings_for(tmp_path, **more)) as holder:
        agent = Agent(holder.socket)
        try:
            yield holder, agent
        finally:
            await agent.close()


@pytest.fixture(params=["auto", "off"])
async def agent(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    """Of a holder with cgroups where this host has them, and of one without."""
    async with holder_and_agent(tmp_path, cgroup=request.param) as (_, agent):
        yield agent


async def test_an_engine_waits_at_its_gate_runs_and_is_stopped(agent: Agent) -> None:
    started = await agent.start("r/1", "sh", "-c", FOREVER)
    assert (started.is_alive, started.is_gated, started.exit_code) == (True, True, None)
    assert log_of(started).count("\n") == 1

    opened = await agent.open_gate("r/1")
    assert not opened.is_gated
    await log_holds(started, "up\n")

    stopped = await agent.stop("r/1")

    assert (stopped.is_alive, stopped.exit_code) == (False, -signal.SIGTERM)
    assert not runs(started)
    await agent.ask("DELETE", "/engines/r%2F1", type(None), status=204)
    await agent.ask("DELETE", "/engines/r%2F1", type(None), status=204)
    assert () == (await agent.ask("GET", "/view", HolderView)).engines


async def test_starting_twice_answers_the_running_one_and_another_epoch_is_refused(agent: Agent) -> None:
    first = await agent.start("a", "sh", "-c", FOREVER, epoch=3)

    assert first == await agent.start("a", "sh", "-c", FOREVER, epoch=3)
    reason = await agent.refused(
        "POST", "/engines", status=409, replica_id="a", lease_epoch=4, arguments=["true"], environment={}, gpu_uuids=[]
    )
    assert reason == "a runs with lease epoch 3; stop it before it is started with epoch 4"
    assert "not 4" in await agent.refused("POST", "/engines/a/stop?lease_epoch=4", status=409, grace_s=1)
    assert "still runs" in await agent.refused("DELETE", "/engines/a", status=409)

    dead = await agent.stop("a", query="?lease_epoch=3")

    assert dead == await agent.start("a", "sh", "-c", FOREVER, epoch=3)
    assert "out of date" in await agent.refused(
        "POST", "/engines", status=409, replica_id="a", lease_epoch=2, arguments=["true"], environment={}, gpu_uuids=[]
    )
    again = await agent.start("a", "sh", "-c", FOREVER, epoch=4)
    assert again.pid != first.pid


async def test_an_engine_gets_its_port_its_gpus_its_group_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBLET_HOLDER_TOKEN", "secret")
    monkeypatch.setenv("SOFTGPU_STATE", "kept")
    async with holder_and_agent(tmp_path, cgroup="off") as (_, agent):
        view = await agent.start(
            "a",
            "sh",
            "-c",
            "echo port={port}; env; echo up",
            environment={"MINE": "1", "PORT": "{port}"},
            gpu_uuids=["GPU-1", "GPU-2"],
        )
        await agent.open_gate("a")
        await agent.wait("a")

        lines = log_of(view).splitlines()

    assert {
        f"port={view.port}", f"PORT={view.port}", "MINE=1", "CUDA_VISIBLE_DEVICES=GPU-1,GPU-2",
        "SOFTGPU_GROUP=sublet-a", "SOFTGPU_STATE=kept",
    } <= set(lines)  # fmt: skip
    assert not [line for line in lines if "secret" in line]
    assert view.namespace == "sublet-a"
    assert view.gpu_uuids == ("GPU-1", "GPU-2")


async def test_where_the_kernel_takes_no_process_into_a_cgroup_the_group_is_declared(tmp_path: Path) -> None:
    class Unwilling(cgroups.Cgroups):
        def place(self, replica_id: str, pid: int) -> Path | None:
            return None

    async with anyio.create_task_group() as tasks:
        engines = Engines(state_dir=tmp_path, cgroups=Unwilling(tmp_path), tasks=tasks, on_death=lambda _: None)
        wish = EngineStart(replica_id="a", lease_epoch=1, arguments=("env",), environment={}, gpu_uuids=())
        view = engines.start(wish)
        engines.open_gate("a", lease_epoch=1)
        await engines.wait("a", lease_epoch=1, timeout_s=60)

    assert view.namespace == "sublet-a"
    assert log_of(view).count("SOFTGPU_GROUP=sublet-a\n") == 1


async def test_a_death_is_told_at_once_and_closes_the_route(agent: Agent) -> None:
    await agent.run("a", FOREVER)
    await agent.ask("POST", "/routes/open", type(None), status=204, replica_id="a", endpoint="http://x")
    told: list[EngineView] = []

    async def watch() -> None:
        told.append(await agent.wait("a"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        view = await agent.ask("GET", "/engines/a", EngineView)
        os.kill(view.pid, signal.SIGKILL)

    assert (told[0].is_alive, told[0].exit_code) == (False, -signal.SIGKILL)
    seen = await agent.ask("GET", "/view", HolderView)
    assert (seen.open_ids, seen.closed_ids) == ((), ("a",))


async def test_a_wait_ends_after_its_time(agent: Agent) -> None:
    await agent.start("a", "sh", "-c", FOREVER)

    assert (await agent.wait("a", timeout_s=0.05)).is_alive


async def test_stop_kills_one_that_ignores_sigterm(agent: Agent) -> None:
    await agent.run("a", DEAF)

    stopped = await agent.stop("a", grace_s=0.05)

    assert (stopped.is_alive, stopped.exit_code) == (False, -signal.SIGKILL)


async def test_nothing_is_left_of_an_engine_that_started_children_in_their_own_sessions(agent: Agent) -> None:
    view = await agent.run("a", "setsid sleep 1000 & sleep 1000 & echo up; wait")
    state_dir = Path(view.log_path).parent.parent
    await until(lambda: len(remains.pids_with_mark(remains.mark(state_dir, "a"))) == 3)

    await agent.stop("a")

    assert remains.pids_with_mark(remains.mark(state_dir, "a")) == []


async def test_wrong_requests_are_answered_with_a_sentence(agent: Agent) -> None:
    assert await agent.refused("GET", "/engines/b", status=404) == "no engine of b here"
    assert "missing required field" in await agent.refused("POST", "/engines", status=400, replica_id="b")
    assert "must be a number" in await agent.refused("GET", "/engines/b/wait?timeout_s=soon", status=400)
    assert "no program" in await agent.refused(
        "POST", "/engines", status=400, replica_id="b", lease_epoch=1, arguments=[], environment={}, gpu_uuids=[]
    )
    assert await agent.refused("GET", "/nothing", status=404) == "Not Found"


async def test_only_the_owner_may_connect_to_the_socket(tmp_path: Path) -> None:
    async with holder_and_agent(tmp_path) as (holder, agent):
        mode = stat.S_IMODE(holder.socket.stat().st_mode)
        await agent.ask("GET", "/view", HolderView)

    assert mode == 0o600
    assert not holder.socket.exists()


async def test_a_second_holder_of_one_folder_is_refused(tmp_path: Path) -> None:
    async with holder_and_agent(tmp_path):
        with pytest.raises(AlreadyRunning):
            async with running(settings_for(tmp_path)):
                pass


async def test_a_gateway_learns_of_a_close_at_once_and_its_word_ends_it(tmp_path: Path) -> None:
    async with holder_and_agent(tmp_path, token="t", term_s=60.0) as (holder, agent):
        # A new holder would wait for leases of its former life.
        holder.routes.table.born_at_s -= 600
        await agent.ask("POST", "/routes/open", type(None), status=204, replica_id="a", endpoint="http://x")
        async with aiohttp.ClientSession(f"http://127.0.0.1:{holder.port}") as session:

            async def wish(seen_version: int, *, token: str = "t") -> tuple[int, bytes]:
                body = msgspec.json.encode(RouteLeaseWish(gateway="g", seen_version=seen_version, wait_s=2.5))
                headers = {"Authorization": f"Bearer {token}"}
                async with session.post("/routes/lease", data=body, headers=headers) as answer:
                    return answer.status, await answer.read()

            assert (await wish(-1, token="wrong"))[0] == 401
            lease = msgspec.json.decode((await wish(-1))[1], type=RouteLease)
            assert (lease.open_ids, lease.endpoints, lease.term_s) == (("a",), ("http://x",), 60.0)
            closed: list[RouteClosed] = []

            async def gateway() -> None:
                told = msgspec.json.decode((await wish(lease.version))[1], type=RouteLease)
                assert told.closed_ids == ("a",)
                await wish(told.version)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(gateway)
                with anyio.fail_after(20):  # Long before the gateway's lease would end.
                    closed.append(await agent.ask("POST", "/routes/close", RouteClosed, replica_id="a"))
                tasks.cancel_scope.cancel()

    assert closed[0].expired_count == 0


async def test_all_engines_stop_with_the_holder(tmp_path: Path) -> None:
    async with holder_and_agent(tmp_path) as (_, agent):
        closer = "trap 'exit 0' TERM; echo up; while :; do sleep 0.02; done"
        engines = [await agent.run("a", FOREVER), await agent.run("b", closer)]
        engines.append(await agent.start("gated", "true"))

    assert not [view for view in engines if runs(view)]
    assert no_cgroup_left(engines)


@asynccontextmanager
async def holder_process(
    tmp_path: Path, port: int, **more: str
) -> AsyncIterator[tuple[subprocess.Popen[bytes], Agent]]:
    environment = {
        "PATH": os.environ["PATH"], "SUBLET_HOLDER_STATE_DIR": str(tmp_path / "state"), "SUBLET_HOLDER_PORT": str(port),
        "SUBLET_HOLDER_TERM_S": "0.1", "SUBLET_HOLDER_HAS_BROKER": "false",
    }  # fmt: skip
    environment |= more
    code = "import anyio, services.holder.main as holder; anyio.run(holder.main)"
    process = start_python(code, environment)
    path = tmp_path / "state" / "holder.sock"
    agent = Agent(path)
    try:
        await until(lambda: can_connect(path))
        yield process, agent
    finally:
        process.terminate()
        await anyio.to_thread.run_sync(process.wait)
        await agent.close()


def start_python(code: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)


def no_cgroup_left(engines: list[EngineView]) -> bool:
    return not [view.namespace for view in engines if Path(view.namespace).is_dir()]


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def test_engines_die_with_a_killed_holder_and_the_next_one_ends_what_they_left(tmp_path: Path) -> None:
    port = free_port()
    async with holder_process(tmp_path, port) as (process, agent):
        running_one = await agent.run("a", "setsid sh -c 'echo $$ > $0; exec sleep 1000' $ORPHAN & " + DEAF,
                                      environment={"ORPHAN": str(tmp_path / "orphan")})  # fmt: skip
        gated = await agent.start("gated", "true")
        await until(lambda: (tmp_path / "orphan").exists() and bool((tmp_path / "orphan").read_text()))

        process.kill()

        await gone(running_one)
        await gone(gated)
    orphan_pid = int((tmp_path / "orphan").read_text())
    assert orphan_pid in remains.pids_with_mark(remains.mark(tmp_path / "state", "a"))

    async with holder_process(tmp_path, port) as (_, agent):
        view = await agent.ask("GET", "/view", HolderView)
        assert view.engines == ()
        assert remains.pids_with_mark(remains.mark(tmp_path / "state", "a")) == []
        assert view.leftover_namespaces == {}


async def test_sigterm_ends_a_holder_cleanly(tmp_path: Path) -> None:
    async with holder_process(tmp_path, free_port()) as (process, agent):
        view = await agent.run("a", FOREVER)

        process.terminate()

        await gone(view)
        assert await anyio.to_thread.run_sync(process.wait) == 0
        assert not (tmp_path / "state" / "holder.sock").exists()


def test_a_log_that_outgrew_its_bound_is_moved_once_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("a") as writer:
        writer.write("x" * 5000)
        writer.flush()

        assert rotate(path, 4096)
        assert not rotate(path, 4096)
        writer.write("more")

    assert path.read_text() == "more"
    assert (tmp_path / "a.log.1").read_text() == "x" * 5000
    assert not rotate(tmp_path / "none.log", 4096)


def test_a_leaf_of_a_replica_with_slashes_is_found_by_its_name(tmp_path: Path) -> None:
    leaf = tmp_path / "sublet-r%2F1"
    leaf.mkdir()

    assert {"r/1": leaf} == cgroups.Cgroups(tmp_path).leaves()
    cgroups.Cgroups(tmp_path).remove("r/1")
    assert not leaf.exists()
    assert cgroups.Cgroups(None).leaves() == {}


def test_a_declared_group_fits_the_software_driver() -> None:
    assert cgroups.declared_group("r1") == "sublet-r1"
    assert len(cgroups.declared_group("r" * 128)) <= 63
    assert cgroups.declared_group("r" * 127) != cgroups.declared_group("r" * 128)


def test_an_engine_s_name_for_its_remains_is_not_the_start_of_another_s() -> None:
    assert not remains.mark(Path("/s"), "r12").startswith(remains.mark(Path("/s"), "r1"))
    assert remains.mark(Path("/s"), "r1").startswith(remains.mark(Path("/s")))

"""The guard on the software GPU: grades are found by trying, with real processes, and what was tried leaves nothing."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import anyio.to_thread
import pytest

import softgpu
from kit.process import free_port
from schemas.holders import EngineView
from tests.integration.test_holder import ROOT, Agent, holder_process, log_holds, runs

pytestmark = pytest.mark.anyio
NOT_SUPPORTED = 3
"""NVML's code."""


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    state_dir = Path("/dev/shm") / f"softgpu-test-{uuid.uuid4().hex[:12]}"
    host = softgpu.Host(state_dir, gpus=1, profile="test-1", total_bytes=256 << 20, context_bytes=8 << 20).create()
    yield host
    host.remove()


async def offered(tmp_path: Path, host: softgpu.Host, *words: str) -> dict[str, Any]:
    """What a guard says whose holder is there."""
    socket = str(tmp_path / "state" / "holder.sock")
    command = [sys.executable, "-m", "tests.integration.guard_offers", socket, str(tmp_path / "agent"), *words]

    def run() -> str:
        finished = subprocess.run(
            command, env={**os.environ, **host.environment()}, cwd=ROOT, text=True, capture_output=True, timeout=200,
            check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    told: dict[str, Any] = json.loads((await anyio.to_thread.run_sync(run)).splitlines()[-1])
    return told


@pytest.mark.parametrize("cgroup", ["auto", "off"])
async def test_the_grade_driver_is_given_when_a_live_allocation_was_refused_and_nothing_is_left_of_it(
    tmp_path: Path, host: softgpu.Host, cgroup: str
) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment(), SUBLET_HOLDER_CGROUP=cgroup):
        told = await offered(tmp_path, host)

    [(grade, reason)] = told["grades"]
    assert ("driver", "the driver refused a live allocation beyond a group's limit") == (grade, reason)
    assert ([], {}) == (told["engines"], told["leftover"])
    status = host.status()
    assert 0 == status["devices"][0]["used_bytes"]
    assert [] == [group for group in status["groups"] if any(limit["hard_bytes"] for limit in group["limits"])]


async def test_a_driver_without_limits_gives_a_lower_grade_and_says_why(tmp_path: Path, host: softgpu.Host) -> None:
    host.set_fault("nvmlDeviceGetMemoryLimits_v1", times=-1, code=NOT_SUPPORTED)
    async with holder_process(tmp_path, free_port(), **host.environment()):
        told = await offered(tmp_path, host)

    [(grade, reason)] = told["grades"]
    assert "cooperative" == grade
    assert "needs driver R615" in reason
    assert "no memory broker" in reason


async def test_a_driver_that_takes_limits_and_enforces_none_is_found_out(tmp_path: Path, host: softgpu.Host) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()):
        told = await offered(tmp_path, host, "pretending")

    [(grade, reason)] = told["grades"]
    assert "cooperative" == grade
    assert "accepts limits and does not enforce them" in reason


async def test_a_limit_that_is_not_read_back_as_it_was_set_gives_no_driver_grade(
    tmp_path: Path, host: softgpu.Host
) -> None:
    """The first set is that of the question whether limits are supported at all."""
    host.set_fault("nvmlDeviceSetMemoryLimits_v1", times=-1, kind="lie")
    async with holder_process(tmp_path, free_port(), **host.environment()):
        told = await offered(tmp_path, host)

    [(grade, reason)] = told["grades"]
    assert "cooperative" == grade
    assert "read back" in reason


async def test_what_was_proven_is_not_tried_again_and_what_was_not_is(tmp_path: Path, host: softgpu.Host) -> None:
    """The holder's log of the probe grows by one start for each attempt."""
    async with holder_process(tmp_path, free_port(), **host.environment()):
        host.set_fault("nvmlDeviceSetMemoryLimits_v1", times=2, kind="lie")
        lying = await offered(tmp_path, host)
        first = await offered(tmp_path, host)
        starts = attempts(tmp_path)
        second = await offered(tmp_path, host)

        assert ["cooperative", "driver", "driver"] == [told["grades"][0][0] for told in (lying, first, second)]
        assert first["grades"] == second["grades"]
        assert starts == attempts(tmp_path)


async def test_an_operator_can_have_it_proven_again(tmp_path: Path, host: softgpu.Host) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()):
        await offered(tmp_path, host)
        starts = attempts(tmp_path)
        environment = {
            **os.environ, **host.environment(), "SUBLET_NODEAGENT_STATE_DIR": str(tmp_path / "agent"),
            "SUBLET_NODEAGENT_HOLDER_SOCKET": str(tmp_path / "state" / "holder.sock"),
        }  # fmt: skip
        command = [sys.executable, "-m", "services.nodeagent.guard"]
        finished = await anyio.run_process(command, env=environment, cwd=ROOT)

        assert f"{host.uuids()[0]}  driver: the driver refused" in finished.stdout.decode()
        assert attempts(tmp_path) == starts + 1


def attempts(tmp_path: Path) -> int:
    return sum(path.read_text().count("lease epoch") for path in (tmp_path / "state" / "logs").glob("guard-probe*"))


async def test_a_gpu_too_full_to_try_gives_no_driver_grade(tmp_path: Path, host: softgpu.Host) -> None:
    """Its refusal would prove nothing about limits. With room again it is tried again."""
    code = (
        "import sys; from devices.cuda import CudaDevice; d = CudaDevice(sys.argv[1]);"
        "d.allocate(236 << 20); print('up', flush=True); sys.stdin.read()"
    )
    full = subprocess.Popen(
        [sys.executable, "-c", code, host.uuids()[0]],
        env={**os.environ, **host.environment()}, cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert full.stdout is not None
    async with holder_process(tmp_path, free_port(), **host.environment()):
        assert "up\n" == await anyio.to_thread.run_sync(full.stdout.readline)
        told = await offered(tmp_path, host)
        full.communicate("")
        later = await offered(tmp_path, host)

    assert "cooperative" == told["grades"][0][0]
    assert "too little memory is free" in told["grades"][0][1]
    assert "driver" == later["grades"][0][0]


async def test_a_probe_that_an_agent_left_behind_is_ended_by_the_next(tmp_path: Path, host: softgpu.Host) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()) as (_, agent):
        await left_behind(agent)

        told = await offered(tmp_path, host)

        assert "driver" == told["grades"][0][0]
        assert [] == told["engines"]


async def left_behind(agent: Agent) -> None:
    await agent.run("guard-probe.0", "echo up; exec sleep 1000")


# --- The watchdog -----------------------------------------------------------------------------------------------------

HOLDS = (
    "import sys, time; from devices.cuda import CudaDevice; d = CudaDevice(sys.argv[1]);"
    "kept = d.allocate(int(sys.argv[2]) << 20); print('up', flush=True); time.sleep(1000)"
)


async def holds(agent: Agent, replica_id: str, host: softgpu.Host, *, mib: int) -> EngineView:
    """An engine that has taken so much beside its context of 8 MiB."""
    command = (sys.executable, "-c", HOLDS, host.uuids()[0], str(mib))
    view = await agent.start(replica_id, *command, environment={"PYTHONPATH": str(ROOT)})
    await agent.open_gate(replica_id)
    await log_holds(view, "up\n")
    return view


class Watch:
    """A watchdog that looks when it is told to."""

    def __init__(self, tmp_path: Path, host: softgpu.Host, grade: str, *leases: str) -> None:
        socket = str(tmp_path / "state" / "holder.sock")
        arguments = [socket, str(tmp_path / "agent"), grade, host.uuids()[0], *leases]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.watching", *arguments],
            env={**os.environ, **host.environment()}, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    async def look(self) -> dict[str, Any]:
        def ask() -> str:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(file=self._process.stdin, flush=True)
            return self._process.stdout.readline()

        told: dict[str, Any] = json.loads(await anyio.to_thread.run_sync(ask))
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("")


async def test_an_engine_that_only_the_watchdog_holds_is_stopped_and_its_neighbour_is_not(
    tmp_path: Path, host: softgpu.Host
) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()) as (_, agent):
        greedy = await holds(agent, "greedy", host, mib=150)
        modest = await holds(agent, "modest", host, mib=20)
        with Watch(tmp_path, host, "watched", "greedy=40", "modest=40") as watch:
            told = await watch.look()

            assert ["greedy"] == told["stopped"]
            assert [("greedy", True)] == [(report["replica_id"], report["is_stopped"]) for report in told["told"]]
            assert 158 << 20 == told["told"][0]["used_bytes"]
            assert not runs(greedy)
            assert runs(modest)
            assert {"told": [], "stopped": []} == await watch.look(), "once"


async def test_on_another_grade_the_watchdog_tells_and_stops_nobody(tmp_path: Path, host: softgpu.Host) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()) as (_, agent):
        greedy = await holds(agent, "greedy", host, mib=150)
        with Watch(tmp_path, host, "cooperative", "greedy=40") as watch:
            told = await watch.look()

            assert [False] == [report["is_stopped"] for report in told["told"]]
            assert runs(greedy)


@pytest.mark.parametrize("kind", ["unknown", "empty"])
async def test_bytes_that_the_driver_does_not_tell_stop_nobody_and_are_not_taken_for_zero(
    tmp_path: Path, host: softgpu.Host, kind: str
) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()) as (_, agent):
        greedy = await holds(agent, "greedy", host, mib=150)
        with Watch(tmp_path, host, "watched", "greedy=40") as watch:
            host.set_fault("nvmlDeviceGetComputeRunningProcesses", times=-1, kind=kind)
            assert {"told": [], "stopped": []} == await watch.look()
            assert runs(greedy)

            host.clear_faults()
            assert ["greedy"] == (await watch.look())["stopped"]

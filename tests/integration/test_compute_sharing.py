"""MPS as the node agent runs it, against the stand-in of the control program on the software GPU."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio.to_thread
import pytest

import softgpu
from schemas.deployments import ComputeSharing, EngineKind, ShareSpec
from services.nodeagent.guard import NotEnforced
from services.nodeagent.guard.compute import Compute
from services.nodeagent.guard.mps import MpsControl, MpsProblem
from tests.integration.test_holder import ROOT
from tests.integration.test_node_several_gpus import hands_on, replica
from tests.unit.engines.running import MiB, software_host

pytestmark = pytest.mark.anyio

PROGRAM = shlex.join([sys.executable, str(ROOT / "softgpu/mps/nvidia-cuda-mps-control")])
HOLDS = """
import sys
from devices.cuda import CudaDevice
device = CudaDevice(sys.argv[1])
kept = device.allocate(20 << 20)
print("up", flush=True)
sys.stdin.readline()
try:
    device.memory()
except Exception as error:
    print(type(error).__name__)
else:
    print("unharmed")
"""


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with software_host(phantom=True, gpus=2) as made:
        yield made


@pytest.fixture
async def control(host: softgpu.Host) -> AsyncIterator[MpsControl]:
    """In a short folder: a socket's path has an end."""
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        made = MpsControl(PROGRAM, pipe_dir=Path(folder) / "pipe", environment={**os.environ, **host.environment()})
        yield made
        for pid, server in (await made.clients()).items() if await made.is_running() else ():
            await made.terminate(pid, server=server)
        if await made.is_running():
            await made.quit()


class Client:
    """A process that holds some memory."""

    def __init__(self, host: softgpu.Host, variables: dict[str, str]) -> None:
        environment = {**os.environ, **host.environment(), **variables, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, host.uuids()[0]],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.pid = self._process.pid

    async def is_up(self) -> None:
        assert self._process.stdout is not None
        assert "up\n" == await anyio.to_thread.run_sync(self._process.stdout.readline)

    async def end(self) -> str:
        """How its next call went."""
        return (await anyio.to_thread.run_sync(self._process.communicate, "\n"))[0].strip()


async def test_the_daemon_is_started_when_it_is_wanted_and_found_when_it_runs(control: MpsControl) -> None:
    compute = Compute(control)
    for _ in range(2):
        sharing, reason = await compute.prove()

        assert ComputeSharing.MPS is sharing
        assert str(control.pipe_dir) in reason


async def test_without_the_program_the_gpu_is_time_sliced_and_says_why(tmp_path: Path) -> None:
    compute = Compute(MpsControl("no-such-program", pipe_dir=tmp_path / "pipe"))

    sharing, reason = await compute.prove()

    assert ComputeSharing.TIME_SLICED is sharing
    assert "MPS is wanted and does not run" in reason
    assert {} == compute.environment(ShareSpec(request_portion=0.5, compute_portion=0.5))


async def test_switched_off_it_tells_of_a_daemon_that_engines_would_find(control: MpsControl) -> None:
    assert "is not ours" not in (await Compute(None, stranger=control).prove())[1]
    await control.start()

    sharing, reason = await Compute(None, stranger=control).prove()

    assert ComputeSharing.TIME_SLICED is sharing
    assert f"not ours answers at {control.pipe_dir}" in reason


async def test_a_ceiling_is_whole_percents_and_at_least_one(control: MpsControl) -> None:
    compute = Compute(control)
    await compute.prove()
    for portion, percents in ((0.25, "25"), (1.0, "100"), (0.001, "1"), (0.999, "99")):
        share = ShareSpec(request_portion=0.5, compute_portion=portion)
        assert percents == compute.environment(share)["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in compute.environment(ShareSpec(request_portion=0.5))


async def test_an_engine_with_another_pipe_directory_is_found_out(host: softgpu.Host, control: MpsControl) -> None:
    """It would run with the whole GPU and say nothing."""
    compute = Compute(control)
    await compute.prove()
    rightly = Client(host, control.variables())
    wrongly = Client(host, {"CUDA_MPS_PIPE_DIRECTORY": "/somewhere-else"})
    await rightly.is_up()
    await wrongly.is_up()

    await compute.verify([1, rightly.pid])
    with pytest.raises(NotEnforced, match="no client of the MPS daemon"):
        await compute.verify([1, wrongly.pid])

    assert ["unharmed", "unharmed"] == [await rightly.end(), await wrongly.end()]


async def test_a_drained_engine_is_off_the_gpu_before_any_signal_and_its_neighbour_goes_on(
    host: softgpu.Host, control: MpsControl
) -> None:
    compute = Compute(control)
    await compute.prove()
    leaving, staying = Client(host, control.variables()), Client(host, control.variables())
    await leaving.is_up()
    await staying.is_up()

    await compute.drain([leaving.pid])

    used = {process["pid"]: process["used_bytes"] for process in host.status()["devices"][0]["processes"]}
    assert 0 == used.get(leaving.pid, 0)
    assert used[staying.pid] > 0
    assert [staying.pid] == list(await control.clients())
    assert ["ClientEvicted", "unharmed"] == [await leaving.end(), await staying.end()]


async def test_a_daemon_with_clients_does_not_quit(host: softgpu.Host, control: MpsControl) -> None:
    await control.start()
    client = Client(host, control.variables())
    await client.is_up()

    await control.quit()
    assert await control.is_running()

    await client.end()
    await control.quit()
    assert not await control.is_running()
    with pytest.raises(MpsProblem):
        await control.servers()


async def test_a_replica_starts_as_a_client_with_its_ceiling_and_is_drained_before_it_is_stopped(
    tmp_path: Path, host: softgpu.Host, control: MpsControl
) -> None:
    settings = {"compute_sharing": "mps", "mps_control": PROGRAM, "mps_pipe_dir": str(control.pipe_dir)}
    half = replica(host, EngineKind.SIMULATED, compute_portion=0.5)
    async with hands_on(tmp_path, host, half, **settings) as hands:
        started = await hands.do("start")
        assert "EngineStarted" == started["kind"], started
        [pid] = await control.clients()
        assert b"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50" in variables_of(pid)

        stopped = await hands.do("stop")
        assert "EngineStopped" == stopped["kind"], stopped
        assert {} == await control.clients()
        assert [0, 0] == stopped["used"]
        assert 500 * MiB < min(started["used"])


async def test_a_daemon_that_the_deployment_itself_names_is_not_obeyed(
    tmp_path: Path, host: softgpu.Host, control: MpsControl
) -> None:
    """Its own variables would take it out of the ceiling."""
    settings = {"compute_sharing": "mps", "mps_control": PROGRAM, "mps_pipe_dir": str(control.pipe_dir)}
    environment = {"CUDA_MPS_PIPE_DIRECTORY": "/elsewhere", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100"}
    half = replica(host, EngineKind.SIMULATED, compute_portion=0.5, environment=environment)
    async with hands_on(tmp_path, host, half, **settings) as hands:
        assert "EngineStarted" == (await hands.do("start"))["kind"]
        assert 1 == len(await control.clients())
        await hands.do("stop")


def variables_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")

"""A server, hundreds of stand-in node agents, and the real placement service in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import aiohttp
import anyio

from benchmarks.bus_sides import server
from benchmarks.nats_cluster import free_ports
from benchmarks.progress import Progress
from benchmarks.report import quantile
from benchmarks.scale_agents import Seen, StandIns
from kit.bus import Bus
from kit.bus_nats import NatsBus
from schemas.catalogue import encode
from schemas.deployments import (
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    PlacementSpec,
    ShareSpec,
    SwapSpec,
    WorkloadKind,
)
from schemas.inbox import DeployRequested, RetireRequested
from schemas.messages import Command, command_subject
from schemas.units import GiB

NODE_COUNT: Final = 500
NODE_COUNT_QUICK: Final = 8
GPUS_PER_NODE: Final = 8
TENANT: Final = "default"
COMMANDS_IN_FLIGHT_MAX: Final = 256
START_TIMEOUT_S: Final = 60.0
LOOK_EVERY_S: Final = 0.05
STALL_S: Final = 30.0
"""Nothing moves for so long: the scenario has failed."""
FSYNC_COUNT: Final = 300
LOG_LINES_SHOWN: Final = 3
IS_COMPILED: Final = importlib.util.find_spec("numba") is not None
"""As the operator of so many nodes would have it (docs/adr/0012); without numba the plain index runs."""
COMMAND: Final = (sys.executable, "-m", "services", "placement")
ROOT: Final = Path(__file__).resolve().parents[1]

KAI_SOURCE: Final = (
    "KAI Scheduler, docs/scale-tests/example-results.json, 3 July 2026: 500 simulated nodes. Its figures are end to "
    "end on Kubernetes: API server, etcd, pod creation, binding and simulated kubelets count in. Here: command, "
    "inbox, decision, history on disk, lease, readiness; the nodes are stand-ins, and no engine is started on either "
    "side. So the ratio compares two control planes, not two schedulers' cores."
)


class Stalled(Exception):
    """A scenario does not get on; the text says how far it came."""


@dataclass(slots=True)
class Stage:
    """What a scenario works with."""

    bus: Bus
    agents: StandIns
    placement_pid: int
    is_alive: Callable[[], str]
    """'' or why placement is gone."""
    _sent_count: int = 0

    @property
    def gpu_count(self) -> int:
        return GPUS_PER_NODE * len(self.agents.nodes)

    @property
    def seen(self) -> Seen:
        return self.agents.seen

    async def send(self, commands: Sequence[Command]) -> float:
        """Publishes them, many at a time; when the first one left (`time.perf_counter`)."""
        limiter = anyio.CapacityLimiter(COMMANDS_IN_FLIGHT_MAX)

        async def publish(command: Command) -> None:
            async with limiter:
                await self.bus.publish_stored(
                    command_subject(TENANT, command), encode(command), id=command.command_id, traceparent=""
                )

        began_s = time.perf_counter()
        async with anyio.create_task_group() as tg:
            for command in commands:
                tg.start_soon(publish, command)
        return began_s

    def deploy(self, spec: DeploymentSpec) -> DeployRequested:
        self._sent_count += 1
        return DeployRequested(command_id=f"scale-{self._sent_count}", deployment=spec)

    def retire(self, model: str) -> RetireRequested:
        self._sent_count += 1
        return RetireRequested(command_id=f"scale-{self._sent_count}", model=model)

    async def until(self, reached: Callable[[Seen], bool], what: str) -> None:
        """Waits, as long as anything moves. Raises `Stalled`."""
        while True:
            before = self._progress()
            with anyio.move_on_after(STALL_S) as scope:
                await self.agents.until(lambda seen: bool(seen.rejection) or reached(seen))
            if self.seen.rejection:
                raise Stalled(f"{what}: a command was rejected: {self.seen.rejection}")
            if not scope.cancelled_caught:
                return
            if why := self.is_alive():
                raise Stalled(f"{what}: {why}")
            if self._progress() == before:
                raise Stalled(f"{what}: nothing moved for {STALL_S:g} s; {self.told()}")

    def _progress(self) -> tuple[int, int, int]:
        return self.seen.ready_count, self.seen.released_count, self.seen.refused_count

    def told(self) -> str:
        seen = self.seen
        return f"{seen.ready_count} ready, {seen.released_count} released, {seen.refused_count} explained"

    def placement_cpu_s(self) -> float:
        """CPU time of the placement process so far."""
        fields = Path(f"/proc/{self.placement_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def stage(folder: Path, *, node_count: int, progress: Progress) -> AsyncIterator[Stage]:
    """Everything is there, all nodes have joined and placement decides."""
    await anyio.Path(folder).mkdir(parents=True)
    async with server(folder) as started, NatsBus(started.url, name="stand-ins") as bus:
        agents = StandIns(bus, node_count)
        await agents.join()
        async with placement(folder, started.url) as process, anyio.create_task_group() as tg:
            tg.start_soon(agents.serve)

            def problem() -> str:
                return "" if process.poll() is None else f"placement ended: {_log_tail(folder)}"

            on_stage = Stage(bus, agents, process.pid, problem)
            async with progress.showing(on_stage.told):
                yield on_stage
            tg.cancel_scope.cancel()


@asynccontextmanager
async def placement(folder: Path, url: str) -> AsyncIterator["subprocess.Popen[bytes]"]:
    """The service as it is installed: `python -m services placement`, ready."""
    [port] = free_ports(1)
    environment = {
        **os.environ,
        "SUBLET_PLACEMENT_NATS_URL": url,
        "SUBLET_PLACEMENT_HEALTH_PORT": str(port),
        "SUBLET_PLACEMENT_COMPILED": "true" if IS_COMPILED else "false",
        "SUBLET_LOG_LEVEL": "WARNING",
    }
    with (folder / "placement.log").open("wb") as log:
        process = _started(environment, log)
        try:
            await _until_ready(process, port, folder)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _started(environment: Mapping[str, str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=True
    )


async def _until_ready(process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
    ends_at = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < ends_at:
            if process.poll() is not None:
                raise Stalled(f"placement ended at once: {_log_tail(folder)}")
            try:
                async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await anyio.sleep(LOOK_EVERY_S)
    raise Stalled(f"placement was not ready within {START_TIMEOUT_S:g} s: {_log_tail(folder)}")


def _log_tail(folder: Path) -> str:
    """Its errors if it told any, else its last lines."""
    lines = (folder / "placement.log").read_text(errors="replace").splitlines()
    errors = [line.strip(" |") for line in lines if re.search(r"\w(Error|Superseded|Broken): ", line)]
    return " | ".join((errors or lines)[-LOG_LINES_SHOWN:]) or "it wrote nothing"


def training(name: str, *, replica_count: int = 1, is_gang: bool = False) -> DeploymentSpec:
    """Whole GPUs for a job that anything of higher priority may displace."""
    return DeploymentSpec(
        name=name,
        kind=WorkloadKind.TRAINING,
        engine=EngineSpec(kind=EngineKind.TRAINING, weights_bytes=GiB),
        share=ShareSpec(request_portion=1.0),
        priority="low",
        swap=SwapSpec(is_parkable=False),
        replica_count=replica_count,
        placement=PlacementSpec(is_gang=is_gang),
    )


def inference(name: str) -> DeploymentSpec:
    """A whole GPU, for good, before any training."""
    return DeploymentSpec(
        name=name,
        engine=EngineSpec(weights_bytes=GiB),
        share=ShareSpec(request_portion=1.0),
        swap=SwapSpec(is_parkable=False),
    )


def fsync_floor_s(folder: Path) -> float:
    """The median time of a small write and its sync, on the disk that history lies on."""
    times_s = []
    with (folder / "floor").open("wb", buffering=0) as file:
        for _ in range(FSYNC_COUNT):
            began_s = time.perf_counter()
            file.write(b"x" * 512)
            os.fsync(file.fileno())
            times_s.append(time.perf_counter() - began_s)
    return quantile(times_s, 0.5) or 0.0

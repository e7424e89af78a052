"""A software GPU host with a holder, a memory broker where it is wanted, and the node agent's own guard over it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

import softgpu
from devices.nvml import NvmlInventory
from kit.process import free_port
from schemas.deployments import DeploymentSpec, EngineSpec, IsolationGrade, ShareSpec
from schemas.holders import EngineStart, EngineView
from schemas.nodes import GpuOffer
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB, MiB
from services.nodeagent.guard import Guard
from services.nodeagent.guard.making import guard_of
from services.nodeagent.holder_client import HolderClient, HolderProblem
from services.nodeagent.settings import NodeAgentSettings

ROOT: Final = Path(__file__).resolve().parents[1]
TOTAL_BYTES: Final = 4 * GiB
RESERVE_BYTES: Final = 256 * MiB
CONTEXT_BYTES: Final = 8 * MiB
LOOK_EVERY_S: Final = 0.02
PATIENCE_S: Final = 60.0
NOT_SUPPORTED: Final = 3
"""NVML's code."""
TAKERS: Final = 8
TAKER_BYTES: Final = 384 * MiB
OWNER_BYTES: Final = 512 * MiB
PIECE_BYTES: Final = 16 * MiB

_LOADED: list[softgpu.Host] = []


def loaded_host() -> softgpu.Host:
    """The one host of this process, made and loaded at the first call. New memory on it is dirty."""
    if not _LOADED:
        folder = Path(tempfile.mkdtemp(prefix="sublet-guard-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        host = softgpu.Host(
            folder / "host", gpus=1, profile="h100-80", phantom=True, total_bytes=TOTAL_BYTES, reserved_bytes=0,
            context_bytes=CONTEXT_BYTES, costs={},
        ).create()  # fmt: skip
        host.load()
        os.environ.update(host.environment())
        _LOADED.append(host)
    return _LOADED[0]


def remove_host() -> None:
    while _LOADED:
        host = _LOADED.pop()
        host.remove()
        shutil.rmtree(host.state_dir.parent, ignore_errors=True)


@dataclass(kw_only=True)
class Stage:
    """What a section plays on."""

    host: softgpu.Host
    holder: HolderClient
    guard: Guard
    settings: NodeAgentSettings
    offer: GpuOffer
    """With the grade that trying found."""
    started: dict[str, EngineView] = field(default_factory=dict)

    @property
    def gpu_uuid(self) -> str:
        return self.offer.gpu_uuid

    async def start(self, name: str, what: str, *more: str, granted_bytes: int, piece_bytes: int) -> EngineView:
        """One process under the guard, as the agent starts an engine: gated, held, let go."""
        replica = self.replica(name, granted_bytes)
        numbers = ("--gpu", self.gpu_uuid, "--piece-bytes", str(piece_bytes), *more)
        environment = {**self.host.environment(), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        wish = EngineStart(
            replica_id=name,
            lease_epoch=1,
            arguments=(sys.executable, "-m", "benchmarks.guard_greedy", what, *numbers),
            environment=environment | self.guard.environment(replica, lease_epoch=1),
            gpu_uuids=(self.gpu_uuid,),
        )
        view = await self.holder.start(wish)
        await self.guard.hold(replica, view, (granted_bytes,))
        await self.holder.open_gate(name, lease_epoch=1)
        self.started[name] = view
        return view

    async def hold(self, name: str, granted_bytes: int) -> None:
        """Another grant for it."""
        await self.guard.hold(self.replica(name, granted_bytes), self.started[name], (granted_bytes,))

    def replica(self, name: str, size_bytes: int) -> ReplicaProposal:
        share = ShareProposal(
            replica_id=name, shard_index=0, gpu_uuid=self.gpu_uuid, request_bytes=size_bytes, limit_bytes=size_bytes
        )
        spec = DeploymentSpec(
            name="greedy", engine=EngineSpec(weights_bytes=0), share=ShareSpec(request_bytes=size_bytes)
        )
        return ReplicaProposal(replica_id=name, deployment_id=name, tenant=name, deployment=spec, shares=(share,))

    def go(self, name: str) -> None:
        os.kill(self.started[name].pid, signal.SIGUSR2)

    def rest(self, name: str) -> None:
        """It gives all back."""
        os.kill(self.started[name].pid, signal.SIGUSR1)

    async def told(self, name: str) -> dict[str, Any]:
        """What it said last, when it has ended."""
        view = await self.holder.wait_for_exit(name, lease_epoch=1, timeout_s=PATIENCE_S)
        lines = (await anyio.Path(view.log_path).read_text()).splitlines()
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer

    def direct_bytes(self) -> dict[str, int]:
        """What each process holds by the driver's account, by name; those that hold nothing are left out."""
        used = {process["pid"]: process["used_bytes"] for process in self.host.status()["devices"][0]["processes"]}
        return {name: used[view.pid] for name, view in self.started.items() if view.pid in used}

    async def lent_bytes(self) -> dict[str, int]:
        """What the memory broker has lent each, by name."""
        view = await self.guard.accounts.look() if self.guard.accounts is not None else None
        accounts = view.accounts if view is not None else ()
        return {account.replica_id: account.held_bytes.get(self.gpu_uuid, 0) for account in accounts}

    async def held_bytes(self) -> dict[str, int]:
        direct, lent = await anyio.to_thread.run_sync(self.direct_bytes), await self.lent_bytes()
        return {name: direct.get(name, 0) + lent.get(name, 0) for name in self.started}

    async def is_up(self, name: str) -> None:
        """It has a context and has begun. Raises `TimeoutError`."""
        path = anyio.Path(self.started[name].log_path)
        with anyio.fail_after(PATIENCE_S):
            while "up" not in (await path.read_text()).splitlines():  # noqa: ASYNC110  (another process)
                await anyio.sleep(LOOK_EVERY_S)

    async def end(self) -> None:
        """Of all processes."""
        for name, view in self.started.items():
            with contextlib.suppress(HolderProblem):
                await self.holder.stop(name, lease_epoch=1, grace_s=0.0)
                await self.guard.lift(self.replica(name, 0), view)
                await self.holder.forget(name, lease_epoch=1)
        self.started.clear()


@contextlib.asynccontextmanager
async def stage(
    folder: Path, *, grade: IsolationGrade, broker_piece_bytes: int = PIECE_BYTES, **more: object
) -> AsyncIterator[Stage]:
    """A host on which trying finds that grade; raises `AssertionError` when it finds another."""
    host = loaded_host()
    if grade is not IsolationGrade.DRIVER:
        host.set_fault("nvmlDeviceGetMemoryLimits_v1", times=-1, code=NOT_SUPPORTED)
    has_broker = grade is IsolationGrade.BROKER
    with contextlib.ExitStack() as processes:
        socket = processes.enter_context(_holder(folder, host))
        sockets = processes.enter_context(_broker(folder, host, broker_piece_bytes)) if has_broker else {}
        given = {
            "holder_socket": socket, "state_dir": str(folder / "agent"), "reserve_bytes": RESERVE_BYTES,
            "is_trusting_engines": grade is not IsolationGrade.WATCHED, **sockets, **more,
        }  # fmt: skip
        settings = NodeAgentSettings(**given)  # type: ignore[arg-type]
        holder, inventory = HolderClient(socket), NvmlInventory()
        guard = guard_of(settings, inventory, holder)
        try:
            offers = await _offers(guard, grade)
            made = Stage(host=host, holder=holder, guard=guard, settings=settings, offer=offers[0])
            try:
                yield made
            finally:
                with anyio.CancelScope(shield=True):
                    await made.end()
        finally:
            await holder.close()
            inventory.close()
            host.clear_faults()


async def _offers(guard: Guard, grade: IsolationGrade) -> tuple[GpuOffer, ...]:
    """Until the memory broker has filled its pool."""
    offers: tuple[GpuOffer, ...] = ()
    with anyio.move_on_after(PATIENCE_S):
        while not offers or offers[0].grade is not grade:
            offers = await guard.offers(our_pids=frozenset())
            if grade is not IsolationGrade.BROKER:
                break
    assert offers, "no GPU"
    assert offers[0].grade is grade, offers[0].grade_reason
    return offers


@contextlib.contextmanager
def _holder(folder: Path, host: softgpu.Host) -> Iterator[str]:
    variables = {
        "SUBLET_HOLDER_STATE_DIR": str(folder / "holder"), "SUBLET_HOLDER_PORT": str(free_port()),
        "SUBLET_HOLDER_HAS_BROKER": "false", "SUBLET_HOLDER_STOP_GRACE_S": "1",
    }  # fmt: skip
    with _service("holder", host, variables, [folder / "holder" / "holder.sock"], folder):
        yield str(folder / "holder" / "holder.sock")


@contextlib.contextmanager
def _broker(folder: Path, host: softgpu.Host, piece_bytes: int) -> Iterator[dict[str, str]]:
    """One that holds the whole GPU but the reserve."""
    state_dir = folder / "broker"
    variables = {
        "SUBLET_BROKER_STATE_DIR": str(state_dir), "SUBLET_BROKER_HOLD": "all",
        "SUBLET_BROKER_RESERVE_BYTES": str(RESERVE_BYTES - CONTEXT_BYTES),
        "SUBLET_BROKER_HOST_BUDGET_BYTES": str(64 * MiB), "SUBLET_BROKER_BLOCK_BYTES": str(64 * MiB),
        "SUBLET_BROKER_PIECE_BYTES_MAX": str(piece_bytes),
        "SUBLET_BROKER_ARENA_DIR": str(folder / "arena"),
    }  # fmt: skip
    sockets = {"broker_socket": state_dir / "control.sock", "broker_engine_socket": state_dir / "engines.sock"}
    with _service("broker", host, variables, list(sockets.values()), folder):
        yield {name: str(path) for name, path in sockets.items()}


@contextlib.contextmanager
def _service(
    name: str, host: softgpu.Host, variables: dict[str, str], sockets: Sequence[Path], folder: Path
) -> Iterator[None]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **host.environment(), **variables}
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services", name], env=environment, stdout=log, stderr=log, cwd=folder
        )
        try:
            _wait_for(sockets, process)
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_for(sockets: Sequence[Path], process: "subprocess.Popen[bytes]") -> None:
    import time

    ends_s = time.monotonic() + PATIENCE_S
    while not all(path.exists() for path in sockets):
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        assert time.monotonic() < ends_s, "it does not come up"
        time.sleep(LOOK_EVERY_S)

"""Every service of Sublet on this host, each a supervised process, with its own NATS and, without a GPU, software ones.

    async with running(StackSettings(state_dir=Path(".sublet"))) as stack:
        ...                                     # clients find it by stack.context_path
        stack.kill("nodeagent")                 # as a crash would; it is started again
        await stack.until_ready()

Nothing outlives the process that runs it, however that one ends.
"""

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

import softgpu
from kit.supervisor import Backoff, EventKind, Interrupted, ProcessEvent, ReadyCheck, Supervisor, holds, supervise
from services.local.access import publish_key, write_context
from services.local.parts import GATEWAY, PARTS, Plan, process_specs
from services.local.settings import StackSettings
from services.local.state import StackError, StateFolder, choose_ports, write_private

READY_TIMEOUT_S: Final = 60.0
RESTART_FIRST_S: Final = 0.05
SOFTWARE_LABEL: Final = "software GPU"
REAL_LABEL: Final = "real GPU"


class LocalStack:
    """A running stack. Made by `running`."""

    def __init__(self, plan: Plan, *, label: str, api_key: str) -> None:
        self.settings = plan.settings
        self.folder = plan.folder
        self.ports = dict(plan.ports)
        self.nats_url = plan.nats_url
        self.gateway_url = f"http://127.0.0.1:{plan.ports[GATEWAY]}"
        self.label = label
        """``software GPU`` or ``real GPU``; belongs beside every figure."""
        self.api_key = api_key
        self.restart_counts: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.pids: dict[str, int] = {}
        """Of the parts that run now."""
        self.supervisor: Supervisor | None = None
        self.checks: dict[str, ReadyCheck] = {}

    @property
    def context_path(self) -> Path:
        """What ``sublet`` reads, by ``SUBLET_CONTEXT``."""
        return self.folder.context

    @property
    def signal_received(self) -> int | None:
        """The signal that ended it."""
        return self.supervisor.signal_received if self.supervisor else None

    def kill(self, name: str) -> int:
        """SIGKILL, as a crash would; it is started again. The pid that it had."""
        pid = self.supervisor.pid(name) if self.supervisor else None
        if pid is None:
            raise StackError(f"{name} is not running")
        os.kill(pid, signal.SIGKILL)
        return pid

    async def until_ready(self, *names: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when these (all, when none is named) run and are ready. Raises `StackError`."""
        waiting = list(names or PARTS)
        with anyio.move_on_after(timeout_s):
            while waiting:
                if await holds(self.checks[waiting[0]]):
                    waiting.pop(0)
                else:
                    await anyio.sleep(0.05)
        if waiting:
            raise StackError(f"not ready after {timeout_s:g} s: {', '.join(waiting)}; logs are in {self.folder.logs}")

    def note(self, event: ProcessEvent) -> None:
        """Keep the file that tells others which processes run now."""
        if event.kind is EventKind.DIED:
            self.pids.pop(event.name, None)
        elif event.kind is not EventKind.GAVE_UP:
            self.pids[event.name] = event.pid
        if event.kind is EventKind.RESTARTED:
            self.restart_counts[event.name] += 1
        write_private(self.folder.processes, {"supervisor": os.getpid(), **self.pids})


@asynccontextmanager
async def running(
    settings: StackSettings, *, on_event: Callable[[ProcessEvent], None] = lambda _: None
) -> AsyncIterator[LocalStack]:
    """A stack for the length of the block. Call it from the main thread.

    Raises `StackError`, or `NotReady` and `Interrupted` of `kit.supervisor`. On a signal the block is cancelled and
    ends without an exception; `signal_received` says so.
    """
    folder = StateFolder(settings.state_dir.resolve())
    has_started = False
    with folder.locked():
        folder.make()
        folder.remove_leftovers()
        try:
            stack, plan = await _prepared(settings, folder)
            specs = process_specs(plan)
            stack.checks = {spec.name: spec.depends_on_ready for spec in specs if spec.depends_on_ready is not None}

            def note(event: ProcessEvent) -> None:
                stack.note(event)
                on_event(event)

            async with supervise(
                specs,
                on_event=note,
                ready_timeout_s=READY_TIMEOUT_S,
                backoff=Backoff(first_s=RESTART_FIRST_S, longest_s=settings.restart_longest_s),
                handles_signals=settings.handles_signals,
            ) as supervisor:
                stack.supervisor = supervisor
                await publish_key(folder, nats_url=stack.nats_url, tenant=settings.tenant, api_key=stack.api_key)
                has_started = True
                yield stack
            if stack.signal_received is not None and not has_started:
                raise Interrupted(stack.signal_received)
        finally:
            folder.processes.unlink(missing_ok=True)
            folder.remove_runtime()


async def _prepared(settings: StackSettings, folder: StateFolder) -> tuple[LocalStack, Plan]:
    ports = choose_ports(folder, PARTS, gateway_port=settings.gateway_port)
    is_software = settings.uses_software_gpu
    if is_software is None:
        is_software = not await anyio.Path("/dev/nvidiactl").exists()
    gpu_environment = await anyio.to_thread.run_sync(_software_gpus, settings, folder) if is_software else {}
    label = SOFTWARE_LABEL if is_software else REAL_LABEL
    plan = Plan(settings=settings, folder=folder, ports=ports, gpu_environment=gpu_environment)
    api_key = write_context(
        folder, nats_url=plan.nats_url, gateway_port=ports[GATEWAY], tenant=settings.tenant, label=label
    )
    return LocalStack(plan, label=label, api_key=api_key), plan


def _software_gpus(settings: StackSettings, folder: StateFolder) -> dict[str, str]:
    """Fresh ones: what a killed stack left behind is nobody's, because the state folder is ours now."""
    host = softgpu.Host(
        folder.runtime / "gpu", gpus=settings.gpu_count, profile=settings.profile, phantom=True, seed=settings.node
    )
    try:
        host.remove()
        return host.create().environment()
    except softgpu.SoftgpuError as error:
        raise StackError(f"the software GPU cannot be made: {error}") from error

"""What goes wrong in a soak: parts that die, and driver calls that fail, come late or damage what they copy."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

import softgpu
from services.local.stack import LocalStack
from services.nodeagent.holder_client import HolderClient, HolderProblem

AGENT_EVERY_S: Final = 12.0
"""The supervisor waits longer and longer before it restarts what dies within 10 s of its start."""
ENGINE_EVERY_S: Final = 9.0
BROKER_EVERY_S: Final = 25.0
FAULT_EVERY_S: Final = 2.0
FAULTS_STAY_S: Final = 1.0
"""Then those that were not met are taken back, so that no hang and no lie lasts for ever."""
FUNCTIONS: Final = (
    "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease", "cuMemAddressReserve", "cuMemHostAlloc",
    "cuMemHostRegister", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyHtoD", "cuMemcpyDtoH",
    "cuStreamSynchronize",
    "cuEventRecord", "cuEventQuery", "cuCtxSetCurrent", "cuMemGetInfo", "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetComputeRunningProcesses",
)  # fmt: skip
"""Those that engines, the memory broker and the agent call; what softgpu does not model is left out when it says so."""
COPIES: Final = frozenset({"cuMemcpyHtoDAsync", "cuMemcpyHtoD"})
UNKNOWN: Final = 999
"""CUDA_ERROR_UNKNOWN, and NVML's."""


class Chaos:
    """Seeded: which part, which call, how; the moments depend on the host's speed too."""

    def __init__(self, stack: LocalStack, *, seed: int) -> None:
        self._stack = stack
        self._draw = random.Random(f"{seed}/chaos")
        self.host = softgpu.Host(stack.folder.runtime / "gpu", gpus=0)
        self.counts: Counter[str] = Counter()
        self.functions: set[str] = set()
        self._is_over = False

    @property
    def told(self) -> str:
        return "  ".join(f"{what} {count}" for what, count in sorted(self.counts.items()))

    async def run(self) -> None:
        """Until it is cancelled."""
        now_s = time.monotonic()
        due_s = {
            "nodeagent": now_s + AGENT_EVERY_S,
            "engine": now_s + ENGINE_EVERY_S,
            "broker": now_s + BROKER_EVERY_S,
            "fault": now_s + FAULT_EVERY_S,
        }
        every_s = {"nodeagent": AGENT_EVERY_S, "engine": ENGINE_EVERY_S, "broker": BROKER_EVERY_S}
        while True:
            what = min(due_s, key=lambda name: due_s[name])
            await anyio.sleep(max(0.0, due_s[what] - time.monotonic()))
            if self._is_over:
                return
            if what == "fault":
                await self._fault()
            elif await self._kill(what):
                self.counts[what] += 1
            due_s[what] = time.monotonic() + every_s.get(what, FAULT_EVERY_S) * self._draw.uniform(0.9, 1.3)

    def stop(self) -> None:
        self._is_over = True

    async def end(self) -> None:
        await anyio.to_thread.run_sync(self.host.clear_faults)

    async def _kill(self, what: str) -> bool:
        pid = await self._pid(what)
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    async def _pid(self, what: str) -> int | None:
        if what == "nodeagent":
            return self._stack.pids.get(what)
        if what == "broker":
            return broker_pid(self._stack.pids.get("holder"))
        holder = HolderClient(str(self._stack.folder.runtime / "holder.sock"))
        try:
            engines = [engine.pid for engine in (await holder.view()).engines if engine.is_alive]
        except HolderProblem:
            return None
        finally:
            await holder.close()
        return self._draw.choice(sorted(engines)) if engines else None

    async def _fault(self) -> None:
        """One call of one function in the near future, in whatever process meets it."""
        await anyio.to_thread.run_sync(self.host.clear_faults)
        function, after = self._draw.choice(FUNCTIONS), self._draw.randrange(20)
        kind = self._draw.choice(("code", "code", "delay", "corrupt" if function in COPIES else "code"))
        try:
            await anyio.to_thread.run_sync(lambda: self._set(function, after=after, kind=kind))
        except softgpu.SoftgpuError:
            return  # It does not model this call in this way.
        self.counts["fault"] += 1
        self.functions.add(function)

    def _set(self, function: str, *, after: int, kind: str) -> None:
        match kind:
            case "code":
                self.host.set_fault(function, after=after, code=UNKNOWN)
            case "delay":
                self.host.set_fault(function, after=after, times=5, kind="delay", delay_s=FAULTS_STAY_S)
            case _:
                self.host.set_fault(function, after=after, kind=kind)


def broker_pid(holder_pid: int | None) -> int | None:
    """The holder's child that is the memory broker."""
    children = Path(f"/proc/{holder_pid}/task/{holder_pid}/children")
    try:
        pids = [int(word) for word in children.read_text().split()]
        return next((pid for pid in pids if b"services\0broker" in Path(f"/proc/{pid}/cmdline").read_bytes()), None)
    except OSError:
        return None

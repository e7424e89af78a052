"""The live proof of a grade: a process that obeys nobody tries to take more than it may, and must be refused.

It runs as engines do: started by the holder, behind the gate, in a leaf or a declared group of its own.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import anyio
import anyio.to_thread
import msgspec

from devices.api import GpuDescription
from schemas.deployments import IsolationGrade
from schemas.holders import EngineStart, EngineView
from schemas.units import GiB, MiB
from services.nodeagent.guard.api import Verdict
from services.nodeagent.holder_client import HolderClient, HolderProblem
from services.nodeagent.reconciling import PROBE_PREFIX

log = logging.getLogger("nodeagent")

LIMIT_BYTES_MAX: Final = 1 * GiB
"""Enough for a context and a little more on every GPU, and half of the reserve: it disturbs nobody."""
WITHIN_BYTES_MAX: Final = 32 * MiB
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

Outcome = Literal["granted", "refused", "untried"]
Step = Callable[[str], Awaitable[None]]
"""Called with the group of the process that will try."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What the process could allocate; see `devices.probe`."""

    context: Outcome = "untried"
    within: Outcome = "untried"
    beyond: Outcome = "untried"
    context_bytes: int | None = None
    shown_bytes: int | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How a probe is started: the interpreter and the environment that engines get too."""

    python: str
    environment: Mapping[str, str]
    deadline_s: float


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What was proven, and of what: another driver or another boot is another subject."""

    subject: str
    reason: str
    context_bytes: int | None


def limits_to_try(free_bytes: int) -> tuple[int, int, int]:
    """(limit, what should do within it, what should be refused), all to be had if there were no limit."""
    limit_bytes = min(LIMIT_BYTES_MAX, free_bytes // 2)
    return limit_bytes, max(MiB, min(WITHIN_BYTES_MAX, limit_bytes // 8)), limit_bytes


class Proof:
    """Carries attempts out and remembers what they proved: for this driver, until this machine boots again."""

    def __init__(self, holder: HolderClient, program: Program, *, kept: Path) -> None:
        self._holder = holder
        self._program = program
        self._kept = kept
        self._lock = anyio.Lock()

    async def of(
        self, gpu: GpuDescription, *, backend: IsolationGrade, attempt: Callable[[GpuDescription], Awaitable[Verdict]]
    ) -> Verdict:
        """As it was proven before, or by an attempt now. What was not proven is tried again each time."""
        key = f"{gpu.uuid} {backend}"
        subject = f"{gpu.driver_version} {_boot_id()}"
        async with self._lock:  # One after the other: two at once could need more than is free.
            kept = _read(self._kept)
            if key in kept and kept[key].subject == subject:
                return Verdict(is_proven=True, reason=kept[key].reason, context_bytes=kept[key].context_bytes)
            verdict = await attempt(gpu)
            kept.pop(key, None)
            if verdict.is_proven:
                kept[key] = _Kept(subject=subject, reason=verdict.reason, context_bytes=verdict.context_bytes)
            _write(self._kept, kept)
        log.info(
            "grade tried",
            extra={"gpu": gpu.uuid, "grade": backend, "is_proven": verdict.is_proven, "reason": verdict.reason},
        )
        return verdict

    def forget(self) -> None:
        """Everything is tried again when it is next asked for."""
        _write(self._kept, {})

    async def attempt(
        self,
        gpu: GpuDescription,
        *,
        within_bytes: int,
        beyond_bytes: int,
        before: Step | None = None,
        after: Step | None = None,
    ) -> Attempt:
        """Start the process, call `before` while it waits at its gate, let it try, call `after` when it is gone."""
        replica_id = f"{PROBE_PREFIX}{gpu.index}"
        epoch = time.time_ns() // 1_000_000
        numbers = ("--gpu", gpu.uuid, "--within", str(within_bytes), "--beyond", str(beyond_bytes))
        wish = EngineStart(
            replica_id=replica_id,
            lease_epoch=epoch,
            arguments=(self._program.python, "-m", "devices", "probe", *numbers),
            environment=dict(self._program.environment),
            gpu_uuids=(gpu.uuid,),
        )
        try:
            await self._end_older(replica_id)
            view = await self._holder.start(wish)
            try:
                return await self._tried(view, before)
            finally:
                with anyio.CancelScope(shield=True):
                    await self._holder.stop(replica_id, lease_epoch=epoch, grace_s=0.0)
                    if after is not None:
                        await after(view.namespace)
                    await self._holder.forget(replica_id, lease_epoch=epoch)
        except HolderProblem as problem:
            return Attempt(failure=f"the holder: {problem}")

    async def _end_older(self, replica_id: str) -> None:
        """One whose agent died in the middle."""
        older = await self._holder.engine(replica_id)
        if older is not None:
            await self._holder.stop(replica_id, lease_epoch=older.lease_epoch, grace_s=0.0)
            await self._holder.forget(replica_id, lease_epoch=older.lease_epoch)

    async def _tried(self, view: EngineView, before: Step | None) -> Attempt:
        if before is not None:
            await before(view.namespace)
        await self._holder.open_gate(view.replica_id, lease_epoch=view.lease_epoch)
        ended = await self._holder.wait_for_exit(
            view.replica_id, lease_epoch=view.lease_epoch, timeout_s=self._program.deadline_s
        )
        if ended.is_alive:
            return Attempt(failure=f"it did not end within {self._program.deadline_s:.0f} s")
        said = await anyio.to_thread.run_sync(_last_line, Path(ended.log_path))
        try:
            return msgspec.json.decode(said, type=Attempt)
        except msgspec.MsgspecError:
            return Attempt(failure=f"it ended with code {ended.exit_code}: {said[:200] or 'and said nothing'}")


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return str(error)
    return next((line for line in reversed(lines) if line.strip()), "")


def _boot_id() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


def _read(path: Path) -> dict[str, _Kept]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, _Kept])
    except (OSError, msgspec.MsgspecError):
        return {}


def _write(path: Path, kept: Mapping[str, _Kept]) -> None:
    """Losing it costs an attempt, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(kept, order="sorted"))
        new.replace(path)
    except OSError as error:
        log.warning("proofs are not kept", extra={"path": str(path), "reason": str(error)})

"""The driver that the engine knows nothing of: the CUDA driver freezes its processes and takes their memory away.

Lock all, save all, and on the way back load all, unlock all last; never one call that could find too little memory: a
process whose return fails stays away for ever.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from schemas.deployments import SwapDriver
from schemas.holders import EngineView
from services.nodeagent.mover import wire
from services.nodeagent.mover.checkpointer_client import CheckpointerClient, CheckpointProblem
from services.nodeagent.mover.driver import (
    Broken,
    Parked,
    Standing,
    StillParked,
    StillResident,
    Support,
    SwapTarget,
    Woken,
)
from services.nodeagent.mover.kept_support import KeptSupport
from services.nodeagent.mover.processes import pids_of

QUICK_S: Final = 10.0
PREPARE_BYTES_PER_S: Final = 1e9
"""Host memory that is taken for the first time: pages are made and pinned, slower than anything that follows."""
PLAIN_BYTES_PER_S: Final = 3e8
"""The slowest that the driver's own copies were seen: 63 GB in 157 s at the first time."""
CUSTOM_LINK_FRACTION: Final = 0.9
PLAIN_LINK_FRACTION: Final = 0.13
FREE_POLL_S: Final = 0.02
FREE_DEADLINE_S: Final = 5.0
"""The driver's account follows an unmap within milliseconds; longer means that the bytes are not free."""
ROUNDS_MAX: Final = 3
"""Processes that come up while the others are being locked are looked for so often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """Where the engine's CUDA processes stand now."""

    states: Mapping[int, str]
    away_bytes: Mapping[str, int]
    free_bytes: Mapping[str, int]

    def pids(self, *states: str) -> list[int]:
        return [pid for pid, state in self.states.items() if state in states]


class Checkpoint:
    """Over one checkpointer."""

    name = SwapDriver.CHECKPOINT
    is_wake_repeatable = False
    """A restore that went wrong leaves the process neither here nor there."""
    residue_bytes = 0

    def __init__(
        self,
        client: CheckpointerClient,
        *,
        lock_timeout_s: float,
        members: Callable[[EngineView], Collection[int]] = pids_of,
        kept: KeptSupport | None = None,
    ) -> None:
        """`members`: the processes that an engine consists of."""
        self._client = client
        self._lock_timeout_s = lock_timeout_s
        self._members = members
        self._kept = kept
        self._is_ours = True  # Until the checkpointer says that its driver keeps the images itself.

    async def support(self, gpu_uuids: Collection[str]) -> dict[str, Support]:
        """As the driver said earlier in this boot, while no checkpointer runs to be asked."""
        known = self._kept.read() if self._kept is not None and not self._client.pids else None
        try:
            told = known or await self.asked()
        except CheckpointProblem as problem:
            return dict.fromkeys(gpu_uuids, Support(is_supported=False, reason=str(problem)))
        self._is_ours = told.has_custom_storage
        found = dict.fromkeys(gpu_uuids, Support(is_supported=told.is_supported, reason=told.reason))
        no_mig = Support(is_supported=False, reason="a part of a GPU (MIG) cannot be checkpointed")
        return found | {gpu_uuid: no_mig for gpu_uuid in gpu_uuids if gpu_uuid.startswith("MIG-")}

    async def asked(self) -> wire.Supported:
        """The driver's word of now. Raises `CheckpointProblem`."""
        told = await self._client.ask(wire.Supports(), wire.Supported, timeout_s=QUICK_S)
        if self._kept is not None:
            self._kept.write(told)
        return told

    def estimate_s(self, size_bytes: int, *, link_bytes_per_s: float) -> float:
        fraction = CUSTOM_LINK_FRACTION if self._is_ours else PLAIN_LINK_FRACTION
        return size_bytes / (fraction * link_bytes_per_s)

    async def prepare(self, target: SwapTarget) -> None:
        await self._prepare(target, await self._look(target))

    # -- there

    async def park(self, target: SwapTarget) -> Parked:
        """Its memory is taken for it before any of its processes is touched, so that a host without room harms none."""
        look = await self._look(target)
        locked: set[int] = set()
        for _ in range(ROUNDS_MAX):
            fresh = look.pids("running")
            if not fresh:
                break
            await self._prepare(target, look)
            await self._lock(target, fresh, locked)
            look = await self._look(target)
        sizes = await self._save(target, look)
        return Parked(copied_bytes=sum(sizes), host_bytes=sum(sizes) + sum(look.away_bytes.values()))

    async def _prepare(self, target: SwapTarget, look: _Look) -> None:
        question = wire.Prepare(image=_image(target), pids=tuple(look.pids("running", "locked")))
        size_bytes = sum(share.limit_bytes for share in target.replica.shares)
        try:
            await self._client.ask(question, wire.Done, timeout_s=QUICK_S + size_bytes / PREPARE_BYTES_PER_S)
        except CheckpointProblem as problem:
            raise StillResident(f"no host memory for its image: {problem}") from problem

    async def _lock(self, target: SwapTarget, pids: Collection[int], locked: set[int]) -> None:
        """All of them, or those that were locked go on. A lock waits for running work, at most so long."""
        problems: list[str] = []

        async def lock(pid: int) -> None:
            question = wire.Lock(pid=pid, timeout_s=self._lock_timeout_s)
            try:
                await self._client.ask(question, wire.Done, timeout_s=self._lock_timeout_s + QUICK_S)
                locked.add(pid)
            except CheckpointProblem as problem:
                problems.append(f"pid {pid}: {problem}")

        async with anyio.create_task_group() as tg:
            for pid in pids:
                tg.start_soon(lock, pid)
        if problems:
            await self._unlock(locked)
            raise StillResident(f"it could not be locked: {'; '.join(problems)}")

    async def _save(self, target: SwapTarget, look: _Look) -> list[int]:
        """The sizes. When one of several cannot be saved, those that were come back, and all go on."""
        image = _image(target)
        sizes, problems = await self._moved(target, [wire.Save(image=image, pid=pid) for pid in look.pids("locked")])
        if problems:
            reason = f"it could not be saved: {'; '.join(problems)}"
            await self._come_back(target, reason)
            raise StillResident(reason)
        if not look.states:
            raise Broken("none of its processes uses a GPU")
        return sizes

    async def _come_back(self, target: SwapTarget, reason: str) -> None:
        """After half a park: its bytes are still its own, so that all of it fits."""
        try:
            await self._load(target, await self._look(target))
            await self._unlock((await self._look(target)).pids("locked"))
        except (Broken, StillParked) as error:
            raise Broken(f"{reason}; it did not come back: {error}") from error

    # -- and back

    async def wake(self, target: SwapTarget) -> Woken:
        look = await self._free(target)
        began_s = time.monotonic()
        sizes = await self._load(target, look)
        loaded_s = time.monotonic()
        await self._unlock((await self._look(target)).pids("locked"))
        # The driver maps before it lets us copy, and does not tell how long that took.
        return Woken(copied_bytes=sum(sizes), copy_s=loaded_s - began_s)

    async def _free(self, target: SwapTarget) -> _Look:
        """As it stands, once every GPU has what it will take. Raises `StillParked` with nothing touched."""
        look = await self._look(target)
        with anyio.move_on_after(FREE_DEADLINE_S):
            while _short_bytes(look) > 0:
                await anyio.sleep(FREE_POLL_S)
                look = await self._look(target)
        short_bytes = _short_bytes(look)
        if short_bytes > 0:
            raise StillParked(f"its GPU lacks {short_bytes} bytes, so nothing was begun", short_by_bytes=short_bytes)
        return look

    async def _load(self, target: SwapTarget, look: _Look) -> list[int]:
        image = _image(target)
        sizes, problems = await self._moved(
            target, [wire.Load(image=image, pid=pid) for pid in look.pids("checkpointed")]
        )
        if problems:
            raise Broken(f"its memory did not come back: {'; '.join(problems)}")
        return sizes

    async def _moved(
        self, target: SwapTarget, questions: Sequence[wire.Save | wire.Load]
    ) -> tuple[list[int], list[str]]:
        """All processes at once, to the end of each: the sizes, and what went wrong."""
        sizes: list[int] = []
        problems: list[str] = []

        async def move(question: wire.Save | wire.Load) -> None:
            try:
                moved = await self._client.ask(question, wire.Moved, timeout_s=self._copy_s(target))
                sizes.append(moved.size_bytes)
            except CheckpointProblem as problem:
                problems.append(f"pid {question.pid}: {problem}")

        async with anyio.create_task_group() as tg:
            for question in questions:
                tg.start_soon(move, question)
        return sizes, problems

    async def _unlock(self, pids: Collection[int]) -> None:
        for pid in sorted(pids):
            try:
                await self._client.ask(wire.Unlock(pid=pid), wire.Done, timeout_s=QUICK_S)
            except CheckpointProblem as problem:
                raise Broken(f"pid {pid} could not be unlocked: {problem}") from problem

    # -- looking

    async def standing(self, target: SwapTarget) -> Standing:
        states = set((await self._look(target)).states.values())
        if states == {"running"}:
            return Standing.RESIDENT
        if states == {"checkpointed"}:
            return Standing.PARKED
        if not states:
            raise Broken("none of its processes uses a GPU")
        return Standing.BETWEEN

    async def forget(self, target: SwapTarget) -> None:
        if not self._client.pids:
            return
        try:
            await self._client.ask(wire.Drop(image=_image(target)), wire.Done, timeout_s=QUICK_S)
        except CheckpointProblem:
            return  # A new one drops what belongs to no process when it starts.

    async def _look(self, target: SwapTarget) -> _Look:
        question = wire.States(image=_image(target), pids=tuple(self._members(target.engine)))
        try:
            told = await self._client.ask(question, wire.Told, timeout_s=QUICK_S)
        except CheckpointProblem as problem:
            raise Broken(f"nobody knows how it stands: {problem}") from problem
        if "failed" in told.states.values():
            raise Broken("the driver has given it up")
        return _Look(states=told.states, away_bytes=told.away_bytes, free_bytes=told.free_bytes)

    def _copy_s(self, target: SwapTarget) -> float:
        if self._is_ours:
            return target.timeout_s
        return target.timeout_s + sum(share.limit_bytes for share in target.replica.shares) / PLAIN_BYTES_PER_S


def _image(target: SwapTarget) -> str:
    return f"{target.replica.replica_id}.{target.lease_epoch}"


def _short_bytes(look: _Look) -> int:
    """On the GPU that lacks most; 0 or less when all have room."""
    short = [size - look.free_bytes.get(gpu_uuid, 0) for gpu_uuid, size in look.away_bytes.items()]
    return max(short, default=0)

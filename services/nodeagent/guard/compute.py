"""How the engines of this host share a GPU's processors: time slices, which is what a GPU does, or MPS."""

import logging
from collections.abc import Collection
from pathlib import Path

from schemas.deployments import ComputeSharing, ShareSpec
from services.nodeagent.guard.api import NotEnforced
from services.nodeagent.guard.mps import PERCENTAGE_VARIABLE, PIPE_DEFAULT, MpsControl, MpsProblem

log = logging.getLogger("nodeagent")


class Compute:
    """One for all GPUs of a host: MPS's daemon serves all of them. `control` None: MPS is not wanted here."""

    def __init__(self, control: MpsControl | None, *, stranger: MpsControl | None = None) -> None:
        self._control = control
        self._stranger = stranger
        """The daemon that engines would find by themselves, when it is not ours."""
        self._is_mps = False
        self._reason = "not asked for yet"

    async def prove(self) -> tuple[ComputeSharing, str]:
        """What is so now, with why; starts the daemon when it is wanted and does not answer."""
        if self._control is None:
            self._is_mps, self._reason = False, "MPS is switched off on this node" + await self._warning()
        else:
            try:
                if not await self._control.is_running():
                    await self._control.start()
                await self._control.servers()
                self._is_mps, self._reason = True, f"an MPS daemon answers at {self._control.pipe_dir}"
            except MpsProblem as problem:
                self._is_mps, self._reason = False, f"MPS is wanted and does not run: {problem}"
        return (ComputeSharing.MPS if self._is_mps else ComputeSharing.TIME_SLICED), self._reason

    async def _warning(self) -> str:
        if self._stranger is not None and await self._stranger.is_running():
            return f"; a daemon that is not ours answers at {self._stranger.pipe_dir}, and engines would find it"
        return ""

    def environment(self, share: ShareSpec) -> dict[str, str]:
        """What makes an engine a client, with its ceiling in whole percents, at least one."""
        if not self._is_mps or self._control is None:
            return {}
        variables = self._control.variables()
        if share.compute_portion is not None:
            variables[PERCENTAGE_VARIABLE] = str(max(1, int(share.compute_portion * 100)))
        return variables

    async def verify(self, pids: Collection[int]) -> None:
        """One of the engine's processes is a client of our daemon. Raises `NotEnforced`.

        An engine that is none runs, with the whole GPU and no ceiling, and says nothing about it.
        """
        if not self._is_mps or self._control is None:
            return
        try:
            clients = await self._control.clients()
        except MpsProblem as problem:
            raise NotEnforced(f"MPS does not answer: {problem}") from problem
        if not clients.keys() & set(pids):
            raise NotEnforced(
                f"the engine is no client of the MPS daemon at {self._control.pipe_dir}: is another pipe directory set?"
            )

    async def server_pids(self) -> list[int]:
        """Of our daemon's servers, which have memory of their own on each GPU; none while it does not answer."""
        if not self._is_mps or self._control is None:
            return []
        try:
            return await self._control.servers()
        except MpsProblem as problem:
            log.warning("MPS does not answer", extra={"reason": str(problem)})
            return []

    async def drain(self, pids: Collection[int]) -> None:
        """Before any signal: take an engine's processes off the GPU in an orderly way.

        A client that is killed with work under way leaves that work behind, and its neighbours on the GPU fail.
        """
        if not self._is_mps or self._control is None:
            return
        try:
            clients = await self._control.clients()
            for pid in sorted(clients.keys() & set(pids)):
                await self._control.terminate(pid, server=clients[pid])
        except MpsProblem as problem:
            log.warning("MPS clients not drained", extra={"reason": str(problem)})


def compute_of(setting: ComputeSharing, *, program: str, pipe_dir: Path) -> Compute:
    """As the settings wish it."""
    stranger = MpsControl(program, pipe_dir=Path(PIPE_DEFAULT))
    if setting is ComputeSharing.MPS:
        return Compute(MpsControl(program, pipe_dir=pipe_dir), stranger=stranger)
    return Compute(None, stranger=stranger)

"""NVIDIA's MPS control program: a daemon of this host, told what to do by lines on its standard input.

The commands are those that every driver since Volta documents. The daemon outlives the agent, as its clients must.
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio

PIPE_VARIABLE: Final = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE: Final = "CUDA_MPS_LOG_DIRECTORY"
PERCENTAGE_VARIABLE: Final = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PIPE_DEFAULT: Final = "/tmp/nvidia-mps"  # noqa: S108  (the program's own)
DEADLINE_S: Final = 10.0
CLIENTS_MAX: Final = 1024
"""Bound on what is read of a list; the driver allows 60 clients of a GPU."""


class MpsProblem(Exception):
    """The control program is missing, failed, or found no daemon."""


class MpsControl:
    """The daemon behind one pipe directory. `program` may have arguments, as in a shell."""

    def __init__(self, program: str, *, pipe_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.pipe_dir = pipe_dir
        self._program = shlex.split(program)
        self._environment = {**environment, **self.variables()}

    def variables(self) -> dict[str, str]:
        """What makes a process a client of this daemon. A wrong directory means no MPS, without a word."""
        return {PIPE_VARIABLE: str(self.pipe_dir), LOG_VARIABLE: str(self.pipe_dir / "log")}

    async def is_running(self) -> bool:
        try:
            await self.servers()
        except MpsProblem:
            return False
        return True

    async def start(self) -> None:
        """The daemon, in the background. Raises `MpsProblem`; one that runs already is one."""
        (self.pipe_dir / "log").mkdir(parents=True, exist_ok=True)
        await self._run(["-d"], "")

    async def servers(self) -> list[int]:
        """Pids of its servers, ascending; none before the first client came."""
        return _pids(await self._run([], "get_server_list\n"))

    async def clients(self) -> dict[int, int]:
        """`{pid of a client: pid of its server}`, ascending."""
        found = {}
        for server in await self.servers():
            for pid in _pids(await self._run([], f"get_client_list {server}\n"))[:CLIENTS_MAX]:
                found[pid] = server
        return dict(sorted(found.items()))

    async def terminate(self, pid: int, *, server: int) -> None:
        """Take the client off the GPU in an orderly way: its work ends first, its memory is free, it gets an error."""
        await self._run([], f"terminate_client {server} {pid}\n")

    async def quit(self) -> None:
        """End the daemon. Raises `MpsProblem`."""
        await self._run([], "quit\n")

    async def _run(self, arguments: list[str], commands: str) -> str:
        try:
            with anyio.fail_after(DEADLINE_S):
                done = await anyio.run_process(
                    [*self._program, *arguments], input=commands.encode(), env=self._environment, check=False
                )
        except (OSError, TimeoutError) as error:
            raise MpsProblem(f"{self._program[0]} cannot be run ({type(error).__name__})") from error
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        if done.returncode != 0:
            raise MpsProblem(said.splitlines()[0][:200] if said else f"it ended with code {done.returncode}")
        return done.stdout.decode(errors="replace")


def _pids(text: str) -> list[int]:
    """One a line; lines that are something else are left out."""
    return sorted(int(line) for line in text.splitlines() if re.fullmatch(r"\s*\d+\s*", line))

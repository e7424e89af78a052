"""What the stand-in's daemon answers: the documented commands, against one software GPU host.

A process is a client of this daemon when it has a context on the host and its ``CUDA_MPS_PIPE_DIRECTORY`` names this
daemon's pipe directory, as with the real one; any other value is, without a word, no MPS. There is one server for all
users, which is the daemon itself.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from softgpu.errors import HostError
from softgpu.host import Host

PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
PIPE_DEFAULT = "/tmp/nvidia-mps"  # noqa: S108  (the real one's)


class Daemon:
    """One control daemon. `answer` gives what the program prints, and whether that was the daemon's last word."""

    def __init__(self, host: Host, *, pipe_dir: Path, server_pid: int) -> None:
        self._host = host
        self._pipe_dir = pipe_dir
        self._server_pid = server_pid
        self._has_server = False
        self._percentage = 100.0

    def answer(self, line: str) -> tuple[str, bool]:
        command, *values = line.split() or [""]
        match command:
            case "get_server_list":
                self._has_server = self._has_server or bool(self._clients())
                return (str(self._server_pid) if self._has_server else ""), False
            case "start_server":
                self._has_server = True
                return "", False
            case "get_client_list":
                return self._of_server(values, "\n".join(str(pid) for pid in self._clients())), False
            case "terminate_client":
                return self._of_server(values, self._terminate(values[1:])), False
            case "get_default_active_thread_percentage":
                return str(self._percentage), False
            case "set_default_active_thread_percentage":
                self._percentage = float(values[0])
                return str(self._percentage), False
            case "quit":
                if self._clients() and "-f" not in values:
                    return "clients are connected", False
                return "", True
            case _:
                return f"Unknown command: {command}", False

    def _of_server(self, values: Sequence[str], answer: str) -> str:
        if values[:1] != [str(self._server_pid)]:
            return f"Server {values[0] if values else ''} not found"
        return answer

    def _terminate(self, values: Sequence[str]) -> str:
        if not values or not values[0].isdecimal() or int(values[0]) not in self._clients():
            return "Client not found"
        try:
            self._host.end_client(int(values[0]))
        except HostError as error:
            return str(error)
        return ""

    def _clients(self) -> list[int]:
        """Ascending. One that was ended is none any more."""
        pids = {
            process["pid"]
            for device in self._host.status()["devices"]
            for process in device["processes"]
            if not process["is_evicted"] and process["context_bytes"]
        }
        return sorted(pid for pid in pids if _pipe_dir_of(pid) == self._pipe_dir)


def _pipe_dir_of(pid: int) -> Path | None:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    for entry in content.split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == PIPE_VARIABLE.encode():
            return Path(os.fsdecode(value)).resolve()
    return Path(PIPE_DEFAULT).resolve()

"""Keeps the memory broker of this host running: a child of the holder, started again when it dies."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio

from kit.process import Child, spawn

# A broker that cannot start says so in its log within a second. The first wait is short, because engines that hold its
# memory cannot be parked or woken meanwhile; the last one long, because something is wrong that a person has to mend.
_WAIT_S_MIN: Final = 0.1
_WAIT_S_MAX: Final = 10.0
_WELL_S: Final = 30.0
"""One that has run for so long had started well."""
_STOP_GRACE_S: Final = 5.0
"""It unpins host memory at its end, which takes as long as a few GiB of pages."""

_ROOT: Final = Path(__file__).resolve().parents[2]
"""Where a child finds `services`."""

log = logging.getLogger(__name__)


class BrokerKeeper:
    """Starts the broker from the main thread's loop, and again after it has died."""

    def __init__(self, *, state_dir: Path, socket: Path, inherited: Mapping[str, str] = os.environ) -> None:
        # In a folder of its own, which containers see: the private sockets beside it are not for them.
        self.engine_socket = socket.with_name(f"{socket.stem}-memory") / "engines.sock"
        self.control_socket = socket.with_name(f"{socket.stem}-broker.sock")
        self.log_path = state_dir / "logs" / "broker.log"
        self.restart_count = 0
        self._child: Child | None = None
        own = {
            "SUBLET_BROKER_STATE_DIR": str(state_dir / "broker"),
            "SUBLET_BROKER_ENGINE_SOCKET_PATH": str(self.engine_socket.absolute()),
            "SUBLET_BROKER_CONTROL_SOCKET_PATH": str(self.control_socket.absolute()),
        }
        self._environment = dict(inherited) | own

    @property
    def pid(self) -> int:
        """0 while none runs."""
        return self._child.pid if self._child is not None and self._child.exit_code is None else 0

    async def run(self) -> None:
        """For ever. Cancelled: the broker is stopped, and its images are gone with it."""
        wait_s = _WAIT_S_MIN
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            started_s = time.monotonic()
            child = self._child = spawn(
                [sys.executable, "-m", "services", "broker"],
                environment=self._environment, log_path=self.log_path, folder=_ROOT,
            )  # fmt: skip
            try:
                code = await child.exited()
            finally:
                with anyio.CancelScope(shield=True):
                    await child.stop(grace_s=_STOP_GRACE_S)
            wait_s = _WAIT_S_MIN if time.monotonic() - started_s >= _WELL_S else min(_WAIT_S_MAX, wait_s * 2)
            self.restart_count += 1
            log.error(
                "the memory broker ended and is started again",
                extra={"exit_code": code, "wait_s": wait_s, "log": str(self.log_path)},
            )
            await anyio.sleep(wait_s)

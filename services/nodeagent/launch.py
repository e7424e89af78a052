"""What is started for a lease: its engine's command, on the GPUs that it was granted."""

from typing import Final

from schemas.holders import EngineStart
from schemas.placement import ReplicaProposal
from services.nodeagent.adapters.api import Job, Room
from services.nodeagent.adapters.registry import ADAPTERS
from services.nodeagent.settings import NodeAgentSettings

LOOPBACK: Final = ("127.0.0.1", "localhost")
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

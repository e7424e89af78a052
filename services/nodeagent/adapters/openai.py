"""Any command, or any image, that serves OpenAI's routes."""

from typing import ClassVar

from schemas.deployments import EngineKind
from services.nodeagent.adapters.api import Adapter, Command, Gauges, Job, filled, with_arguments
from services.nodeagent.adapters.nim import NIM_GAUGES


class OpenAi(Adapter):
    """Nothing is known of it but its routes: it is ready when it says so, or else when it lists its models.

    It is told its port, its address and its memory by variables too. If it shows one of the well-known gauges, it can
    be drained; without, nobody knows whether it is idle, so it is never parked while it might be busy.
    """

    kind: ClassVar[EngineKind] = EngineKind.OPENAI
    ready_routes: ClassVar[tuple[str, ...]] = ("/health", "/v1/models")
    gauges: ClassVar[Gauges | None] = Gauges(
        running=(*NIM_GAUGES.running, "llamacpp:requests_processing"),
        waiting=(*NIM_GAUGES.waiting, "llamacpp:requests_deferred"),
        kv_used_fraction=NIM_GAUGES.kv_used_fraction,
    )

    def command(self, job: Job) -> Command:
        environment = {"HOST": job.host, "PORT": job.port, "SUBLET_MEMORY_BYTES": str(job.granted_bytes)}
        if job.weight_cache:
            environment["HF_HOME"] = job.weight_cache
        return Command(
            program=filled(job.deployment.engine.command, job),
            options=with_arguments({}, job),
            environment=environment,
        )

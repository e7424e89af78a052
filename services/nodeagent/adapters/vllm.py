"""vLLM: ``vllm serve``."""

from typing import ClassVar

from schemas.deployments import EngineKind, SwapDriver
from services.nodeagent.adapters.api import (
    CONTEXT_BYTES,
    Adapter,
    Command,
    Gauges,
    Job,
    may_sleep,
    part_of,
    usual_program,
    with_arguments,
)

VLLM_GAUGES = Gauges(
    running=("vllm:num_requests_running",),
    waiting=("vllm:num_requests_waiting",),
    kv_used_fraction=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
)

STORE_BACKEND = "sublet-store"
"""Of our plugin, which has to be installed beside vLLM (`integrations/vllm_store`)."""


class Vllm(Adapter):
    """Sizes its KV cache by what is left of a part of the *total* that the driver tells it, so its budget is a part.

    Its sleep mode is mounted only in its development mode, whose other routes let a caller run anything: so it listens
    on loopback, and gateways pass on OpenAI's routes alone. Its default for ``/sleep`` is to abort what runs; we put it
    to sleep only when nothing does.
    """

    kind: ClassVar[EngineKind] = EngineKind.VLLM
    usual_image: ClassVar[str] = "vllm/vllm-openai:v0.33.0"
    sleeping_route: ClassVar[str] = "/is_sleeping"
    gauges: ClassVar[Gauges | None] = VLLM_GAUGES

    def command(self, job: Job) -> Command:
        options: dict[str, str | None] = {
            "host": job.host,
            "port": job.port,
            "served-model-name": job.deployment.name,
            "gpu-memory-utilization": utilization(job),
        }
        environment = {}
        if len(job.rooms) > 1:
            options["tensor-parallel-size"] = str(len(job.rooms))
        if may_sleep(job, SwapDriver.STORE, SwapDriver.HTTP_SLEEP, SwapDriver.SLEEP_CHECKPOINT):
            options["enable-sleep-mode"] = None
            if job.deployment.engine.swap_driver is SwapDriver.STORE:
                options["sleep-mode-backend"] = STORE_BACKEND
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        if job.weight_cache:
            environment["HF_HOME"] = job.weight_cache
        return Command(
            program=usual_program(job, "vllm", "serve"),
            options=(job.model, *with_arguments(options, job)),
            environment=environment,
        )


def utilization(job: Job) -> str:
    """The part of the total that it may count as its own: one number for all its GPUs, so the tightest decides.

    Its context is made before it begins to count, and stays outside of what it counts.
    """
    return min(part_of(room.granted_bytes - CONTEXT_BYTES, room.visible_bytes) for room in job.rooms)

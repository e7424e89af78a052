"""SGLang: ``python3 -m sglang.launch_server``."""

from typing import ClassVar, Final

from schemas.deployments import EngineKind, SwapDriver
from schemas.units import GiB
from services.nodeagent.adapters.api import (
    CONTEXT_BYTES,
    Adapter,
    Command,
    Gauges,
    Job,
    Room,
    may_sleep,
    part_of,
    usual_program,
    with_arguments,
)

ACTIVATION_BYTES: Final = 2 * GiB
ACTIVATION_PART: Final = 10
"""Kept out of what it may fill at the start, for activations and CUDA graphs, which come on top: a tenth of the grant,
and 2 GiB at least. Its own default keeps 10 to 15 % of a GPU."""

SGLANG_GAUGES = Gauges(
    running=("sglang:num_running_reqs",),
    waiting=("sglang:num_queue_reqs",),
    kv_used_fraction=("sglang:token_usage",),
)


class Sglang(Adapter):
    """Fills a part of what is *free* before it loads with weights and KV; the rest of that is for activations."""

    kind: ClassVar[EngineKind] = EngineKind.SGLANG
    usual_image: ClassVar[str] = "lmsysorg/sglang:v0.5.23"
    gauges: ClassVar[Gauges | None] = SGLANG_GAUGES

    def command(self, job: Job) -> Command:
        options: dict[str, str | None] = {
            "model-path": job.model,
            "host": job.host,
            "port": job.port,
            "served-model-name": job.deployment.name,
            "mem-fraction-static": min(_static_part(room) for room in job.rooms),
            "enable-metrics": None,
        }
        # Else /health would have it give a token, which it cannot while its memory is away.
        environment = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
        if len(job.rooms) > 1:
            options["tensor-parallel-size"] = str(len(job.rooms))
        if may_sleep(job, SwapDriver.STORE, SwapDriver.HTTP_RELEASE):
            options["enable-memory-saver"] = None
            options["enable-weights-cpu-backup"] = None
            # Communication buffers that are registered with a graph do not survive that their memory goes.
            environment["NCCL_GRAPH_REGISTER"] = "0"
        if job.weight_cache:
            environment["HF_HOME"] = job.weight_cache
        return Command(
            program=usual_program(job, "python3", "-m", "sglang.launch_server"),
            options=with_arguments(options, job),
            environment=environment,
        )


def _static_part(room: Room) -> str:
    static_bytes = room.granted_bytes - CONTEXT_BYTES - max(ACTIVATION_BYTES, room.granted_bytes // ACTIVATION_PART)
    return part_of(static_bytes, max(1, min(room.free_bytes, room.visible_bytes) - CONTEXT_BYTES))

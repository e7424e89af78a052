"""NVIDIA NIM: a container that is told everything by variables."""

import shlex
from typing import ClassVar, Final

from schemas.deployments import EngineKind, Runtime
from services.nodeagent.adapters.api import Adapter, Command, Gauges, Job, filled, with_arguments
from services.nodeagent.adapters.sglang import SGLANG_GAUGES
from services.nodeagent.adapters.vllm import VLLM_GAUGES, utilization

NIM_GAUGES: Final = Gauges(
    running=(*VLLM_GAUGES.running, *SGLANG_GAUGES.running, "num_requests_running"),
    waiting=(*VLLM_GAUGES.waiting, *SGLANG_GAUGES.waiting, "num_requests_waiting"),
    kv_used_fraction=(*VLLM_GAUGES.kv_used_fraction, *SGLANG_GAUGES.kv_used_fraction, "gpu_cache_usage_perc"),
    route="/v1/metrics",
)


class Nim(Adapter):
    """It passes its engine's own metrics on (vLLM's or SGLang's names); NIM 1.x had names without a prefix.

    Sleep is none of its documented features, so it is parked by the driver's checkpoint or started anew.
    """

    kind: ClassVar[EngineKind] = EngineKind.NIM
    usual_runtime: ClassVar[Runtime] = Runtime.DOCKER
    ready_routes: ClassVar[tuple[str, ...]] = ("/v1/health/ready",)
    gauges: ClassVar[Gauges | None] = NIM_GAUGES

    def command(self, job: Job) -> Command:
        engine = job.deployment.engine
        options: dict[str, str | None] = {"gpu-memory-utilization": utilization(job)}
        if len(job.rooms) > 1:
            options["tensor-parallel-size"] = str(len(job.rooms))
        environment = {
            "NIM_SERVER_PORT": job.port,
            "NIM_SERVED_MODEL_NAME": job.deployment.name,
            "NIM_PASSTHROUGH_ARGS": shlex.join(with_arguments(options, job)),
        }
        if engine.model:
            is_whole = engine.model.startswith("/") or ":" in engine.model
            environment["NIM_MODEL_PATH"] = engine.model if is_whole else f"hf://{engine.model}"
        if job.weight_cache:
            environment["NIM_CACHE_PATH"] = job.weight_cache
        return Command(program=filled(engine.command, job), environment=environment)

"""llama.cpp's server: ``llama-server``."""

from typing import ClassVar

from schemas.deployments import EngineKind
from schemas.units import MiB
from services.nodeagent.adapters.api import (
    CONTEXT_BYTES,
    Adapter,
    Command,
    Gauges,
    Job,
    usual_program,
    with_arguments,
)


class LlamaServer(Adapter):
    """Shrinks its context until a margin stays free on each GPU; all layers go to the GPU or it does not start.

    A layer that fell back to the host would be served, at a tenth of the speed, and nobody would know.
    """

    kind: ClassVar[EngineKind] = EngineKind.LLAMA_SERVER
    usual_image: ClassVar[str] = "ghcr.io/ggml-org/llama.cpp:server-cuda"
    gauges: ClassVar[Gauges | None] = Gauges(
        running=("llamacpp:requests_processing",),
        waiting=("llamacpp:requests_deferred",),
    )

    def command(self, job: Job) -> Command:
        margins = [max(0, room.free_bytes - room.granted_bytes) + CONTEXT_BYTES for room in job.rooms]
        source = "model" if job.model.startswith(("/", "./")) or job.model.endswith(".gguf") else "hf-repo"
        options: dict[str, str | None] = {
            source: job.model,
            "alias": job.deployment.name,
            "host": job.host,
            "port": job.port,
            "n-gpu-layers": "all",
            "fit": "on",
            "fit-target": ",".join(str(-(-margin // MiB)) for margin in margins),
            "metrics": None,
        }
        environment = {"LLAMA_CACHE": job.weight_cache, "HF_HOME": job.weight_cache} if job.weight_cache else {}
        # The image's own program is the server; its folder is not where programs are looked for.
        usual = () if job.deployment.engine.image else ("llama-server",)
        return Command(
            program=usual_program(job, *usual), options=with_arguments(options, job), environment=environment
        )

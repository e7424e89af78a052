"""The two engines that we ship: ``engines simulated`` and ``engines training``."""

from typing import ClassVar, Final

from schemas.deployments import EngineKind
from services.nodeagent.adapters.api import Adapter, Command, Gauges, Job

LOOPBACK: Final = ("127.0.0.1", "localhost")


def _common(job: Job, kind: EngineKind) -> list[str]:
    """It lives in its granted bytes, context included, on each of its GPUs."""
    line = [job.python, "-m", "engines", kind.value, "--model", job.deployment.name]
    line += ["--memory-bytes", str(job.granted_bytes), "--gpu", ",".join(room.gpu_uuid for room in job.rooms)]
    line += ["--port", job.port]
    if job.host not in LOOPBACK:
        line += ["--host", job.host]
    return line


def _arguments(job: Job) -> list[str]:
    """The deployment's own, by name. They take no option that stands alone."""
    return [word for name, value in sorted(job.deployment.engine.arguments.items()) for word in (f"--{name}", value)]


class Simulated(Adapter):
    """OpenAI-compatible, with real memory behaviour and made-up answers."""

    kind: ClassVar[EngineKind] = EngineKind.SIMULATED
    is_ours: ClassVar[bool] = True
    gauges: ClassVar[Gauges | None] = Gauges(
        running=("vllm:num_requests_running",),
        waiting=("vllm:num_requests_waiting",),
        kv_used_fraction=("vllm:kv_cache_usage_perc",),
    )

    def command(self, job: Job) -> Command:
        engine = job.deployment.engine
        cold_s = job.settings.cold_start_s if engine.cold_start_s is None else engine.cold_start_s
        line = [*_common(job, self.kind), "--weights-bytes", str(engine.weights_bytes), "--cold-start-s", str(cold_s)]
        return Command(program=tuple(line), options=tuple(_arguments(job)))


class Training(Adapter):
    """Holds memory, steps, checkpoints; yields between two steps."""

    kind: ClassVar[EngineKind] = EngineKind.TRAINING
    is_ours: ClassVar[bool] = True

    def command(self, job: Job) -> Command:
        folder = f"{job.settings.state_dir}/checkpoints/{job.replica.tenant}/{job.deployment.name}"
        line = [*_common(job, self.kind), "--checkpoint-dir", folder]
        return Command(program=tuple(line), options=tuple(_arguments(job)))

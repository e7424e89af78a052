"""One gang of 512 replicas on an empty cluster, and one deployment of as many replicas as there are GPUs."""

import statistics
from typing import Final

from benchmarks.report import Value
from benchmarks.scale_stage import KAI_SOURCE, NODE_COUNT, NODE_COUNT_QUICK, Stage, stage, training
from benchmarks.sections import Measured, Setting, Wanted
from schemas.deployments import DeploymentSpec

KAI_GANG_S: Final = 48.7
GANG_COUNT: Final = 512
GANG_COUNT_QUICK: Final = 16
BARS: Final = (Wanted(figure="gang_s", op="<=", bar=0.25),)


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    rounds = setting.count(5, 1)
    node_count = setting.count(NODE_COUNT, NODE_COUNT_QUICK)
    size = setting.count(GANG_COUNT, GANG_COUNT_QUICK)
    async with stage(setting.folder / "gang", node_count=node_count, progress=setting.progress) as on_stage:
        gpu_count = on_stage.gpu_count
        gangs = [training(f"gang-{number}", replica_count=size, is_gang=True) for number in range(rounds)]
        gangs_s = [await _once_s(on_stage, spec) for spec in gangs]
        whole = [training(f"whole-{number}", replica_count=gpu_count) for number in range(rounds)]
        whole_s = [await _once_s(on_stage, spec) for spec in whole]
    gang_s = statistics.median(gangs_s)
    figures: dict[str, Value] = {
        "gang_replica_count": size,
        "gang_s": round(gang_s, 4),
        "gang_s_worst": round(max(gangs_s), 4),
        "one_deployment_fill_per_s": round(gpu_count / statistics.median(whole_s), 1),
    }
    if not setting.is_quick:
        figures["gang_over_kai_x"] = round(KAI_GANG_S / gang_s, 1)
    return Measured(figures=figures, notes=[KAI_SOURCE])


async def _once_s(on_stage: Stage, spec: DeploymentSpec) -> float:
    """Seconds from the command until its last replica is ready. Then it is retired, and all is given back."""
    ready, released = on_stage.seen.ready_count + spec.replica_count, on_stage.seen.released_count + spec.replica_count
    began_s = await on_stage.send([on_stage.deploy(spec)])
    await on_stage.until(lambda seen: seen.ready_count >= ready, spec.name)
    lasted_s = on_stage.seen.last_ready_s - began_s
    await on_stage.send([on_stage.retire(spec.name)])
    await on_stage.until(lambda seen: seen.released_count >= released, f"{spec.name} retired")
    return lasted_s

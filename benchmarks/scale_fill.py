"""An empty cluster is filled with one-GPU replicas, and one more is told that it does not fit."""

import statistics
from typing import Final

from benchmarks.report import Value
from benchmarks.scale_stage import (
    GPUS_PER_NODE,
    KAI_SOURCE,
    NODE_COUNT,
    NODE_COUNT_QUICK,
    Stage,
    fsync_floor_s,
    stage,
    training,
)
from benchmarks.sections import Measured, Setting, Wanted

KAI_FILL_S: Final = 398.0
KAI_UNSCHEDULABLE_S: Final = 249.5
VERDICTS: Final = 5
BARS: Final = (
    Wanted(figure="fill_per_s", op=">=", bar=2000),
    Wanted(figure="unschedulable_s", op="<=", bar=0.05),
)


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    rounds = setting.count(5, 1)
    node_count = setting.count(NODE_COUNT, NODE_COUNT_QUICK)
    gpu_count = GPUS_PER_NODE * node_count
    rates, cpu_us, verdicts_s = [], [], []
    for number in range(rounds):
        async with stage(setting.folder / str(number), node_count=node_count, progress=setting.progress) as on_stage:
            cpu_s = on_stage.placement_cpu_s()
            rates.append(gpu_count / await filled(on_stage))
            cpu_us.append(1e6 * (on_stage.placement_cpu_s() - cpu_s) / gpu_count)
            verdicts_s += [await _verdict_s(on_stage, verdict) for verdict in range(VERDICTS)]
    fill_per_s = statistics.median(rates)
    unschedulable_s = statistics.median(verdicts_s)
    figures: dict[str, Value] = {
        "fsync_floor_us_p50": round(1e6 * fsync_floor_s(setting.folder), 1),
        "fill_gpu_count": gpu_count,
        "fill_per_s": round(fill_per_s, 1),
        "fill_per_s_least": round(min(rates), 1),
        "fill_s": round(gpu_count / fill_per_s, 3),
        "fill_placement_cpu_us": round(statistics.median(cpu_us), 1),
        "unschedulable_s": round(unschedulable_s, 4),
        "unschedulable_s_worst": round(max(verdicts_s), 4),
    }
    if not setting.is_quick:
        figures["fill_over_kai_x"] = round(KAI_FILL_S / (gpu_count / fill_per_s), 1)
        figures["unschedulable_over_kai_x"] = round(KAI_UNSCHEDULABLE_S / unschedulable_s)
    return Measured(figures=figures, notes=[KAI_SOURCE])


async def filled(on_stage: Stage) -> float:
    """Seconds from the first command until the last replica of as many deployments as there are GPUs is ready."""
    count = on_stage.gpu_count
    target = on_stage.seen.ready_count + count
    began_s = await on_stage.send([on_stage.deploy(training(f"job-{number}")) for number in range(count)])
    await on_stage.until(lambda seen: seen.ready_count >= target, f"{count} deployments")
    return on_stage.seen.last_ready_s - began_s


async def _verdict_s(on_stage: Stage, number: int) -> float:
    """From the command until history says that it fits nowhere: no room for one more job of the same priority."""
    spec = training(f"more-{number}")
    began_s = await on_stage.send([on_stage.deploy(spec)])
    await on_stage.until(lambda seen: spec.name in seen.failed_at_s, "a verdict")
    return on_stage.seen.failed_at_s[spec.name] - began_s

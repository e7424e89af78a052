"""A cluster full of jobs that may be preempted gives one GPU to a model, and then all of them."""

import statistics
from typing import Final

from benchmarks.report import Value
from benchmarks.scale_agents import Seen
from benchmarks.scale_fill import filled
from benchmarks.scale_stage import KAI_SOURCE, NODE_COUNT, NODE_COUNT_QUICK, Stage, inference, stage
from benchmarks.sections import Measured, Setting, Wanted

KAI_ONE_S: Final = 13.9
KAI_ALL_S: Final = 694.0
ONES: Final = 5
BARS: Final = (
    Wanted(figure="reclaim_one_s", op="<=", bar=0.1),
    Wanted(figure="reclaim_all_s", op="<=", bar=10),
)


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`. What was measured before a failure is told."""
    node_count = setting.count(NODE_COUNT, NODE_COUNT_QUICK)
    async with stage(setting.folder / "reclaim", node_count=node_count, progress=setting.progress) as on_stage:
        await filled(on_stage)
        ones_s = [await _reclaimed_s(on_stage, [f"one-{number}"]) for number in range(ONES)]
        rest = [f"all-{number}" for number in range(on_stage.gpu_count - ONES)]
        all_s = await _reclaimed_s(on_stage, rest)
    one_s = statistics.median(ones_s)
    figures: dict[str, Value] = {
        "reclaim_first_s": round(ones_s[0], 4),
        "reclaim_one_s": round(one_s, 4),
        "reclaim_one_s_worst": round(max(ones_s), 4),
        "reclaim_all_count": len(rest),
        "reclaim_all_s": round(all_s, 3),
        "reclaim_per_s": round(len(rest) / all_s, 1),
    }
    if not setting.is_quick:
        figures["reclaim_one_over_kai_x"] = round(KAI_ONE_S / one_s, 1)
        figures["reclaim_all_over_kai_x"] = round(KAI_ALL_S / all_s, 1)
    return Measured(figures=figures, notes=[KAI_SOURCE])


async def _reclaimed_s(on_stage: Stage, models: list[str]) -> float:
    """From the first command until the last of these models is ready on a GPU that a job gave up."""
    began_s = await on_stage.send([on_stage.deploy(inference(model)) for model in models])
    missing = set(models)

    def are_ready(seen: Seen) -> bool:
        missing.difference_update(seen.ready_at_s)
        return not missing

    await on_stage.until(are_ready, f"{len(models)} models")
    return max(on_stage.seen.ready_at_s[model] for model in models) - began_s

"""``python -m benchmarks soak``: thousands of parks and wakes while parts die and driver calls fail; nothing may leak.

A whole stack on software GPUs. Models of different sizes and swap drivers take turns because clients ask for them; the
agent, engines, the memory broker and the checkpointer are ended by SIGKILL, engines stand still, and each call of the
driver that any of them makes fails or comes late. After each wake the content on the device is compared by its digest.
At the end faults are cleared and everything must settle, then every model is retired, and nothing may be left: no byte
on the device, none in host memory, no process, no step past its deadline.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from benchmarks import stack_run
from benchmarks.history import History
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit, quantiles
from benchmarks.soak_chaos import Chaos
from benchmarks.soak_cycles import Cycles
from benchmarks.soak_ledger import Leftovers, cycles_by_driver, late_steps, left
from benchmarks.soak_parts import AGENT, BROKER, CHECKPOINTER, ENGINE
from schemas.deployments import SwapDriver
from services.local.settings import StackSettings
from services.local.stack import LocalStack

CYCLES: Final = 2000
GPUS: Final = 3
PROFILE: Final = "l4-24"
"""The smallest: what a checkpoint takes goes by the bytes of a share."""
COLD_START_S: Final = 0.05
SETTLE_S: Final = 120.0
"""After the last fault: a step's longest deadline, a suspect's looks and a failed engine's last restart lie within."""
DRIVERS: Final = (SwapDriver.HTTP_SLEEP, SwapDriver.STORE, SwapDriver.CHECKPOINT)
MIXED: Final = "mixed"
CENSUS_CYCLES_MIN: Final = 100
"""In a shorter run calls are not counted first, and any call that the code makes may be met by a fault."""
COVERED_CYCLES_MIN: Final = 1000
"""A shorter run need not meet each call with each fault; a longer one goes on until it has, as long as it may."""
AGENT_SETTINGS: Final[dict[str, float]] = {
    "drain_s": 5.0, "wake_deadline_s": 6.0, "step_grace_s": 4.0, "start_deadline_s": 60.0, "look_pause_s": 0.5,
    "lock_timeout_s": 2.0, "start_attempt_count": 1000, "bad_start_count": 1000,
}  # fmt: skip
"""Shorter deadlines, so that many engines that do not answer become suspects; and no number of failed starts is final,
because each is a fault that was set, and neither its replica's nor its GPU's."""
LEAST_OF_ALL: Final = 0.1
"""Of the cycles, each swap driver in a mixed run must have so much."""


def soak_settings(state_dir: Path, *, gpu_count: int = GPUS, handles_signals: bool = True) -> StackSettings:
    return StackSettings(
        state_dir=state_dir, gpu_count=gpu_count, profile=PROFILE, uses_software_gpu=True, cold_start_s=COLD_START_S,
        service_settings={"swapper": {"tick_s": 0.1}, "nodeagent": AGENT_SETTINGS}, handles_signals=handles_signals,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks soak",
        description="Parks and wakes under kills and failing driver calls, on software GPUs; nothing may leak.",
    )
    add = parser.add_argument
    add("--cycles", type=int, default=CYCLES, help="parks and wakes, one of each is one cycle (default: %(default)s)")
    add("--driver", choices=[MIXED, *(driver.value for driver in DRIVERS)], default=MIXED,
        help="how models leave their GPU; mixed: some in each way (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, help="of sizes, kills and faults (default: drawn and told)")
    add("--minutes", type=float, default=20.0, help="give up after so long (default: %(default)g)")
    stack_run.add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, or when it could not run."""
    options = _parser().parse_args(arguments)
    options.seed = int(time.time()) if options.seed is None else options.seed
    return stack_run.exit_status(options, soak, settings=soak_settings)


async def soak(options: argparse.Namespace, stack: LocalStack, history: History, progress: Progress) -> Report:
    began_s = time.monotonic()
    progress.say(f"driver {options.driver}")
    drivers = DRIVERS if options.driver == MIXED else (SwapDriver(options.driver),)
    cycles = Cycles(stack, history, progress, seed=options.seed, drivers=drivers)
    chaos = Chaos(stack, history, seed=options.seed)

    def line() -> str:
        return (
            f"cycles {cycles.cycle_count}/{options.cycles}  answered {cycles.answered_count}  "
            f"checked {cycles.checked_count}  {chaos.told}"
        )

    def is_enough() -> bool:
        is_covered = not chaos.faults.missing() and suspect_count(history) > 0
        return is_covered or options.cycles < COVERED_CYCLES_MIN

    has_census = options.cycles >= CENSUS_CYCLES_MIN
    if has_census:
        progress.say("each driver call is counted while the models start and take their first turns")
        await chaos.begin_census()
        await stack.until_ready("nodeagent")
    await cycles.deploy()
    history.tally.restart()
    if has_census:
        await cycles.run(len(cycles.models))
        await chaos.in_census()
        await cycles.run(3 * len(cycles.models))
        await chaos.end_census()
    soaked_s = time.monotonic()
    async with progress.showing(line), anyio.create_task_group() as tg:
        tg.start_soon(chaos.run)
        with anyio.move_on_after(options.minutes * 60):
            await cycles.run(options.cycles, is_enough=is_enough)
        soaked_s = time.monotonic() - soaked_s
        tg.cancel_scope.cancel()
    await chaos.end()
    progress.say("faults are cleared: everything must settle")
    is_settled = await cycles.settle(within_s=SETTLE_S)
    await cycles.check_all()
    progress.say("every model is retired: nothing may be left")
    leftovers = await left(stack, await cycles.retire())
    return _report(
        options, stack, history, cycles, chaos, leftovers, is_settled=is_settled, soaked_s=soaked_s, began_s=began_s
    )


def _report(
    options: argparse.Namespace,
    stack: LocalStack,
    history: History,
    cycles: Cycles,
    chaos: Chaos,
    leftovers: Leftovers,
    *,
    is_settled: bool,
    soaked_s: float,
    began_s: float,
) -> Report:
    late = late_steps(
        history.stored,
        step_grace_s=AGENT_SETTINGS["step_grace_s"],
        wake_deadline_s=AGENT_SETTINGS["wake_deadline_s"],
    )
    faults, by_driver = chaos.faults, cycles_by_driver(history.stored)
    missing = faults.missing()
    figures: dict[str, Value] = {
        "cycle_count": cycles.cycle_count,
        **{f"cycle_{driver.replace('-', '_')}_count": by_driver[driver] for driver in sorted(by_driver)},
        "cycles_per_s": round(cycles.cycle_count / soaked_s, 2),
        "checked_content_count": cycles.checked_count,
        "wrong_content_count": len(cycles.wrong),
        "leaked_device_bytes": leftovers.device_bytes,
        "leaked_pinned_bytes": leftovers.pinned_bytes,
        "left_engine_count": leftovers.engine_count,
        "late_step_count": len(late),
        "settled_count": int(is_settled),
        "answered_count": cycles.answered_count,
        "not_answered_count": sum(cycles.problems.values()),
        "agent_kill_count": chaos.kills[AGENT],
        "engine_kill_count": chaos.kills[ENGINE],
        "broker_kill_count": chaos.kills[BROKER],
        "checkpointer_kill_count": chaos.kills[CHECKPOINTER],
        "engine_stop_count": chaos.stop_count,
        "in_step_count": chaos.in_step_count,
        "used_call_count": len(faults.used) or None,
        "fault_count": faults.hits.total(),
        "call_never_met_count": len(missing) if faults.used else None,
        "suspect_count": suspect_count(history),
        "engine_failed_count": history.tally.counts.failed_count,
        **quantiles("wake_s", history.tally.counts.wakes_s, (50, 95)),
        "seed": options.seed,
        "run_s": round(time.monotonic() - began_s, 1),
    }
    wanted: list[tuple[str, str, int]] = [
        ("cycle_count", ">=", options.cycles),
        ("checked_content_count", ">=", options.cycles // 2),
        ("wrong_content_count", "==", 0),
        ("leaked_device_bytes", "==", 0),
        ("leaked_pinned_bytes", "==", 0),
        ("left_engine_count", "==", 0),
        ("late_step_count", "==", 0),
        ("settled_count", "==", 1),
    ]
    if options.cycles >= COVERED_CYCLES_MIN:
        wanted += [("call_never_met_count", "==", 0), ("suspect_count", ">", 0)]
        least_count = int(options.cycles * LEAST_OF_ALL)
        wanted += [(name, ">=", least_count) for name in figures if name.startswith("cycle_") and name != "cycle_count"]
    bars = [Bar(name=name, value=figures[name], op=op, bar=bar) for name, op, bar in wanted]
    return Report(
        benchmark="soak", label=stack.label, commit=commit(), figures=figures, bars=bars,
        notes=_notes(cycles.wrong, late, missing, leftovers.told),
        series=_series(chaos, cycles.problems),
    )  # fmt: skip


def suspect_count(history: History) -> int:
    """How often a replica became one."""
    return sum(".nodes_replica_suspect_v1" in stored.subject for stored in history.stored)


def _notes(wrong: Sequence[str], late: Sequence[str], missing: Sequence[str], left_told: str) -> list[str]:
    notes = ["Figures of a software GPU say nothing about the speed of a real one; docs/benchmarks.md defines each."]
    notes += [f"Wrong content: {one}." for one in wrong[:3]]
    notes += [f"Past its deadline: {step}." for step in late[:3]]
    notes += [f"Used, and not met by a fault: {', '.join(missing)}."] if missing else []
    return notes + ([left_told] if left_told else [])


def _series(chaos: Chaos, problems: Counter[str]) -> dict[str, dict[str, Value]]:
    """What the file tells beyond the table."""
    faults = chaos.faults
    return {
        "calls_in_census_count": dict(sorted(faults.used.items())),
        "fault_by_call_count": {f"{call}, {kind}": count for (call, kind), count in sorted(faults.hits.items())},
        "fault_by_part_count": dict(sorted(faults.struck.items())),
        "not_answered_by_reason_count": dict(sorted(problems.items())),
    }

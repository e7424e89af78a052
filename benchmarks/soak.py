"""``python -m benchmarks soak``: thousands of parks and wakes while parts die and driver calls fail; nothing may leak.

A whole stack on one software GPU. Models of different sizes take turns because clients ask for them; the agent, engines
and the memory broker are ended by SIGKILL, and calls of the driver fail or come late. After each wake the content on
the device is compared by its digest. At the end faults are cleared and everything must settle, then every model is
retired, and nothing may be left: no byte on the device, none in host memory, no process, no step past its deadline.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from benchmarks.fleet import Stalled
from benchmarks.history import History
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit, quantiles
from benchmarks.soak_chaos import Chaos
from benchmarks.soak_cycles import Cycles
from benchmarks.soak_ledger import Leftovers, late_steps, left
from kit.bus import BusError
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR, read_seed
from kit.supervisor import Interrupted, NotReady
from schemas.deployments import SwapDriver
from services.local.settings import StackSettings
from services.local.stack import LocalStack, running
from services.local.state import StackError
from sublet.errors import SubletError

CYCLES: Final = 2000
COLD_START_S: Final = 0.05
SETTLE_S: Final = 120.0
"""After the last fault: a step's longest deadline, a suspect's looks and a failed engine's last restart lie within."""
DRIVERS: Final = (SwapDriver.HTTP_SLEEP, SwapDriver.STORE, SwapDriver.CHECKPOINT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks soak",
        description="Parks and wakes under kills and failing driver calls, on a software GPU; nothing may leak.",
    )
    add = parser.add_argument
    add("--cycles", type=int, default=CYCLES, help="parks and wakes, one of each is one cycle (default: %(default)s)")
    add("--driver", choices=[driver.value for driver in DRIVERS], default=SwapDriver.HTTP_SLEEP.value)
    add("--seed", type=int, help="of sizes, kills and faults (default: drawn and told)")
    add("--minutes", type=float, default=20.0, help="give up after so long (default: %(default)g)")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, or when it could not run."""
    options = _parser().parse_args(arguments)
    options.seed = int(time.time()) if options.seed is None else options.seed
    try:
        with tempfile.TemporaryDirectory(prefix="sublet-soak-", ignore_cleanup_errors=True) as folder:
            settings = StackSettings(
                state_dir=Path(folder), gpu_count=1, uses_software_gpu=True, cold_start_s=COLD_START_S,
                service_settings={"swapper": {"tick_s": 0.1}},
            )  # fmt: skip
            report = anyio.run(_run, options, settings, backend_options={"use_uvloop": True})
    except Interrupted as interrupted:
        return 128 + interrupted.signal_number
    except (StackError, NotReady, Stalled, SubletError, BusError) as error:
        print(f"error: {error} (seed {options.seed})", file=sys.stderr)
        return 1
    if report is None:
        print("stopped; nothing was measured", file=sys.stderr)
        return 130
    print(report.table())
    if options.json:
        report.write(options.json)
    return 1 if options.check and report.missed else 0


async def _run(options: argparse.Namespace, settings: StackSettings) -> Report | None:
    progress = Progress()
    progress.say(f"starting a stack with one software GPU; seed {options.seed}, driver {options.driver}")
    report: Report | None = None
    async with running(settings) as stack:
        seed = read_seed(stack.folder.keys, ADMINISTRATOR)
        async with NatsBus(stack.nats_url, seed, ADMINISTRATOR) as bus:
            history = History(bus)
            async with history.following():
                report = await soak(options, stack, history, progress)
        progress.say("stopping the stack")
    return report


async def soak(
    options: argparse.Namespace, stack: LocalStack, history: History, progress: Progress, chaos: Chaos | None = None
) -> Report:
    """`chaos`: what goes wrong on the way; a test may hand in one that plants a leak."""
    began_s = time.monotonic()
    cycles = Cycles(stack, history, progress, seed=options.seed, driver=SwapDriver(options.driver))
    await cycles.deploy()
    history.tally.restart()
    chaos = chaos or Chaos(stack, seed=options.seed)

    def line() -> str:
        return (
            f"cycles {cycles.cycle_count}/{options.cycles}  answered {cycles.answered_count}  "
            f"checked {cycles.checked_count}  {chaos.told}"
        )

    async with progress.showing(line), anyio.create_task_group() as tg:
        tg.start_soon(chaos.run)
        with anyio.move_on_after(options.minutes * 60):
            await cycles.run(options.cycles)
        chaos.stop()
        tg.cancel_scope.cancel()
    await chaos.end()
    progress.say("faults are cleared: everything must settle")
    is_settled = await cycles.settle(within_s=SETTLE_S)
    await cycles.check_all()
    progress.say("every model is retired: nothing may be left")
    leftovers = await left(stack, await cycles.retire())
    return _report(options, stack, history, cycles, chaos, leftovers, is_settled=is_settled, began_s=began_s)


def _report(
    options: argparse.Namespace,
    stack: LocalStack,
    history: History,
    cycles: Cycles,
    chaos: Chaos,
    leftovers: Leftovers,
    *,
    is_settled: bool,
    began_s: float,
) -> Report:
    late = late_steps(history.stored)
    figures: dict[str, Value] = {
        "cycle_count": cycles.cycle_count,
        "checked_content_count": cycles.checked_count,
        "wrong_content_count": len(cycles.wrong),
        "leaked_device_bytes": leftovers.device_bytes,
        "leaked_pinned_bytes": leftovers.pinned_bytes,
        "left_engine_count": leftovers.engine_count,
        "late_step_count": len(late),
        "settled_count": int(is_settled),
        "answered_count": cycles.answered_count,
        "not_answered_count": sum(cycles.problems.values()),
        "agent_kill_count": chaos.counts["nodeagent"],
        "engine_kill_count": chaos.counts["engine"],
        "broker_kill_count": chaos.counts["broker"],
        "driver_fault_count": chaos.counts["fault"],
        "driver_function_count": len(chaos.functions),
        "suspect_count": sum(".nodes_replica_suspect_v1" in stored.subject for stored in history.stored),
        "engine_failed_count": history.tally.counts.failed_count,
        **quantiles("wake_s", history.tally.counts.wakes_s, (50, 95)),
        "seed": options.seed,
        "run_s": round(time.monotonic() - began_s, 1),
    }
    wanted: list[tuple[str, str, int]] = [
        ("cycle_count", ">=", options.cycles),
        ("checked_content_count", ">", 0),
        ("wrong_content_count", "==", 0),
        ("leaked_device_bytes", "==", 0),
        ("leaked_pinned_bytes", "==", 0),
        ("left_engine_count", "==", 0),
        ("late_step_count", "==", 0),
        ("settled_count", "==", 1),
    ]
    notes = ["Figures of a software GPU say nothing about the speed of a real one; docs/benchmarks.md defines each."]
    notes += [f"Wrong content: {wrong}." for wrong in cycles.wrong[:3]]
    notes += [f"Past its deadline: {step}." for step in late[:3]]
    notes += [leftovers.told] if leftovers.told else []
    bars = [Bar(name=name, value=figures[name], op=op, bar=bar) for name, op, bar in wanted]
    return Report(benchmark="soak", label=stack.label, commit=commit(), figures=figures, bars=bars, notes=notes)

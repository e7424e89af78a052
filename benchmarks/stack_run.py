"""A run on a whole stack of its own with one software GPU: started, followed, measured, stopped, told."""

import argparse
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import anyio

from benchmarks.fleet import Stalled
from benchmarks.history import History
from benchmarks.progress import Progress
from benchmarks.report import Report
from kit.bus import BusError
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR, read_seed
from kit.supervisor import Interrupted, NotReady
from services.local.settings import StackSettings
from services.local.stack import LocalStack, running
from services.local.state import StackError
from sublet.errors import SubletError

Measure = Callable[[argparse.Namespace, LocalStack, History, Progress], Awaitable[Report]]

COLD_START_S: Final = 0.05
RESTART_LONGEST_S: Final = 0.1
"""A part that is killed again and again is started again at once: what counts is how soon it is back to work."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that `exit_status` reads."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write figures and bars there")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a bar is missed")


def exit_status(
    options: argparse.Namespace,
    measure: Measure,
    *,
    service_settings: Mapping[str, Mapping[str, object]],
) -> int:
    """0 when it ran, 1 when a bar is missed and asked for, or when it could not run. `options` has a `seed`."""
    try:
        with tempfile.TemporaryDirectory(prefix="sublet-run-", ignore_cleanup_errors=True) as folder:
            settings = StackSettings(
                state_dir=Path(folder),
                gpu_count=1,
                uses_software_gpu=True,
                cold_start_s=COLD_START_S,
                restart_longest_s=RESTART_LONGEST_S,
                service_settings=service_settings,
            )
            report = anyio.run(_run, options, settings, measure, backend_options={"use_uvloop": True})
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


async def _run(options: argparse.Namespace, settings: StackSettings, measure: Measure) -> Report | None:
    progress = Progress()
    progress.say(f"starting a stack with one software GPU; seed {options.seed}")
    report: Report | None = None
    async with running(settings) as stack:
        seed = read_seed(stack.folder.keys, ADMINISTRATOR)
        async with NatsBus(stack.nats_url, seed, ADMINISTRATOR) as bus:
            history = History(bus)
            async with history.following():
                report = await measure(options, stack, history, progress)
        progress.say("stopping the stack")
    return report

"""A run on a whole stack of its own with software GPUs: started, followed, measured, stopped, told."""

import argparse
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that `exit_status` reads."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write figures and bars there")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a bar is missed")


def exit_status(options: argparse.Namespace, measure: Measure, *, settings: Callable[[Path], StackSettings]) -> int:
    """0 when it ran, 1 when a bar is missed and asked for, or when it could not run. `options` has a `seed`.

    `settings`: of the stack whose state is in this folder.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="sublet-run-", ignore_cleanup_errors=True) as folder:
            report = anyio.run(_run, options, settings(Path(folder)), measure, backend_options={"use_uvloop": True})
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
    progress.say(f"starting a stack; software GPUs: {settings.gpu_count}; seed {options.seed}")
    report: Report | None = None
    async with running(settings) as stack:
        seed = read_seed(stack.folder.keys, ADMINISTRATOR)
        async with NatsBus(stack.nats_url, seed, ADMINISTRATOR) as bus:
            history = History(bus)
            async with history.following():
                report = await measure(options, stack, history, progress)
        progress.say("stopping the stack")
    return report

"""``python -m benchmarks bus``: what the bus costs beside its client library alone, and what it keeps when servers die.

Every comparison is with nats-py as its users have it: the same version, event loop, server, stream, payload and
connection settings, in the same run, in rounds that take turns, so that whatever else the machine does meets both. A
ratio is the median of the rounds' ratios. Sections (`benchmarks.sections`) are modules of their own, ``bus_<name>``.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from benchmarks import sections
from benchmarks.options import Parser
from benchmarks.progress import Progress
from benchmarks.report import Report, commit

SECTIONS: Final = {
    "publish": "many stored messages on their way at once, typed, beside publish_async",
    "read": "an ordered read of a stream to typed facts, beside the ordered consumer",
    "append": "one checked append after the other, awaited, beside js.publish",
    "commit": "facts a second of one writer, in atomic batches, on disk",
    "kills": "the server killed a hundred times under load: nothing acknowledged is lost",
    "leader": "a cluster of three loses its leader under load: how long appends wait, and whether any is lost",
    "rivals": "two instances of one writer race on that cluster: history stays one line",
    "rebuild": "20,000 replicas' history folded by the real cores, and starts from snapshots",
}
"""{name: what it measures}, in the order in which they run."""
LOOPS: Final = ("uvloop", "asyncio")


def _parser() -> Parser:
    names = "\n".join(f"  {name:<9} {summary}" for name, summary in SECTIONS.items())
    parser = Parser(
        prog="python -m benchmarks bus",
        description=f"The bus beside nats-py alone, and under faults. Sections:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", choices=SECTIONS, action="append", metavar="SECTION", help="run this section; may be given again")
    add("--quick", action="store_true", help="a few seconds, to try it: the figures mean little")
    add("--loop", choices=LOOPS, default=LOOPS[0], help="event loop of both sides (default: %(default)s, as services)")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"{options.json} cannot be written: there is no folder {options.json.resolve().parent}")
    report = anyio.run(_run, options, backend_options={"use_uvloop": options.loop == "uvloop"})
    print(report.table())
    if options.json:
        report.write(options.json)
    if options.check and report.missed:
        print(f"missed: {', '.join(bar.name for bar in report.missed)}", file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> Report:
    names = [name for name in SECTIONS if name in (options.only or SECTIONS)]
    with tempfile.TemporaryDirectory(prefix="sublet-bench-", ignore_cleanup_errors=True) as folder:
        collected = await sections.run("bus", names, folder=Path(folder), is_quick=options.quick, progress=Progress())
    notes = [f"Event loop: {options.loop}.", *collected.notes]
    if options.quick:
        notes.append("A quick run: its figures mean little.")
    return Report(
        benchmark="bus", label="host", commit=commit(), figures=collected.figures, bars=collected.bars, notes=notes
    )

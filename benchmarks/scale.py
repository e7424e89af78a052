"""``python -m benchmarks scale``: placement for 4,000 GPUs over a real server, beside what KAI published for as many.

500 stand-in node agents with 8 GPUs each in this process (`benchmarks.scale_agents`), the real placement service in its
own, a real nats-server that syncs before it acknowledges. Sections (`benchmarks.sections`) are modules of their own,
``scale_<name>``.
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
    "core": "the same fill through the pure core, without a bus",
    "fill": "4,000 one-GPU deployments, and the verdict for one more",
    "gang": "one gang of 512 replicas, and one deployment of 4,000",
    "reclaim": "a cluster full of preemptible jobs gives one GPU to a model, then all",
}
"""{name: what it measures}, in the order in which they run."""


def _parser() -> Parser:
    names = "\n".join(f"  {name:<9} {summary}" for name, summary in SECTIONS.items())
    parser = Parser(
        prog="python -m benchmarks scale",
        description=f"Placement on 500 nodes with 8 GPUs each, over a real server. Sections:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", choices=SECTIONS, action="append", metavar="SECTION", help="run this section; may be given again")
    add("--quick", action="store_true", help="8 nodes instead of 500, to try it: the figures mean little")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"{options.json} cannot be written: there is no folder {options.json.resolve().parent}")
    report = anyio.run(_run, options, backend_options={"use_uvloop": True})
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
        collected = await sections.run("scale", names, folder=Path(folder), is_quick=options.quick, progress=Progress())
    notes = [*dict.fromkeys(collected.notes)]
    if options.quick:
        notes.append("A quick run on 8 nodes: its figures mean little.")
    return Report(
        benchmark="scale", label="host", commit=commit(), figures=collected.figures, bars=collected.bars, notes=notes
    )

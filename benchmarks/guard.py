"""``python -m benchmarks guard``: what processes that take all they can get are left by each way to hold them.

Everything runs on the software GPU, with the node agent's own guard, holder and memory broker. Sections
(`benchmarks.sections`) are modules of their own, ``guard_<name>``; one that is not there yet is left out.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from benchmarks import guard_stage, sections
from benchmarks.progress import Progress
from benchmarks.report import Report, commit

SECTIONS: Final = {
    "backends": "eight greedy processes against each grade: bytes beyond the grant, and whether an owner is served",
    "race": "an owner's memory given free while a borrower tries to take it: the naive way, and frozen first",
    "watch": "what only the watchdog holds: how long an offender keeps what it took, and that no neighbour is stopped",
    "tenants": "bytes of another tenant in memory that is lent on",
    "giveback": "how soon a borrower has given back, step by step",
}
"""{name: what it measures}, in the order in which they run."""


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<9} {summary}" for name, summary in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks guard",
        description=f"Isolation on the software GPU. Sections:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", choices=SECTIONS, action="append", metavar="SECTION", help="run this section; may be given again")
    add("--quick", action="store_true", help="to try it: fewer rounds, so bars of counts are missed")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    options = _parser().parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        print(f"error: {options.json} cannot be written: there is no such folder", file=sys.stderr)
        return 2
    try:
        report = anyio.run(_run, options)
    finally:
        guard_stage.remove_host()
    print(report.table())
    if options.json:
        report.write(options.json)
    if options.check and report.missed:
        print(f"missed: {', '.join(bar.name for bar in report.missed)}", file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> Report:
    chosen = options.only or [name for name in SECTIONS if importlib.util.find_spec(f"benchmarks.guard_{name}")]
    names = [name for name in SECTIONS if name in chosen]
    # A socket's path is limited to 107 characters.
    with tempfile.TemporaryDirectory(prefix="guard-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        collected = await sections.run("guard", names, folder=Path(folder), is_quick=options.quick, progress=Progress())
    notes = list(collected.notes)
    if options.quick:
        notes.append("A quick run: its figures mean little.")
    return Report(
        benchmark="guard",
        label="software GPU",
        commit=commit(),
        figures=collected.figures,
        bars=collected.bars,
        notes=notes,
    )

"""Planted faults: how many seeds the checks need until they notice each fault that was put in on purpose."""

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit
from tests.properties.planted.catalogue import BUGS, SOUND
from tests.properties.planted.search import Found, search, table

FAULTS_MIN: Final = 25
MEDIAN_SEEDS_MAX: Final = 20
WORST_SEEDS_MAX: Final = 2000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks planted", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--seeds", type=int, default=WORST_SEEDS_MAX, help="at most, for each fault")
    parser.add_argument("--sound", type=int, default=300, help="seeds that must find nothing where nothing is planted")
    parser.add_argument("--only", default="", help="faults with this in their name")
    parser.add_argument(
        "--quick", action="store_true", help="at most 20 seeds for each, and 20 where nothing is planted"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.seeds = options.sound = 20
    bugs = [bug for bug in BUGS if options.only in bug.name]
    if not bugs or options.seeds < 1 or options.sound < 0:
        print("error: --only must be part of a fault's name, --seeds 1 at least, --sound 0 at least", file=sys.stderr)
        return 2
    if options.json and not options.json.resolve().parent.is_dir():
        print(f"error: {options.json} cannot be written: there is no such folder", file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)  # Services that rebuild themselves say so, thousands of times.
    progress = Progress()
    found = []
    for bug in bugs:
        progress.say(f"looking for {bug.name}")
        found.append(search(bug, seeds_max=options.seeds))
    progress.say("the same where nothing is planted")
    alarms = [f for f in (search(sound, seeds_max=options.sound) for sound in SOUND) if f.seed_count is not None]
    report = report_of(found, alarms, sound_seed_count=options.sound * len(SOUND))
    print(table(found))
    print(report.table())
    if options.json:
        report.write(options.json)
    return 1 if options.check and report.missed else 0


def report_of(found: Sequence[Found], alarms: Sequence[Found], *, sound_seed_count: int) -> Report:
    counts = [f.seed_count for f in found if f.seed_count is not None]
    figures: dict[str, Value] = {
        "planted_count": len(found),
        "missed_count": len(found) - len(counts),
        "seeds_median_count": statistics.median(counts) if counts else None,
        "seeds_worst_count": max(counts, default=None),
        "sound_seed_count": sound_seed_count,
        "false_alarm_count": len(alarms),
    }
    return Report(
        benchmark="planted",
        label="simulated",
        commit=commit(),
        figures=figures,
        bars=[
            Bar(name="planted_count", value=figures["planted_count"], op=">=", bar=FAULTS_MIN),
            Bar(name="missed_count", value=figures["missed_count"], op="==", bar=0),
            Bar(name="seeds_median_count", value=figures["seeds_median_count"], op="<=", bar=MEDIAN_SEEDS_MAX),
            Bar(name="seeds_worst_count", value=figures["seeds_worst_count"], op="<=", bar=WORST_SEEDS_MAX),
            Bar(name="false_alarm_count", value=figures["false_alarm_count"], op="==", bar=0),
        ],
        notes=[f"false alarm at seed {f.seed_count}: {f.reason[:200]}" for f in alarms],
    )

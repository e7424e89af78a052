"""``python -m benchmarks engine-model``: the engine model against published figures that it was not fitted on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from benchmarks import engine_article, engine_fit, engine_llm_d, engine_reference, engine_sharing
from benchmarks.engine_page import FamilyRun, Fit, GroupRun, picture, text
from benchmarks.engine_rows import Family, Group
from benchmarks.options import Parser
from benchmarks.progress import Progress
from benchmarks.report import WIDTH, Bar, Report, Value, commit

FAMILIES: Final[tuple[Family, ...]] = (
    *engine_article.FAMILIES,
    *engine_sharing.FAMILIES,
    *engine_reference.FAMILIES,
    *engine_llm_d.FAMILIES,
)
MEDIAN_ERROR_PERCENT_MAX: Final = 15
QUICK_PART: Final = 0.25
"""Of the published number of requests."""
PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "engine-model.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All comparisons, and how well the fit reproduces its own figures."""

    families: tuple[FamilyRun, ...]
    fit: Fit

    @property
    def groups(self) -> tuple[GroupRun, ...]:
        """All judged rows, in the families that the bar is for."""
        return tuple(
            GroupRun(group=group, runs=tuple(run for run in self.families if run.family.group == group))
            for group in get_args(Group)
        )

    def report(self) -> Report:
        figures: dict[str, Value] = {
            "fit_rows_count": len(self.fit.rows),
            "fit_median_error_percent": round(100 * self.fit.median_error, 2),
        }
        bars = []
        for group in self.groups:
            name = f"family_{group.group}_median_error_percent"
            figures[f"family_{group.group}_rows_count"] = len(group.rows)
            figures[name] = round(100 * group.median_error, 2)
            figures[f"family_{group.group}_worst_error_percent"] = round(100 * group.worst.error, 2)
            bars.append(Bar(name=name, value=figures[name], op="<=", bar=MEDIAN_ERROR_PERCENT_MAX))
        for run in self.families:
            name = f"{run.family.name}_median_error_percent"
            figures[f"{run.family.name}_rows_count"] = len(run.rows)
            figures[name] = round(100 * run.median_error, 2)
            figures[f"{run.family.name}_worst_error_percent"] = round(100 * run.worst.error, 2)
            if run.family.is_judged:
                bars.append(Bar(name=name, value=figures[name], op="<=", bar=MEDIAN_ERROR_PERCENT_MAX))
        missed = [
            run for run in self.families if run.family.is_judged and 100 * run.median_error > MEDIAN_ERROR_PERCENT_MAX
        ]
        notes = ["A model against figures of others; nothing was measured here. docs/engine-model.md has all rows."]
        notes += [f"{run.family.name}: {run.family.is_wrong_because}" for run in missed]
        return Report(
            benchmark="engine-model", label="simulated", commit=commit(), figures=figures, bars=bars, notes=notes
        )


def compared(part: float = 1.0, progress: Progress | None = None) -> Outcome:
    """All families, with that part of the published number of requests."""
    runs = []
    for family in FAMILIES:
        if progress is not None:
            progress.say(family.title)
        runs.append(FamilyRun(family=family, rows=tuple(family.rows(part))))
    return Outcome(families=tuple(runs), fit=Fit(rows=tuple(engine_fit.residuals())))


def table(run: FamilyRun) -> str:
    """One family for a terminal."""
    lines = [f"{run.family.title}: median error {100 * run.median_error:.1f} %", ""]
    for row in run.rows:
        what = row.what if len(row.what) <= WIDTH - 34 else row.what[: WIDTH - 35] + "…"
        lines.append(f"  {what:<{WIDTH - 34}}{row.measured:>10.4g}{row.modelled:>10.4g}{100 * row.error:>+9.1f} %")
    return "\n".join([*lines, ""])


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks engine-model",
        description="The engine model in virtual time, against published figures that it was not fitted on.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_PART:g} of the published number of requests")
    add("--docs", action="store_true", help=f"write {PAGE.name} and its picture into docs/")
    add("--fit", action="store_true", help="only fit the parameters of the GPUs again, and print them")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    options = _parser().parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        print(f"error: {options.json} cannot be written: its folder does not exist", file=sys.stderr)
        return 2
    if options.docs and options.quick:
        print("error: the page shows the whole comparison; leave --quick out", file=sys.stderr)
        return 2
    if options.fit:
        for family in engine_fit.FAMILIES:
            print(family, " ".join(f"{name}={value:g}" for name, value in engine_fit.fitted(family).items()))
        return 0
    outcome = compared(QUICK_PART if options.quick else 1.0, Progress())
    for run in outcome.families:
        print(table(run))
    report = outcome.report()
    print(report.table())
    if options.json:
        report.write(options.json)
    if options.docs:
        PAGE.write_text(text(outcome.groups, outcome.families, outcome.fit), encoding="utf-8")
        PAGE.with_suffix(".svg").write_text(picture(outcome.families), encoding="utf-8")
    return 1 if options.check and report.missed else 0

"""``python -m benchmarks swap``: how long requests wait because their model has to come back, for each policy."""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.options import Parser
from benchmarks.placement_run import seeds_of
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit, quantile
from benchmarks.swap_bound import Belady, bound_added_s_mean
from benchmarks.swap_traces import LENGTHS, RECIPES, TRACE, Arrivals, made, read_arrivals
from benchmarks.swap_world import Tally, World, dealt
from benchmarks.trace import TraceError
from services.swapper.policies import CLASSIC, DEFAULT_POLICY, POLICIES

OVER_BEST_CLASSIC_MAX: Final = 1.03
OVER_BELADY_MAX: Final = 1.10
FLOOR_S: Final = 0.001
"""Added to both sides of a ratio, so that waits of a millisecond decide nothing."""
HEADER: Final = f"{'':<12}{'loads':>9}{'warm':>8}{'mean':>8}{'p95':>7}{'p99':>7}{'>1 s':>8}{'held':>8}{'link':>8}"
TOLD: Final = (
    "warm: % of requests that did not wait. mean ms, p95 and p99 s: model ready minus",
    "arrival. >1 s: % of requests. held: GB of GPUs, with room for KV. link: % busy.",
    "Virtual time, means over the seeds, which deal the sizes of weights. belady knows",
    "the future, is greedy and brings nothing back ahead. bound: load time that no",
    "policy can save that brings nothing back ahead, every load done at once.",
)
GPU_COUNTS_BY_DEFAULT: Final = {"": (2, 4, 8), "zipf": (2, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace on so many GPUs, with the runs of each policy, one for each seed."""

    arrivals: Arrivals
    gpu_count: int
    runs: dict[str, list[Tally]]
    belady: list[Tally]
    bounds_s: list[float]

    @property
    def name(self) -> str:
        return f"{self.arrivals.name.replace('-', '_')}_g{self.gpu_count}"

    def added_s(self, policy: str) -> float:
        return statistics.fmean(run.added_s_mean for run in self.runs[policy])

    @property
    def belady_added_s(self) -> float:
        return statistics.fmean(run.added_s_mean for run in self.belady)

    @property
    def best_classic(self) -> str | None:
        """None where not all of them ran."""
        if any(policy not in self.runs for policy in CLASSIC):
            return None
        return min(CLASSIC, key=lambda policy: (self.added_s(policy), policy))

    def over_belady(self, policy: str) -> float:
        return (self.added_s(policy) + FLOOR_S) / (self.belady_added_s + FLOOR_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    cases: list[Case]
    policies: list[str]
    """Those asked for; the classic ones ran besides, where bars need them."""

    def report(self) -> Report:
        figures: dict[str, Value] = {}
        for case in self.cases:
            place = f"{case.name}_" if len(self.cases) > 1 else ""
            for policy in self.policies:
                prefix = place + (f"{policy.replace('-', '_')}_" if len(self.policies) > 1 else "")
                figures |= _figures(prefix, case.runs[policy])
            figures[f"{place}belady_added_latency_s_mean"] = round(case.belady_added_s, 6)
            figures[f"{place}belady_loads_mean"] = round(statistics.fmean(r.load_count for r in case.belady), 1)
            figures[f"{place}bound_added_latency_s_mean"] = round(statistics.fmean(case.bounds_s), 6)
        bars = list(self._bars())
        figures |= {bar.name: bar.value for bar in bars}
        return Report(benchmark="swap", label="simulated", commit=commit(), figures=figures, bars=bars)

    def _bars(self) -> Iterable[Bar]:
        """Of the default policy, where the classic ones ran too."""
        judged = [case for case in self.cases if case.best_classic is not None and DEFAULT_POLICY in case.runs]
        if DEFAULT_POLICY in CLASSIC or not judged:
            return
        for case in judged:
            place = f"{case.name}_" if len(self.cases) > 1 else ""
            over = case.added_s(DEFAULT_POLICY) / max(1e-9, case.added_s(case.best_classic or ""))
            yield Bar(name=f"{place}over_best_classic", value=round(over, 4), op="<=", bar=OVER_BEST_CLASSIC_MAX)
        mean = math.exp(statistics.fmean(math.log(case.over_belady(DEFAULT_POLICY)) for case in judged))
        yield Bar(name="over_belady_geometric_mean", value=round(mean, 4), op="<=", bar=OVER_BELADY_MAX)

    def table(self) -> str:
        """For a terminal: a block for each case, a line for each policy."""
        report = self.report()
        lines = [f"swap · {report.label} · commit {report.commit}"]
        for case in self.cases:
            gpus = f"{case.gpu_count} GPU{'s' if case.gpu_count > 1 else ''}"
            lines += ["", f"  {case.arrivals.name}, {gpus}, {len(case.arrivals.requests):,} requests", f"  {HEADER}"]
            lines += [_row(policy, runs) for policy, runs in case.runs.items()]
            lines += [_row("belady", case.belady), f"  {'bound':<12}{1000 * statistics.fmean(case.bounds_s):>25.2f}"]
        if report.bars:
            lines += ["", f"  {'bar':<46}{'value':>8}  {'wanted':<10}met"]
        for bar in report.bars:
            lines.append(f"  {bar.name:<46}{bar.value:>8.3f}  {bar.op} {bar.bar:<7}{'yes' if bar.is_met else 'NO'}")
        return "\n".join([*lines, "", *(f"  {line}" for line in TOLD)])


def _row(policy: str, runs: Sequence[Tally]) -> str:
    figures = _figures("", runs)
    kinds = (
        ("loads_mean", 9, 0),
        ("warm_hit_percent", 8, 2),
        ("added_latency_s_mean", 8, 2),
        ("added_latency_s_p95", 7, 2),
        ("added_latency_s_p99", 7, 2),
        ("over_1s_percent", 8, 2),
        ("resident_gb_mean", 8, 0),
        ("link_busy_percent", 8, 2),
    )
    line = f"  {policy:<12}"
    for name, width, digits in kinds:
        value = (figures[name] or 0.0) * (1000 if name == "added_latency_s_mean" else 1)
        line += f"{value:>{width},.{digits}f}"
    return line


def _figures(prefix: str, runs: Sequence[Tally]) -> dict[str, Value]:
    def mean(values: Iterable[float], digits: int) -> float:
        return round(statistics.fmean(values), digits)

    figures: dict[str, Value] = {
        f"{prefix}loads_mean": mean((run.load_count for run in runs), 1),
        f"{prefix}warm_hit_percent": mean((run.warm_hit_percent for run in runs), 3),
        f"{prefix}added_latency_s_mean": mean((run.added_s_mean for run in runs), 6),
    }
    for percent in (50, 95, 99):
        quantiles = (quantile(run.added_s, percent / 100) or 0.0 for run in runs)
        figures[f"{prefix}added_latency_s_p{percent}"] = mean(quantiles, 4)
    figures[f"{prefix}over_1s_percent"] = mean((run.over_1s_percent for run in runs), 3)
    figures[f"{prefix}resident_gb_mean"] = mean((run.resident_gb_mean for run in runs), 2)
    figures[f"{prefix}link_busy_percent"] = mean((run.link_busy_percent for run in runs), 3)
    return figures


def measure(
    traces: Sequence[tuple[Arrivals, Sequence[int]]],
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    with_classic: bool,
    progress: Progress,
) -> Outcome:
    """All traces on all their GPU counts."""
    ran = list(
        dict.fromkeys([*policies, *(CLASSIC if with_classic else ()), *([DEFAULT_POLICY] if with_classic else [])])
    )
    cases = []
    for arrivals, gpu_counts in traces:
        sizes = {seed: dealt(arrivals.models, seed=seed) for seed in seeds}
        for gpu_count in gpu_counts:
            runs: dict[str, list[Tally]] = {}
            for policy in ran:
                make = POLICIES[policy]
                runs[policy] = [
                    World(sizes[seed], gpu_count=gpu_count, policy=make()).run(arrivals.requests) for seed in seeds
                ]
                mean_ms = 1000 * statistics.fmean(run.added_s_mean for run in runs[policy])
                progress.say(f"{arrivals.name}, {gpu_count} GPUs: {policy} adds {mean_ms:.2f} ms on average")
            belady = [
                World(sizes[seed], gpu_count=gpu_count, policy=Belady(arrivals.requests)).run(arrivals.requests)
                for seed in seeds
            ]
            bounds_s = [bound_added_s_mean(arrivals.requests, sizes[seed], gpu_count=gpu_count) for seed in seeds]
            progress.say(f"{arrivals.name}, {gpu_count} GPUs: Belady and the bound are done")
            case = Case(arrivals=arrivals, gpu_count=gpu_count, runs=runs, belady=belady, bounds_s=bounds_s)
            cases.append(case)
    return Outcome(cases=cases, policies=list(policies))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks swap",
        description="Many models on few GPUs in virtual time, with the swapper's own decisions.",
    )
    made_names = ", ".join(RECIPES)
    add = parser.add_argument
    add("--trace", type=Path, metavar="CSV", nargs="+", help="columns t_s, model, input_tokens, output_tokens")
    add("--make", metavar="NAME", nargs="+", choices=list(RECIPES), help=f"a made trace instead: {made_names}")
    add("--lengths", type=Path, metavar="CSV", help=f"token lengths for made traces (default: {LENGTHS.name})")
    add("--gpus", metavar="N", help="so many GPUs, or several counts: 2,4,8 (default: as the bars say)")
    add("--policy", default=DEFAULT_POLICY, metavar="P", help=f"all, or some of: {', '.join(POLICIES)}")
    add("--time-scale", type=float, default=1.0, metavar="X", help="arrivals come X times as fast (default: 1)")
    add("--seeds", default="1-5", metavar="A-B", help="that deal the sizes of weights (default: 1-5)")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="run the classic policies too; exit status 1 when a bar is missed")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    """Raises `ValueError`."""
    parts = [part.strip() for part in text.split(",")]
    if any(not part.isdecimal() or int(part) < 1 for part in parts):
        raise ValueError(f"'{text}' is not a number of GPUs such as 4, or several such as 2,4,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _policies(text: str) -> list[str]:
    """Raises `ValueError`."""
    names = list(POLICIES) if text == "all" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in POLICIES]:
        raise ValueError(f"there is no policy '{unknown[0]}'; there is: all, {', '.join(POLICIES)}")
    return list(dict.fromkeys(names))


def _traces(options: argparse.Namespace, counts: Sequence[int] | None) -> list[tuple[Arrivals, Sequence[int]]]:
    """Without --trace and --make: the cases of the bars. Raises `TraceError`."""
    paths, names = options.trace or [], options.make or []
    if not paths and not names:
        paths, names = [TRACE], ["zipf"]
    traces = [
        *(read_arrivals(path, time_scale=options.time_scale) for path in paths),
        *(made(name, options.lengths or LENGTHS, time_scale=options.time_scale) for name in names),
    ]
    if len({arrivals.name for arrivals in traces}) < len(traces):
        raise TraceError("two of the traces have the same name")
    default = GPU_COUNTS_BY_DEFAULT
    return [(arrivals, counts or default.get(arrivals.name, default[""])) for arrivals in traces]


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    parser = _parser()
    options = parser.parse_args(arguments)
    parser.check_folder("--json", options.json)
    if not 0 < options.time_scale < float("inf"):
        parser.error(f"--time-scale: arrivals come so many times as fast, so more than 0, not {options.time_scale}")
    counts = None if options.gpus is None else parser.value("--gpus", _counts, options.gpus)
    policies = parser.value("--policy", _policies, options.policy)
    seeds = parser.value("--seeds", seeds_of, options.seeds)
    try:
        traces = _traces(options, counts)
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcome = measure(traces, policies, seeds, with_classic=options.check, progress=Progress())
    report = outcome.report()
    print(outcome.table())
    if options.json:
        report.write(options.json)
    return 1 if options.check and report.missed else 0

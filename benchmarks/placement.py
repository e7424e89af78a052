"""``python -m benchmarks placement``: how much of a cluster's GPUs each policy allocates, and what a decision costs."""

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import placement_page
from benchmarks.openb import Cluster, InputError, PodList, read_cluster, read_pods
from benchmarks.options import Parser
from benchmarks.placement_moves import Moves
from benchmarks.placement_run import Runs, carry_out, differences, seeds_of
from benchmarks.progress import Progress
from benchmarks.published import CEILING_PERCENT, PROTOTYPE_PERCENT, PUBLISHED_PERCENT
from benchmarks.report import Bar, Report, Value, commit
from services.placement.packing import compiled
from services.placement.packing.policies import DEFAULT_POLICY, POLICIES, Random, policy_named

DATA: Final = Path(__file__).resolve().parents[2] / "shared" / "data" / "openb"
NODES: Final = "openb_node_list_gpu_node.csv.gz"
REPRODUCED: Final = ("random", "dot-product", "best-fit")
"""On `default` these must come out as published."""
REPRODUCED_POINTS_MAX: Final = 0.3
DECISION_US_P50_MAX: Final = 50
DECISION_US_P99_MAX: Final = 500
GROWTH_MAX: Final = 2
SCALED_RUN_COUNT: Final = 3
"""Of each size; their median counts."""
SCALE: Final = 10
"""For the page: the node list so many times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All runs of one call."""

    seeds: tuple[int, ...]
    runs: tuple[Runs, ...]
    scaled: tuple[tuple[Runs, Runs], ...] = ()
    """(as it is, on the larger cluster): each policy on one list with the first seed, a few times."""
    scale: int = 1
    migrate: int = 0
    """So many pods may be moved after an arrival that fits nowhere."""
    unmoved: tuple[Runs, ...] = ()
    """With moves: the same without, in the same order."""
    is_compiled: bool
    notes: list[str] = field(default_factory=list)

    def find(self, pods: str, policy: str) -> Runs | None:
        return next((runs for runs in self.runs if (runs.pods, runs.policy) == (pods, policy)), None)

    @property
    def lists(self) -> list[str]:
        return list(dict.fromkeys(runs.pods for runs in self.runs))

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(runs.policy for runs in self.runs))

    def prefix(self, runs: Runs) -> str:
        """Before a figure's name: nothing where there is only one list, or one policy."""
        pods = f"{runs.pods}_" if len(self.lists) > 1 else ""
        policy = f"{runs.policy.replace('-', '_')}_" if len(self.policies) > 1 else ""
        return pods + policy

    def report(self) -> Report:
        figures: dict[str, Value] = {}
        series: dict[str, dict[str, Value]] = {}
        for runs in self.runs:
            prefix = self.prefix(runs)
            figures[f"{prefix}allocated_percent_mean"] = round(runs.allocated_percent, 3)
            series[f"{prefix}allocated_percent_by_seed"] = {
                str(run.seed): round(run.allocated_percent, 3) for run in runs.runs
            }
            figures[f"{prefix}decision_us_p50"] = round(runs.decision_us(50), 2)
            figures[f"{prefix}decision_us_p99"] = round(runs.decision_us(99), 2)
            figures[f"{prefix}decision_us_mean"] = round(runs.decision_us_mean, 2)
            figures[f"{prefix}run_s"] = round(runs.run_s, 4)
        for runs, unmoved in zip(self.runs, self.unmoved, strict=bool(self.unmoved)):
            prefix = self.prefix(runs)
            figures[f"{prefix}moved_count"] = round(runs.moved_count, 1)
            figures[f"{prefix}repack_frees_percent_at_most"] = round(unmoved.repack_frees_percent, 3)
            figures[f"{prefix}moves_gain_points"] = round(statistics.fmean(differences(runs, unmoved)), 3)
            if runs.pods in CEILING_PERCENT:
                gap = CEILING_PERCENT[runs.pods] - unmoved.allocated_percent
                figures[f"{prefix}ceiling_gap_points"] = round(gap, 3)
        for small, large in self.scaled:
            prefix = self.prefix(small).removeprefix(f"{small.pods}_")
            figures[f"{prefix}scaled_decision_us_p50"] = round(large.decision_us(50), 2)
            figures[f"{prefix}scaled_decision_us_p99"] = round(large.decision_us(99), 2)
            figures[f"{prefix}scaled_decision_us_mean"] = round(large.decision_us_mean, 2)
            figures[f"{prefix}decision_us_growth"] = round(_growth(small, large), 3)
        bars = [] if self.migrate else [*self._reproduced(), *self._ahead(), *self._fast(figures)]
        figures |= {bar.name: bar.value for bar in bars if bar.name not in figures}
        return Report(
            benchmark="placement",
            label="simulated",
            commit=commit(),
            figures=figures,
            series=series,
            bars=bars,
            notes=[*self._told(), *self.notes],
        )

    def _reproduced(self) -> Iterable[Bar]:
        for policy in REPRODUCED:
            runs = self.find("default", policy)
            if runs is not None:
                off = abs(runs.allocated_percent - PUBLISHED_PERCENT["default"][policy])
                name = f"default_{policy.replace('-', '_')}_off_published_points"
                yield Bar(name=name, value=round(off, 3), op="<=", bar=REPRODUCED_POINTS_MAX)

    def _ahead(self) -> Iterable[Bar]:
        for pods in self.lists:
            ours = self.find(pods, DEFAULT_POLICY)
            if ours is None:
                continue
            mean = round(ours.allocated_percent, 3)
            if pods in PUBLISHED_PERCENT:
                over = round(ours.allocated_percent - PUBLISHED_PERCENT[pods]["fgd"], 3)
                yield Bar(name=f"{pods}_over_published_fgd_points", value=over, op=">", bar=0)
            if pods in PROTOTYPE_PERCENT:
                yield Bar(name=f"{pods}_allocated_percent", value=mean, op=">=", bar=PROTOTYPE_PERCENT[pods])
            fgd = self.find(pods, "fgd")
            if fgd is not None:
                over = round(statistics.fmean(differences(ours, fgd)), 3)
                yield Bar(name=f"{pods}_over_own_fgd_points", value=over, op=">", bar=0)

    def _fast(self, figures: dict[str, Value]) -> Iterable[Bar]:
        ours = [runs for runs in self.runs if runs.policy == DEFAULT_POLICY] or self.runs[:1]
        for percent, bar in ((50, DECISION_US_P50_MAX), (99, DECISION_US_P99_MAX)):
            slowest = max(runs.decision_us(percent) for runs in ours)
            name = (
                f"{self.prefix(ours[0])}decision_us_p{percent}" if len(ours) == 1 else f"worst_decision_us_p{percent}"
            )
            yield Bar(name=name, value=round(slowest, 2), op="<=", bar=bar)
        for small, large in self.scaled:
            if small.policy != ours[0].policy:
                continue
            growth = _growth(small, large)
            prefix = self.prefix(small).removeprefix(f"{small.pods}_")
            yield Bar(name=f"{prefix}decision_us_growth", value=round(growth, 3), op="<", bar=GROWTH_MAX)

    def _told(self) -> Iterable[str]:
        yield (
            "Clusters and pods are the files'; decision times are of this host, one thread, garbage collection off. A "
            "decision is choosing and taking, the index's upkeep included. Left out: reading files, and rating each "
            "class once before the first arrival, as a service does when a deployment is admitted."
        )
        if self.migrate:
            yield (
                f"After an arrival that fits nowhere up to {self.migrate} pods may move, which the published protocol "
                "forbids: no bars. Decision times are without the moves, run_s is with them."
            )
        if not self.is_compiled:
            yield "numba is not installed: the index ran uncompiled, and the bars for speed are not for that."


def measure(
    cluster: Cluster,
    lists: Sequence[PodList],
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    scale: int = 1,
    migrate: int = 0,
    progress: Progress,
) -> Outcome:
    """Each policy on each list, each seed; and on a larger cluster one seed of `default`, else of the first list."""
    is_compiled = compiled.prepare()
    timed = next((pods for pods in lists if pods.name == "default"), lists[0])
    done: list[Runs] = []
    unmoved: list[Runs] = []
    scaled: list[tuple[Runs, Runs]] = []
    for policy in policies:
        for pods in lists:
            runs = Runs(
                pods=pods.name,
                policy=policy,
                runs=tuple(carry_out(cluster, pods, policy, seed, is_compiled=is_compiled) for seed in seeds),
            )
            if migrate:
                unmoved.append(runs)
                runs = _with_moves(cluster, pods, policy, seeds, migrate, is_compiled=is_compiled)
            done.append(runs)
            progress.say(
                f"{pods.name:<12} {policy:<12} {runs.allocated_percent:6.2f} % allocated, {len(seeds)} seeds, "
                f"p50 {runs.decision_us(50):.1f} us, p99 {runs.decision_us(99):.1f} us"
            )
        if scale > 1 and policy != Random.name:  # It looks at every node, and is for comparison only.
            pair = _pair(cluster, timed, policy, seeds[0], scale, is_compiled=is_compiled)
            scaled.append(pair)
            progress.say(f"{policy}: {scale} times the nodes cost {_growth(*pair):.2f} times as much a decision")
    for each in (done, unmoved):  # Stable: by list, then by policy.
        each.sort(key=lambda runs: [pods.name for pods in lists].index(runs.pods))
    return Outcome(
        seeds=tuple(seeds),
        runs=tuple(done),
        scaled=tuple(scaled),
        scale=scale,
        migrate=migrate,
        unmoved=tuple(unmoved),
        is_compiled=is_compiled,
    )


def _with_moves(
    cluster: Cluster, pods: PodList, policy: str, seeds: Sequence[int], move_count_max: int, *, is_compiled: bool
) -> Runs:
    runs = [
        carry_out(cluster, pods, policy, seed, is_compiled=is_compiled, mover=Moves(move_count_max)) for seed in seeds
    ]
    return Runs(pods=pods.name, policy=policy, runs=tuple(runs))


def _pair(
    cluster: Cluster, pods: PodList, policy: str, seed: int, scale: int, *, is_compiled: bool
) -> tuple[Runs, Runs]:
    """As it is and on the larger cluster, in turns: the host may be busier or idler from one moment to the next."""
    sizes = (cluster, cluster.times(scale))
    turns = [
        [carry_out(size, pods, policy, seed, is_compiled=is_compiled) for size in sizes]
        for _ in range(SCALED_RUN_COUNT)
    ]
    small, large = (Runs(pods=pods.name, policy=policy, runs=runs) for runs in zip(*turns, strict=True))
    return small, large


def _growth(small: Runs, large: Runs) -> float:
    return large.decision_us_mean / small.decision_us_mean


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks placement",
        description="The openb packing protocol (FGD, ATC'23): pods arrive until 130 % of the GPUs are asked for.",
    )
    add = parser.add_argument
    add(
        "--nodes",
        type=Path,
        metavar="CSV",
        help=f"columns sn, cpu_milli, memory_mib, gpu, model (default: {DATA.name})",
    )
    add("--pods", type=Path, metavar="CSV", nargs="+", help="columns name, cpu_milli, memory_mib, num_gpu, gpu_milli")
    names = ", ".join(policy.name for policy in POLICIES)
    add(
        "--policy",
        default=DEFAULT_POLICY,
        metavar="P",
        help=f"all, default, or some of: {names} (default: {DEFAULT_POLICY})",
    )
    add("--seeds", default="100-109", metavar="A-B", help="of the order of arrivals (default: 100-109)")
    add("--scale", type=int, default=1, metavar="N", help="also measure decisions on N times the nodes")
    add("--migrate", type=int, default=0, metavar="K", help="move up to K pods for an arrival that fits nowhere")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--docs", action="store_true", help="write the tables and the picture into docs/")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def _inputs(nodes: Path | None, pods: Sequence[Path] | None) -> tuple[Cluster, list[PodList]]:
    """Raises `InputError`."""
    if (nodes is None or pods is None) and not DATA.is_dir():
        raise InputError(f"name --nodes and --pods: the data that is used by default is not there ({DATA})")
    paths = pods if pods is not None else sorted(DATA.glob("openb_pod_list_*.csv.gz"))
    lists = [read_pods(path) for path in paths]
    if len({pods.name for pods in lists}) < len(lists):
        raise InputError("two of the --pods files have the same name")
    return read_cluster(nodes if nodes is not None else DATA / NODES), lists


def _policies(text: str) -> list[str]:
    """Raises `ValueError`."""
    names = [policy.name for policy in POLICIES] if text == "all" else text.split(",")
    return list(dict.fromkeys(policy_named(name.strip()).name for name in names))


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for, 2 for what was asked for wrongly."""
    parser = _parser()
    options = parser.parse_args(arguments)
    parser.check_folder("--json", options.json)
    if options.scale < 1:
        parser.error(f"--scale: a cluster is at least as large as its file says, so 1 or more, not {options.scale}")
    if options.migrate < 0:
        parser.error(f"--migrate: so many pods may be moved for one arrival, so 0 or more, not {options.migrate}")
    if options.migrate and options.docs:
        parser.error("--docs: the page shows the published protocol, which knows no moves; leave --migrate out")
    policies = parser.value("--policy", _policies, options.policy)
    seeds = parser.value("--seeds", seeds_of, options.seeds)
    try:
        cluster, lists = _inputs(options.nodes, options.pods)
        scale = max(options.scale, SCALE) if options.docs else options.scale
        outcome = measure(cluster, lists, policies, seeds, scale=scale, migrate=options.migrate, progress=Progress())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = outcome.report()
    print(report.table())
    if options.json:
        report.write(options.json)
    if options.docs:
        placement_page.write(outcome, report.commit)
    return 1 if options.check and report.missed else 0

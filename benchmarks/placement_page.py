"""The placement part of docs/benchmarks.md, and its picture."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.openb import ARRIVALS_PERCENT
from benchmarks.placement_run import Runs, differences
from benchmarks.published import PROTOTYPE_PERCENT, PUBLISHED_PERCENT
from services.placement.packing.policies import DEFAULT_POLICY

if TYPE_CHECKING:
    from benchmarks.placement import Outcome

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
PAGE: Final = DOCS / "benchmarks.md"
PICTURE: Final = DOCS / "placement.svg"
BEGIN: Final = "<!-- placement: written by `python -m benchmarks placement --policy all --docs` -->"
END: Final = "<!-- end of placement -->"

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 52, 130, 16, 44
X_FROM: Final = 70
"""Percent of arrivals; before, all policies are equal."""
COLOURS: Final = {
    "least-waste": "#d1495b",
    "fgd": "#3d7dca",
    "first-fit": "#2a9d8f",
    "best-fit": "#b8860b",
    "dot-product": "#8f5fbf",
    "spread": "#ff7f51",
    "random": "#868e96",
}
OTHER_COLOUR: Final = "#d1495b"
LABEL_GAP: Final = 14


def write(outcome: "Outcome", made_from: str) -> None:
    """Between the marks of the page, and beside it."""
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RuntimeError(f"{PAGE} has no place for this: a line '{BEGIN}' and below it '{END}'")
    PAGE.write_text(f"{before}{BEGIN}\n\n{text(outcome, made_from)}\n{END}{after}", encoding="utf-8")
    PICTURE.write_text(picture(outcome), encoding="utf-8")


def text(outcome: "Outcome", made_from: str) -> str:
    parts = [_allocated(outcome), _ahead(outcome), _speed(outcome)]
    seeds = f"{outcome.seeds[0]} to {outcome.seeds[-1]}" if len(outcome.seeds) > 1 else f"{outcome.seeds[0]}"
    parts.append(f"Seeds {seeds}, commit {made_from}.\n")
    return "\n".join(part for part in parts if part)


def _allocated(outcome: "Outcome") -> str:
    lines = [
        "Percent of all GPU milli allocated at 130 % of arrivals, mean over the seeds; in brackets, as published:",
        "",
        f"| List | {' | '.join(outcome.policies)} |",
        f"|---|{'---|' * len(outcome.policies)}",
    ]
    for pods in outcome.lists:
        cells = []
        for policy in outcome.policies:
            runs = outcome.find(pods, policy)
            published = PUBLISHED_PERCENT.get(pods, {}).get(policy)
            assert runs is not None
            shown = f"{runs.allocated_percent:.2f}" + (f" ({published:.2f})" if published is not None else "")
            cells.append(f"**{shown}**" if policy == DEFAULT_POLICY else shown)
        lines.append(f"| {pods} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ahead(outcome: "Outcome") -> str:
    if DEFAULT_POLICY not in outcome.policies or "fgd" not in outcome.policies:
        return ""
    introduction = (
        f"The default policy, `{DEFAULT_POLICY}`, in points: over FGD as published, over our own FGD seed by seed, and "
        "over what our first prototype had reached:"
    )
    lines = [
        introduction,
        "",
        "| List | allocated | over published FGD | over own FGD, mean (worst seed) | over the prototype |",
        "|---|---|---|---|---|",
    ]
    for pods in outcome.lists:
        ours, fgd = outcome.find(pods, DEFAULT_POLICY), outcome.find(pods, "fgd")
        assert ours is not None
        assert fgd is not None
        over = differences(ours, fgd)
        published, prototype = PUBLISHED_PERCENT.get(pods), PROTOTYPE_PERCENT.get(pods)
        lines.append(
            f"| {pods} | {ours.allocated_percent:.2f} ± {ours.spread_percent:.2f} | "
            f"{_points(ours.allocated_percent - published['fgd']) if published else ''} | "
            f"{_points(statistics.fmean(over))} ({_points(min(over))}) | "
            f"{_points(ours.allocated_percent - prototype) if prototype else ''} |"
        )
    return "\n".join([*lines, ""])


def _points(value: float) -> str:
    return f"{value:+.2f}"


def _speed(outcome: "Outcome") -> str:
    pods = "default" if "default" in outcome.lists else outcome.lists[0]
    scaled = {small.policy: (small, large) for small, large in outcome.scaled}
    introduction = (
        f"What one decision costs, in µs, on `{pods}`: median over the seeds; and on {outcome.scale} times the nodes, "
        "median of three runs of one seed. Growth is that of the mean, the two sizes measured in turns:"
    )
    lines = [
        introduction,
        "",
        f"| Policy | p50 | p99 | mean | p50 x{outcome.scale} | p99 x{outcome.scale} | mean x{outcome.scale} | growth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy in outcome.policies:
        runs = outcome.find(pods, policy)
        assert runs is not None
        cells = [f"{value:.1f}" for value in _costs(runs)]
        if policy in scaled:
            small, large = scaled[policy]
            cells += [
                *(f"{value:.1f}" for value in _costs(large)),
                f"{large.decision_us_mean / small.decision_us_mean:.2f}",
            ]
        lines.append(f"| {policy} | {' | '.join([*cells, *[''] * (7 - len(cells))])} |")
    return "\n".join([*lines, ""])


def _costs(runs: Runs) -> tuple[float, float, float]:
    return runs.decision_us(50), runs.decision_us(99), runs.decision_us_mean


def picture(outcome: "Outcome") -> str:
    """Allocated percent against arrivals, one line for each policy; readable on light and on dark."""
    pods = "default" if "default" in outcome.lists else outcome.lists[0]
    drawn = [runs for policy in outcome.policies if (runs := outcome.find(pods, policy)) is not None]
    y_from = 5 * int(min(runs.curve[X_FROM] for runs in drawn) // 5)
    return "\n".join([_head(pods), *_axes(y_from), *_lines(drawn, y_from), "</svg>", ""])


def _head(pods: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<title>Percent of GPUs allocated against percent asked for, list {pods}</title>\n'
        "<style>text{fill:#343a40} .axis{stroke:#adb5bd;fill:none} .line{fill:none;stroke-width:1.8}"
        "@media (prefers-color-scheme: dark){text{fill:#dee2e6} .axis{stroke:#5c636a}}</style>"
    )


def _x(percent: float) -> float:
    return LEFT + (percent - X_FROM) * (WIDTH - LEFT - RIGHT) / (ARRIVALS_PERCENT - X_FROM)


def _y(percent: float, y_from: int) -> float:
    return HEIGHT - BOTTOM - (percent - y_from) * (HEIGHT - TOP - BOTTOM) / (100 - y_from)


def _axes(y_from: int) -> Iterable[str]:
    for percent in range(X_FROM, ARRIVALS_PERCENT + 1, 10):
        yield f'<path class="axis" d="M{_x(percent):.1f} {HEIGHT - BOTTOM} v5"/>'
        yield f'<text x="{_x(percent):.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{percent}</text>'
    for percent in range(y_from, 101, 5):
        y = _y(percent, y_from)
        yield f'<path class="axis" stroke-opacity="0.4" d="M{LEFT} {y:.1f} H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>'
    yield f'<path class="axis" d="M{LEFT} {TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}"/>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">% of GPUs asked for</text>'
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text transform="translate(14,{middle:.0f}) rotate(-90)" text-anchor="middle">% of GPUs allocated</text>'


def _lines(drawn: Sequence[Runs], y_from: int) -> Iterable[str]:
    label_y = 0.0
    for runs in sorted(drawn, key=lambda runs: -runs.curve[-1]):
        colour = COLOURS.get(runs.policy, OTHER_COLOUR)
        points = " ".join(
            f"{_x(percent):.1f},{_y(runs.curve[percent], y_from):.1f}"
            for percent in range(X_FROM, ARRIVALS_PERCENT + 1)
        )
        yield f'<polyline class="line" stroke="{colour}" points="{points}"/>'
        end = _y(runs.curve[-1], y_from)
        label_y = max(end, label_y + LABEL_GAP)
        x = WIDTH - RIGHT
        yield f'<path class="line" stroke="{colour}" stroke-width="1" d="M{x} {end:.1f} L{x + 10} {label_y:.1f}"/>'
        yield f'<text x="{x + 14}" y="{label_y + 4:.1f}">{runs.policy} {runs.curve[-1]:.1f}</text>'

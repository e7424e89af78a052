"""docs/engine-model.md and its picture, from the comparison."""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.engine_fit import FAMILIES as FIT_FAMILIES
from benchmarks.engine_fit import PARAMETERS, fit_set, known_gpu, outside_s
from benchmarks.engine_fit import Row as FitRow
from benchmarks.engine_rows import Family, Group, Row, request_s

ROOT: Final = Path(__file__).resolve().parents[1]
FONT: Final = 'font-family="sans-serif" font-size="12"'
DECADES: Final = 3
COLOURS: Final = (
    "#0b6e4f",
    "#c8553d",
    "#3d5a80",
    "#8f5fbf",
    "#b8860b",
    "#2a9d8f",
    "#6c757d",
    "#d1495b",
    "#212529",
    "#ff7f51",
    "#7b2d26",
    "#b5179e",
    "#606c38",
)
SIDE, MARGIN = 560, 60
BAR_FRACTION: Final = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRun:
    """A family and its rows, modelled."""

    family: Family
    rows: tuple[Row, ...]

    @property
    def median_error(self) -> float:
        return statistics.median(abs(row.error) for row in self.rows)

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: abs(row.error))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRun:
    """All judged comparisons of one group as one set of rows."""

    group: Group
    runs: tuple[FamilyRun, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for run in self.runs if run.family.is_judged for row in run.rows)

    @property
    def median_error(self) -> float:
        return statistics.median(abs(row.error) for row in self.rows)

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: abs(row.error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """(row, modelled seconds, relative error) of the figures that the parameters were fitted on."""

    rows: tuple[tuple[FitRow, float, float], ...]

    @property
    def median_error(self) -> float:
        return statistics.median(abs(error) for _, _, error in self.rows)


def fingerprint() -> str:
    """Of all that the page follows from: the model, its data, the comparisons."""
    digest = hashlib.sha256()
    paths = sorted([*(ROOT / "engines" / "model").glob("*.*"), *(ROOT / "benchmarks").glob("engine_*.py")])
    for path in paths:
        digest.update(path.name.encode() + b"\x00" + path.read_bytes() + b"\x00")
    return digest.hexdigest()[:16]


def shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


INTRODUCTION: Final = """\
# How good is the engine model?

`engines.model` says how long an engine's steps take, which requests share them, and what several engines on one GPU do
to each other. The simulated engine and simulations use it. This page compares it with figures that others published.
Nothing here was measured by this project. The page is written by `python -m benchmarks engine-model --docs`.

![Measured against modelled, all rows; the band is 15 %](engine-model.svg)

| Family | Rows | Median error | Worst |
|---|---|---|---|
"""
GROUP_TITLES: Final[dict[Group, str]] = {
    "article": "The article: three NIMs on 1.5 H100, fractions and swap",
    "sharing": "Two models on one of 8 A100, time-sliced and in fractions",
    "references": "Reference values of llm-d and Dynamo",
    "dedicated": "One model on its own GPU, not in the fit",
}
COMPARISONS: Final = """
The bar is a median error of at most 15 % in each family. The comparisons that the families are made of:

| Comparison | Rows | Median error | Worst |
|---|---|---|---|
"""

APART: Final = """
## How the fit was kept apart

Four parameters of a GPU are fitted: the part of its bandwidth and the part of its arithmetic that kernels reach, the
time that each layer's small kernels add, and the host's time for each sequence. The fit sees only
`engines/model/fit.json`: {count} published figures of single GPUs, each dedicated to one engine. No figure of the
comparisons below is among them, and the tables of shared GPUs and of the article have no part in it;
`python -m benchmarks engine-model --fit` repeats it. Everything else is a published fact of the hardware or of the
model's architecture (`engines/model/models.json`, with sources), or is said to be assumed: the time slice (2 ms), the
loss of concurrent kernels (5 %), what the kernels of a mixture of experts reach.

A request's time outside the engine's steps (HTTP, tokenizer, host) is fitted in the same way, for each kind of GPU: the
median, over published runs with one request at a time, of the first token less the step of its prompt (last table). A
swap's time beside the model's bytes comes from an earlier publication on another GPU (told with that table).

Two decisions were taken after a look at the tables below; no parameter was changed for either. At first the gaps
between small kernels were a block at the start of each step; two equal engines under MPS then kept step and gained
nothing from each other's gaps (throughput 16 % off at two requests). The gaps lie between the kernels of every layer,
so they are spread over the step now. And the lengths of one suite's requests ("distribution of lengths") were at first
the quantiles that it declares; its runs' own totals say that the prompts are half as long, which is what is used now.
Inputs that a source does not give are named in the last column.

| GPU | bandwidth reached | arithmetic reached | each layer | each sequence | each request |
|---|---|---|---|---|---|
"""

LIMITS_TEXT: Final = """
## What the model leaves out

- Activations that move between kernels: small beside weights and KV in decoding, beside arithmetic in prompts.
- Times outside the engine's steps, but for a constant for each request: frontends, routers, networks, tokenizers.
- Differences between engine versions: one fit per GPU family covers several.
- Clocks and power limits, and everything that depends on the text: how experts are really chosen, speculative decoding.
- A context switch costs what the hardware must move (registers, shared memory, caches); drivers may cost more.
- Under MPS an engine's cap on SMs bounds its arithmetic, not its bandwidth.
"""


def text(groups: Sequence[GroupRun], families: Sequence[FamilyRun], fit: Fit) -> str:
    """The page."""
    parts = [INTRODUCTION]
    for group in groups:
        mark = "" if group.median_error <= BAR_FRACTION else " (above the bar of 15 %)"
        parts.append(
            f"| {GROUP_TITLES[group.group]} | {len(group.rows)} | {100 * group.median_error:.1f} %{mark} | "
            f"{100 * group.worst.error:+.0f} %: {group.worst.what} |\n"
        )
    parts.append(COMPARISONS)
    for run in families:
        mark = "" if run.median_error <= BAR_FRACTION else " (above the bar of 15 %)"
        if not run.family.is_judged:
            mark = " (no test)"
        parts.append(
            f"| [{run.family.title}](#{_anchor(run.family.title)}) | {len(run.rows)} | "
            f"{100 * run.median_error:.1f} %{mark} | {100 * run.worst.error:+.0f} %: {run.worst.what} |\n"
        )
    parts.append(APART.format(count=len(fit.rows)))
    for names in FIT_FAMILIES.values():
        gpu = known_gpu(names[0])
        values = [getattr(gpu, name) for name in PARAMETERS]
        parts.append(
            f"| {', '.join(names)} | {100 * values[0]:.0f} % | {100 * values[1]:.0f} % | "
            f"{1e6 * values[2]:.0f} µs | {1e6 * values[3]:.0f} µs | {1e3 * request_s(names[0]):.1f} ms |\n"
        )
    parts += [_section(run) for run in families]
    parts += [LIMITS_TEXT, _fit_section(fit), f"\n<!-- made from {fingerprint()} -->\n"]
    return "".join(parts)


def _anchor(title: str) -> str:
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter == "-")


def _section(run: FamilyRun) -> str:
    worst = run.worst
    lines = [
        f"\n## {run.family.title}\n",
        f"\nSource: {run.family.source}.\n",
        f"\nMedian error **{100 * run.median_error:.1f} %**; worst: {worst.what} ({100 * worst.error:+.1f} %).\n",
        f"\nWhere it is wrong, and why: {run.family.is_wrong_because}\n",
        "\n| | measured | modelled | error | assumed |\n|---|---|---|---|---|\n",
    ]
    lines += [
        f"| {row.what} | {shown(row.measured)} {row.unit} | {shown(row.modelled)} {row.unit} | "
        f"{100 * row.error:+.1f} % | {row.assumed} |\n"
        for row in run.rows
    ]
    return "".join(lines)


def _fit_section(fit: Fit) -> str:
    lines = [
        "\n## The figures of the fit\n",
        f"\nMedian error {100 * fit.median_error:.1f} %; no test of the model: it was fitted on them.\n\n",
        *(f"- {name}: {source}\n" for name, source in fit_set().sources.items()),
        "\n| GPU | Model | | measured | modelled | error |\n|---|---|---|---|---|---|\n",
    ]
    for row, model_s, error in fit.rows:
        what = f"prompt of {row.prompt_tokens:,}" if row.what == "prompt" else f"step of {row.sequences}"
        lines.append(
            f"| {row.gpu} | {row.model} | {what} | {shown(1000 * row.measured_s)} ms | {shown(1000 * model_s)} ms | "
            f"{100 * error:+.1f} % |\n"
        )
    lines.append(
        "\nOf a request outside the steps: hosts and engine versions differ by more than GPUs do.\n\n"
        "| GPU | Model | prompt | first token | beyond its step | source |\n|---|---|---|---|---|---|\n"
    )
    lines += [
        f"| {row.gpu} | {row.model} | {row.prompt_tokens} | {1000 * row.measured_s:.1f} ms | "
        f"{1000 * outside_s(row):.1f} ms | {row.source} |\n"
        for row in fit_set().first_tokens
    ]
    return "".join(lines)


def picture(families: Sequence[FamilyRun]) -> str:
    """Measured to the right, modelled upwards, both in parts of the family's largest value, on logarithmic axes."""
    inner, height = SIDE - 2 * MARGIN, SIDE + 20 * len(families)
    band = inner * math.log10(1 + BAR_FRACTION) / DECADES
    corners = ((0, band), (inner - band, inner), (inner, inner), (inner, inner - band), (band, 0), (0, 0))
    marks = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {height}" {FONT}>',
        f'<rect width="{SIDE}" height="{height}" fill="#ffffff"/>',
        f'<g transform="translate({MARGIN},{SIDE - MARGIN}) scale(1,-1)">',
        f'<rect width="{inner}" height="{inner}" fill="none" stroke="#adb5bd"/>',
        f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}" fill="#e9f5db"/>',
        f'<path d="M0 0 L{inner} {inner}" stroke="#adb5bd"/>',
    ]
    for run, colour in zip(families, COLOURS[: len(families)], strict=True):
        marks += _dots(run, colour, inner)
    below = SIDE - MARGIN + 24
    marks += [
        "</g>",
        f'<text x="{SIDE / 2}" y="{below}" text-anchor="middle">measured (of the largest, {DECADES} decades)</text>',
        f'<text transform="translate({MARGIN - 14},{SIDE / 2}) rotate(-90)" text-anchor="middle">modelled</text>',
    ]
    for index, (run, colour) in enumerate(zip(families, COLOURS[: len(families)], strict=True)):
        y = below + 28 + 20 * index
        label = f"{run.family.title}: median error {100 * run.median_error:.1f} %"
        marks.append(f'<circle cx="{MARGIN + 6}" cy="{y - 4}" r="5" fill="{colour}"/>')
        marks.append(f'<text x="{MARGIN + 20}" y="{y}">{_escaped(label)}</text>')
    return "\n".join([*marks, "</svg>", ""])


def _dots(run: FamilyRun, colour: str, inner: int) -> list[str]:
    """Rows of one family may have several units: each unit has its own largest value."""
    largest = {
        unit: max(max(row.measured, row.modelled) for row in run.rows if row.unit == unit)
        for unit in {row.unit for row in run.rows}
    }

    def place(value: float, unit: str) -> float:
        return inner * (1 + max(math.log10(value / largest[unit]), -DECADES) / DECADES)

    return [
        f'<circle cx="{place(row.measured, row.unit):.1f}" cy="{place(row.modelled, row.unit):.1f}" r="4" '
        f'fill="{colour}" fill-opacity="0.75"><title>{_escaped(row.what)}: {100 * row.error:+.1f} %</title></circle>'
        for row in run.rows
    ]


def _escaped(label: str) -> str:
    return label.replace("&", "&amp;").replace("<", "&lt;")

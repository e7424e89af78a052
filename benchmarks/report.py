"""What every benchmark ends with: figures, bars, a table for people and a file for programs."""

import json
import math
import operator
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

WIDTH: Final = 80
"""Columns of a table; what a terminal shows at least."""
OPERATORS: Final = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

Value = int | float | None
"""A figure. None: it could not be measured, which is never the same as zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What a figure must reach."""

    name: str
    value: Value
    op: str
    bar: int | float

    @property
    def is_met(self) -> bool:
        """What was not measured is not met."""
        return self.value is not None and bool(OPERATORS[self.op](self.value, self.bar))

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "op": self.op, "bar": self.bar, "ok": self.is_met}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run."""

    benchmark: str
    label: str
    """``software GPU``, ``simulated``, ``real GPU`` or ``host``: what the figures were taken on."""
    commit: str
    figures: Mapping[str, Value]
    """{name with its unit: value}"""
    bars: Sequence[Bar] = field(default_factory=list)
    notes: Sequence[str] = ()
    """Sentences that a reader of the figures must know; in the table only."""
    series: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    """{name with its unit: {of what: value}}: figures with one value for each run; in the file only."""

    @property
    def missed(self) -> list[Bar]:
        return [bar for bar in self.bars if not bar.is_met]

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "commit": self.commit,
            "label": self.label,
            "figures": {**self.figures, **self.series},
            "bars": [bar.as_json() for bar in self.bars],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def table(self) -> str:
        """At most `WIDTH` columns wide."""
        lines = [f"{self.benchmark} · {self.label} · commit {self.commit}", ""]
        lines += [f"  {name:<34}{shown(name, value):>16}" for name, value in self.figures.items()]
        if self.bars:
            lines += ["", f"  {'bar':<34}{'value':>16}  {'wanted':<14}met"]
        for bar in self.bars:
            wanted = f"{bar.op} {shown(bar.name, bar.bar)}"
            lines.append(f"  {bar.name:<34}{shown(bar.name, bar.value):>16}  {wanted:<14}{_yes(bar.is_met)}")
        for note in self.notes:
            lines += ["", *_wrapped(note)]
        return "\n".join(lines)


def shown(name: str, value: Value) -> str:
    """A value for a person, by the unit in its figure's name."""
    if value is None:
        return "not measured"
    if "_bytes" in name:
        return f"{value / 1024**3:.2f} GiB" if value >= 1024**3 else f"{value / 1024**2:.1f} MiB"
    if isinstance(value, int):
        return f"{value:,}"
    unit = " s" if (name.endswith("_s") or "_s_" in name) and "_per_s" not in name else ""
    return f"{value:,.3f}{unit}"


def _yes(is_met: bool) -> str:  # noqa: FBT001  (one argument, named by the function)
    return "yes" if is_met else "NO"


def _wrapped(text: str) -> list[str]:
    lines, line = [], " "
    for word in text.split():
        if len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = " "
        line += f" {word}"
    return [*lines, line]


def quantile(values: Sequence[float], fraction: float) -> float | None:
    """The smallest value that at least this fraction of all values does not exceed; None without values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]


def quantiles(name: str, values: Sequence[float], percents: Sequence[int] = (50, 95, 99)) -> dict[str, Value]:
    """For example ``{"wake_s_p50": 0.3, "wake_s_p95": 0.5}``."""
    figures: dict[str, Value] = {}
    for percent in percents:
        value = quantile(values, percent / 100)
        figures[f"{name}_p{percent}"] = None if value is None else round(value, 4)
    return figures


def commit() -> str:
    """Of the checkout that runs, with ``-dirty`` where files differ from it; ``unknown`` without git."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"

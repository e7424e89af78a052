"""Counters, gauges and histograms as Prometheus text. The client library would cost each of fifty engines 3 MB."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping


def label_text(labels: Mapping[str, str]) -> str:
    """`{a="b"}`, or nothing for no labels."""
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def number_text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


class Histogram:
    """Observed values in cumulative buckets."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: Mapping[str, str]) -> Iterable[str]:
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f"{name}_bucket{label_text({**labels, 'le': bound})} {total}"
        yield f"{name}_sum{label_text(labels)} {number_text(self._sum)}"
        yield f"{name}_count{label_text(labels)} {total}"


class Page:
    """One answer to a scrape."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, description: str, lines: Iterable[str]) -> None:
        """A family with ready lines."""
        self._lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}", *lines]

    def value(self, name: str, kind: str, description: str, value: float, labels: Mapping[str, str]) -> None:
        """A family with one value."""
        self.family(name, kind, description, [f"{name}{label_text(labels)} {number_text(value)}"])

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

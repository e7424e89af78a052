"""Requests of many models for the swap world: from a file, or made by a fixed recipe."""

import csv
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.swap_world import Request, service_s
from benchmarks.trace import TraceError, read

DATA: Final = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
LENGTHS: Final = DATA / "azure_llm_2023.csv.gz"
TRACE: Final = DATA / "multimodel_servegen64_24h.csv.gz"
DAY_S: Final = 86_400.0
Floats = NDArray[np.float64]
Keys = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A made trace: `make` gives arrival times and the models' numbers."""

    what: str
    seed: int
    make: Callable[[np.random.Generator], tuple[Floats, Keys]]


def _stream(rng: np.random.Generator, *, rate_per_s: float, length_s: float) -> Floats:
    """One Poisson stream's arrivals."""
    times = np.cumsum(rng.exponential(1 / rate_per_s, int(rate_per_s * length_s * 1.2) + 100))
    return times[times < length_s]


def _popularity(count: int, exponent: float) -> Floats:
    weights: Floats = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    shares: Floats = weights / weights.sum()
    return shares


def _zipf(exponent: float, *, rate_per_s: float = 0.25) -> Callable[[np.random.Generator], tuple[Floats, Keys]]:
    def make(rng: np.random.Generator) -> tuple[Floats, Keys]:
        times = _stream(rng, rate_per_s=rate_per_s, length_s=2 * DAY_S)
        return times, rng.choice(64, len(times), p=_popularity(64, exponent))

    return make


def _drift(rng: np.random.Generator) -> tuple[Floats, Keys]:
    """Every four hours eight models of 64 take each other's places."""
    times = _stream(rng, rate_per_s=0.1, length_s=2 * DAY_S)
    ranks, names = rng.choice(64, len(times), p=_popularity(64, 1.1)), np.arange(64)
    keys, period = np.empty(len(times), dtype=np.int64), (times // (4 * 3600)).astype(int)
    for number in range(int(period.max()) + 1):
        keys[period == number] = names[ranks[period == number]]
        places = rng.choice(64, 8, replace=False)
        names[places] = names[rng.permutation(places)]
    return times, keys


def _day_night(rng: np.random.Generator) -> tuple[Floats, Keys]:
    """Half of the models by day and half by night, with a part left in the other half; the rate goes with the day."""
    times = _stream(rng, rate_per_s=0.15, length_s=2 * DAY_S)
    day = np.sin(2 * np.pi * times / DAY_S)
    times = times[rng.random(len(times)) < 0.6 + 0.4 * day]
    ranks = rng.choice(32, len(times), p=_popularity(32, 0.9))
    is_day = rng.random(len(times)) < 0.5 + 0.45 * np.sin(2 * np.pi * times / DAY_S)
    return times, np.where(is_day, ranks, 32 + ranks)


def _bursts(rng: np.random.Generator) -> tuple[Floats, Keys]:
    """Sessions of one model: some requests half a minute apart, then long silence; popularity by Zipf."""
    begins = _stream(rng, rate_per_s=0.01, length_s=2 * DAY_S)
    models = rng.choice(64, len(begins), p=_popularity(64, 0.8))
    counts = rng.geometric(1 / 12, len(begins))
    times = np.concatenate([b + np.cumsum(rng.exponential(30, n)) for b, n in zip(begins, counts, strict=True)])
    keys = np.repeat(models, counts)
    order = np.argsort(times, kind="stable")
    return times[order], keys[order]


def _timers(rng: np.random.Generator) -> tuple[Floats, Keys]:
    """Half of the models come by a timer, a little late or early; the others by Zipf."""
    parts = []
    for key in range(32):
        period_s = float(rng.uniform(600, 7200))
        ticks = np.arange(rng.uniform(0, period_s), 2 * DAY_S, period_s)
        parts.append((np.maximum(0, ticks + rng.normal(0, period_s / 50, len(ticks))), np.full(len(ticks), key)))
    times = _stream(rng, rate_per_s=0.02, length_s=2 * DAY_S)
    parts.append((times, 32 + rng.choice(32, len(times), p=_popularity(32, 1.1))))
    times, keys = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    order = np.argsort(times, kind="stable")
    return times[order], keys[order]


RECIPES: Final[dict[str, Recipe]] = {
    "zipf": Recipe(what="64 models, Zipf 1.1, one Poisson stream of 0.25 req/s, 48 h", seed=11, make=_zipf(1.1)),
    "zipf-flat": Recipe(what="the same with Zipf 0.7 and 0.05 req/s", seed=101, make=_zipf(0.7, rate_per_s=0.05)),
    "zipf-steep": Recipe(what="the same with Zipf 1.5 and 0.1 req/s", seed=102, make=_zipf(1.5, rate_per_s=0.1)),
    "drift": Recipe(what="Zipf 1.1, 0.1 req/s; every four hours eight models change places", seed=103, make=_drift),
    "day-night": Recipe(what="half of the models by day, half by night, 0.15 req/s", seed=104, make=_day_night),
    "bursts": Recipe(what="sessions of a dozen requests half a minute apart, Zipf 0.8", seed=105, make=_bursts),
    "timers": Recipe(what="half of 64 models by timers of 10 minutes to 2 hours, half Zipf", seed=106, make=_timers),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """A trace by its name."""

    name: str
    requests: list[Request]

    @property
    def models(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(request.model for request in self.requests))


def read_arrivals(path: Path, *, time_scale: float) -> Arrivals:
    """The clock of arrivals runs so many times as fast. Raises `TraceError`."""
    rows = sorted(read(path), key=lambda row: row.t_s)
    if not rows:
        raise TraceError(f"the trace {path} has no requests")
    requests = [
        Request(t_s=row.t_s / time_scale, model=row.model, service_s=service_s(row.input_tokens, row.output_tokens))
        for row in rows
    ]
    return Arrivals(name=path.name.removesuffix(".gz").removesuffix(".csv"), requests=requests)


def made(name: str, lengths: Path, *, time_scale: float) -> Arrivals:
    """By the recipe of this name, token lengths drawn from the file's conversations. Raises `TraceError`."""
    recipe = RECIPES[name]
    services = _conversations_s(lengths)
    rng = np.random.default_rng(recipe.seed)
    times, keys = recipe.make(rng)
    drawn = rng.integers(0, len(services), len(times))
    requests = [
        Request(t_s=float(t_s) / time_scale, model=f"m{int(key):03d}", service_s=services[int(index)])
        for t_s, key, index in zip(times, keys, drawn, strict=True)
    ]
    return Arrivals(name=name, requests=requests)


def _conversations_s(path: Path) -> Sequence[float]:
    """How long each conversation request of the file is served."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["service"] == "conv"]
            services = [service_s(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows]
    except (OSError, EOFError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise TraceError(f"token lengths cannot be read from {path} ({error}); name the file with --lengths") from error
    if not services:
        raise TraceError(f"{path} has no conversations (service 'conv')")
    return services

"""Efficiencies and overheads of a GPU from published figures of single, dedicated ones: `engines/model/fit.json`.

Coordinate descent on the mean squared logarithm of modelled over measured time: no start value or random number
matters to three digits. The GPUs of one family share their parameters.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Final

import msgspec

from engines.model.catalogue import gpu_speed, known_model, model_parameters
from engines.model.timing import GpuSpeed, TimingModel

FAMILIES: Final = {"h100-80": ("h100-80", "h200-141"), "a100-80": ("a100-80", "a100-40")}
"""{the GPU whose entry names the fit: the GPUs that share it}"""
PARAMETERS: Final = ("memory_efficiency", "compute_efficiency", "layer_overhead_s", "sequence_overhead_s")
BOUNDS: Final = {
    "memory_efficiency": (0.3, 0.95),
    "compute_efficiency": (0.2, 0.9),
    "layer_overhead_s": (5e-6, 2e-4),
    "sequence_overhead_s": (1e-6, 2e-4),
}


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One published figure. A prompt is handled in one chunk; `context_tokens` is of each sequence."""

    gpu: str
    model: str
    what: str  # "decode step" | "prompt"
    sequences: int
    context_tokens: int
    prompt_tokens: int
    measured_s: float
    source: str


class FirstToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published time to the first token of requests that come one at a time."""

    gpu: str
    model: str
    prompt_tokens: int
    measured_s: float
    source: str


class FitSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    about: str
    sources: dict[str, str]
    rows: tuple[Row, ...]
    first_tokens: tuple[FirstToken, ...]


def fit_set() -> FitSet:
    """The figures as they are shipped."""
    text = resources.files("engines.model").joinpath("fit.json").read_bytes()
    return msgspec.json.decode(text, type=FitSet)


def timing_on(model: str, gpu: GpuSpeed) -> TimingModel:
    entry = known_model(model)
    assert entry is not None, model
    return TimingModel(parameters=model_parameters(model, weights_bytes=entry.weights_bytes), gpu=gpu)


def modelled_s(row: Row, gpu: GpuSpeed) -> float:
    timing = timing_on(row.model, gpu)
    if row.what == "prompt":
        return timing.prefill_s(row.prompt_tokens)
    return timing.decode_step_s(decode_count=row.sequences, context_tokens=row.sequences * row.context_tokens)


def known_gpu(name: str) -> GpuSpeed:
    gpu = gpu_speed(name)
    assert gpu is not None, name
    return gpu


def with_parameters(gpu: GpuSpeed, values: Mapping[str, float]) -> GpuSpeed:
    return replace(
        gpu,
        memory_efficiency=values["memory_efficiency"],
        compute_efficiency=values["compute_efficiency"],
        layer_overhead_s=values["layer_overhead_s"],
        sequence_overhead_s=values["sequence_overhead_s"],
    )


def fitted(family: str) -> dict[str, float]:
    """The four parameters of a family, three significant digits."""
    rows = [row for row in fit_set().rows if row.gpu in FAMILIES[family]]
    gpus = {name: known_gpu(name) for name in FAMILIES[family]}

    def loss(values: dict[str, float]) -> float:
        logs = [math.log(modelled_s(row, with_parameters(gpus[row.gpu], values)) / row.measured_s) for row in rows]
        return sum(value * value for value in logs) / len(logs)

    values = {name: math.sqrt(low * high) for name, (low, high) in BOUNDS.items()}
    return {name: float(f"{value:.3g}") for name, value in descended(values, loss).items()}


def descended(start: dict[str, float], loss: Callable[[dict[str, float]], float]) -> dict[str, float]:
    """Each parameter in turn by ever smaller factors, until none helps."""
    values, best, factor = dict(start), loss(start), 1.5
    while factor > 1.0005:
        has_improved = False
        for name in PARAMETERS:
            low, high = BOUNDS[name]
            for candidate in (values[name] * factor, values[name] / factor):
                trial = values | {name: min(max(candidate, low), high)}
                if (now := loss(trial)) < best:
                    values, best, has_improved = trial, now, True
        if not has_improved:
            factor = 1 + (factor - 1) / 2
    return values


def outside_s(row: FirstToken) -> float:
    """What the first token took beyond the step of its prompt."""
    return row.measured_s - timing_on(row.model, known_gpu(row.gpu)).prefill_s(row.prompt_tokens)


def fitted_request_s(family: str) -> float:
    """A request's time outside the engine's steps on a family's GPUs: the median of the rows, 0.1 ms.

    The median, because hosts and engine versions differ by more (9 to 36 ms on an A100) than the GPU explains.
    """
    gpus = FAMILIES[family]
    return round(statistics.median(outside_s(row) for row in fit_set().first_tokens if row.gpu in gpus), 4)


def residuals(rows: Sequence[Row] | None = None) -> list[tuple[Row, float, float]]:
    """(row, modelled seconds, relative error) with the parameters that are shipped."""
    result = []
    for row in fit_set().rows if rows is None else rows:
        model_s = modelled_s(row, known_gpu(row.gpu))
        result.append((row, model_s, model_s / row.measured_s - 1))
    return result

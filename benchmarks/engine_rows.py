"""What a comparison of the engine model with a published figure is made of.

A row's inputs that its source does not give are in `assumed`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from benchmarks.engine_fit import FAMILIES as FIT_FAMILIES
from benchmarks.engine_fit import fitted_request_s, known_gpu
from engines.model.batching import BatchLimits
from engines.model.catalogue import known_model, model_parameters
from engines.model.simulation import EngineSetup, Served, Wanted
from engines.model.timing import TimingModel

GB: Final = 10**9
GiB: Final = 1 << 30
MiB: Final = 1 << 20

Group = Literal["article", "sharing", "references", "dedicated"]
"""What the bar of 15 % is for: the article; two models on one of 8 A100; what llm-d and Dynamo say of engines. And one
more of our own, dedicated GPUs that are not in the fit."""


@cache
def request_s(gpu: str) -> float:
    """Of a request outside the steps (HTTP, tokenizer, host), as fitted for the GPU's family."""
    [family] = [name for name, gpus in FIT_FAMILIES.items() if gpu in gpus]
    return fitted_request_s(family)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published figure and its model. `modelled` is in the unit of `measured`."""

    what: str
    unit: str
    measured: float
    modelled: float
    assumed: str = ""

    @property
    def error(self) -> float:
        return self.modelled / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Rows of one source. `is_wrong_because` says where the model is off and why."""

    name: str
    group: Group
    title: str
    source: str
    rows: Callable[[float], Iterator[Row]]
    """Of the part of the published number of requests to run, 0 to 1."""
    is_wrong_because: str
    is_judged: bool = True
    """False: an input was read off the very table, so that its errors are told but are no test."""


def timing_of(model: str, gpu: str, *, gpu_count: int = 1) -> TimingModel:
    entry = known_model(model)
    assert entry is not None, model
    parameters = model_parameters(model, weights_bytes=entry.weights_bytes)
    return TimingModel(parameters=parameters, gpu=known_gpu(gpu), gpu_count=gpu_count)


def tokens_per_s(served: Sequence[Served]) -> float:
    """Output tokens over the time from the first request to the last answer, as load generators report it."""
    lasted_s = max(item.ended_s for item in served) - min(item.sent_s for item in served)
    return sum(item.output_tokens for item in served) / lasted_s


def closed_loop(
    timing: TimingModel, *, clients: int, requests: int, prompt: int, output: int, kv_bytes: int, limits: BatchLimits
) -> EngineSetup:
    return EngineSetup(
        timing=timing,
        kv_bytes=kv_bytes,
        requests=tuple(Wanted(prompt_tokens=prompt, output_tokens=output) for _ in range(requests)),
        limits=limits,
        clients=clients,
        request_s=request_s(timing.gpu.name),
    )

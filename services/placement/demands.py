"""What one replica of a deployment needs, in the numbers that rooms count in."""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

from schemas.deployments import GRADE_ORDER, AntiAffinity, DeploymentSpec, IsolationGrade, ShareSpec, Strategy
from schemas.nodes import GpuOffer
from services.placement.packing.fleet import Ask

GRADE_RANKS: Final = {grade: rank for rank, grade in enumerate(GRADE_ORDER)}
"""Smaller is stronger."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Equal demands fit alike: one that fits nowhere speaks for all that are equal."""

    gpu_count: int
    portion: Fraction | None
    size_bytes: int | None
    cpu_millicores: int
    memory_bytes: int
    gpu_models: tuple[str, ...]
    """Parts of names, in lower case; any will do. Empty: any GPU."""
    labels: frozenset[str]
    """``key=value``, all of them."""
    minimum_grade: IsolationGrade | None
    is_parkable: bool
    weights_bytes: int
    """Of host memory, while it is parked; 0 for what never is."""
    spreads_nodes: bool
    spreads_gpus: bool
    anti_affinity: AntiAffinity

    def ask(self, gpu_models: frozenset[str]) -> Ask:
        """In the packer's words; `gpu_models`: the whole names that will do, empty for all."""
        return Ask(
            gpu_count=self.gpu_count,
            portion=self.portion,
            size_units=self.size_bytes,
            cpu_milli=self.cpu_millicores,
            memory_bytes=self.memory_bytes,
            gpu_models=gpu_models,
            labels=self.labels,
            grade_rank=None if self.minimum_grade is None else GRADE_RANKS[self.minimum_grade],
        )


def demand_of(spec: DeploymentSpec) -> Demand:
    share, wish = spec.share, spec.placement
    return Demand(
        gpu_count=share.gpu_count,
        portion=None if share.request_portion is None else exact(share.request_portion),
        size_bytes=share.request_bytes,
        cpu_millicores=spec.host.cpu_millicores,
        memory_bytes=spec.host.memory_bytes,
        gpu_models=tuple(sorted({model.lower() for model in wish.gpu_models})),
        labels=frozenset(f"{key}={value}" for key, value in wish.node_labels.items()),
        minimum_grade=share.minimum_grade,
        is_parkable=spec.swap.is_parkable,
        weights_bytes=spec.engine.weights_bytes if spec.swap.is_parkable else 0,
        spreads_nodes=wish.node_strategy is Strategy.SPREAD,
        spreads_gpus=wish.gpu_strategy is Strategy.SPREAD,
        anti_affinity=wish.anti_affinity,
    )


@lru_cache(maxsize=4096)
def exact(portion: float) -> Fraction:
    """The decimal number that was written, not its nearest binary one: 0.7 of ten bytes are seven."""
    return Fraction(repr(portion))


def base_bytes(gpu: GpuOffer) -> int:
    """What portions are of: capacity less the reserve. What strangers use comes and goes and changes no portion."""
    return max(0, gpu.capacity_bytes - gpu.reserve_bytes)


def request_bytes_on(gpu: GpuOffer, share: ShareSpec) -> int:
    """The request in bytes on this GPU. A portion is of `base_bytes`, rounded down, so that 0.5 + 0.5 fits."""
    if share.request_bytes is not None:
        return share.request_bytes
    assert share.request_portion is not None
    return _part(gpu, share.request_portion)


def limit_bytes_on(gpu: GpuOffer, share: ShareSpec) -> int:
    """The limit in bytes: at least the request, else at most what the GPU has to give."""
    request = request_bytes_on(gpu, share)
    wanted = request
    if share.limit_bytes is not None:
        wanted = share.limit_bytes
    elif share.limit_portion is not None:
        wanted = _part(gpu, share.limit_portion)
    return max(request, min(wanted, gpu.allocatable_bytes))


def _part(gpu: GpuOffer, portion: float) -> int:
    part = exact(portion)
    return base_bytes(gpu) * part.numerator // part.denominator

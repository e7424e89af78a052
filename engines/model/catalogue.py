"""The models and GPUs that the timing model knows, from `models.json`; an unknown model gets figures from its size."""

from __future__ import annotations

import functools
from importlib import resources

import msgspec

from engines.model.timing import Experts, GpuSpeed, ModelParameters

# For a model that is not in the list: bf16 and grouped-query attention, scaled from mistral-7b-instruct-v0.3.
GENERIC_BYTES_PER_PARAMETER = 2
GENERIC_KV_BYTES_PER_TOKEN_AND_GB = 9042  # 131,072 B of KV per token for 14.496 GB of weights
GENERIC_KV_BYTES_PER_TOKEN_MIN = 1024
GENERIC_CONTEXT_TOKENS_MAX = 32768
GENERIC_LAYER_COUNT = 32
GENERIC_HIDDEN_SIZE = 4096
GB = 10**9


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model in the file. `sources` says where each figure comes from."""

    name: str
    aliases: tuple[str, ...]
    precision: str
    weights_bytes: int
    read_bytes: int
    active_parameters: int
    layer_count: int
    hidden_size: int
    attention_layer_count: int
    query_width: int
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    context_tokens_max: int
    compute_factor: float
    experts: Experts | None
    sources: dict[str, str]
    window_tokens: int | None = None


class GpuEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU in the file."""

    name: str
    memory_bytes_per_s: float
    memory_efficiency: float
    flops_per_s: float
    compute_efficiency: float
    layer_overhead_s: float
    sequence_overhead_s: float
    link_bytes_per_s: float
    switch_bytes: int
    source: str


class Catalogue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    about: str
    models: tuple[ModelEntry, ...]
    gpus: tuple[GpuEntry, ...]


@functools.cache
def catalogue() -> Catalogue:
    """The file as it is shipped."""
    text = resources.files("engines.model").joinpath("models.json").read_bytes()
    return msgspec.json.decode(text, type=Catalogue)


def gpu_names() -> tuple[str, ...]:
    return tuple(entry.name for entry in catalogue().gpus)


def gpu_speed(name: str) -> GpuSpeed | None:
    """The GPU's figures; None for a name that the file does not have."""
    for entry in catalogue().gpus:
        if entry.name == name:
            return GpuSpeed(
                name=entry.name,
                memory_bytes_per_s=entry.memory_bytes_per_s,
                memory_efficiency=entry.memory_efficiency,
                flops_per_s=entry.flops_per_s,
                compute_efficiency=entry.compute_efficiency,
                layer_overhead_s=entry.layer_overhead_s,
                sequence_overhead_s=entry.sequence_overhead_s,
                link_bytes_per_s=entry.link_bytes_per_s,
                switch_s=entry.switch_bytes / (entry.memory_bytes_per_s * entry.memory_efficiency),
            )
    return None


def known_model(name: str) -> ModelEntry | None:
    """The entry whose name or alias is `name`, case ignored."""
    wanted = name.lower()
    for entry in catalogue().models:
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    return None


def model_parameters(name: str, *, weights_bytes: int) -> ModelParameters:
    """Figures for `name`; for an unknown one, those of a dense bf16 model with that many bytes of weights.

    `weights_bytes` wins over the file: a known model with other weights (a test's small ones, another precision)
    reads as many bytes as it has, its experts in proportion.
    """
    entry = known_model(name)
    if entry is None:
        return generic_parameters(name, weights_bytes=weights_bytes)
    ratio = weights_bytes / entry.weights_bytes
    experts = entry.experts
    if experts is not None:
        experts = Experts(
            expert_count=experts.expert_count,
            experts_per_token_count=experts.experts_per_token_count,
            shared_bytes=round(experts.shared_bytes * ratio),
            expert_bytes=round(experts.expert_bytes * ratio),
        )
    return ModelParameters(
        name=name,
        precision=entry.precision,
        weights_bytes=weights_bytes,
        read_bytes=round(entry.read_bytes * ratio),
        active_parameters=entry.active_parameters,
        layer_count=entry.layer_count,
        hidden_size=entry.hidden_size,
        attention_layer_count=entry.attention_layer_count,
        query_width=entry.query_width,
        kv_bytes_per_token=entry.kv_bytes_per_token,
        state_bytes_per_sequence=entry.state_bytes_per_sequence,
        context_tokens_max=entry.context_tokens_max,
        compute_factor=entry.compute_factor,
        experts=experts,
        window_tokens=entry.window_tokens,
    )


def generic_parameters(name: str, *, weights_bytes: int) -> ModelParameters:
    """A dense bf16 transformer of that size."""
    kv_bytes_per_token = round(GENERIC_KV_BYTES_PER_TOKEN_AND_GB * weights_bytes / GB)
    return ModelParameters(
        name=name,
        precision="bf16",
        weights_bytes=weights_bytes,
        read_bytes=weights_bytes,
        active_parameters=weights_bytes // GENERIC_BYTES_PER_PARAMETER,
        layer_count=GENERIC_LAYER_COUNT,
        hidden_size=GENERIC_HIDDEN_SIZE,
        attention_layer_count=GENERIC_LAYER_COUNT,
        query_width=GENERIC_HIDDEN_SIZE,
        kv_bytes_per_token=max(kv_bytes_per_token, GENERIC_KV_BYTES_PER_TOKEN_MIN),
        state_bytes_per_sequence=0,
        context_tokens_max=GENERIC_CONTEXT_TOKENS_MAX,
        compute_factor=1.0,
        experts=None,
    )

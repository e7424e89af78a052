"""Step times against figures that others published, and the shape of the curve."""

from dataclasses import replace

import pytest

from engines.model.catalogue import catalogue, generic_parameters, gpu_speed, known_model, model_parameters
from engines.model.timing import TimingModel

MISTRAL = "mistral-7b-instruct-v0.3"
NANO_12B = "nemotron-nano-12b-v2"
NANO_30B = "nemotron-3-nano-30b-a3b"
GB = 10**9


def h100(name: str, *, time_scale: float = 1.0) -> TimingModel:
    entry = known_model(name)
    speed = gpu_speed("h100-80")
    assert entry is not None
    assert speed is not None
    parameters = model_parameters(name, weights_bytes=entry.weights_bytes)
    return TimingModel(parameters=parameters, gpu=speed, time_scale=time_scale)


@pytest.mark.parametrize(
    ("token_count", "gigabytes"), [(1, 3.6), (4, 7.35), (16, 17.9), (32, 25.3), (64, 30.2), (256, 31.6)]
)
def test_experts_read_more_with_each_token_until_all_are_read(token_count: int, gigabytes: float) -> None:
    assert h100(NANO_30B).parameters.weights_read_bytes(token_count) == pytest.approx(gigabytes * GB, rel=0.01)


def test_a_dense_model_reads_its_weights_once_whatever_the_batch() -> None:
    parameters = h100(MISTRAL).parameters

    assert parameters.weights_read_bytes(1) == parameters.weights_read_bytes(64) == parameters.read_bytes


@pytest.mark.parametrize(("name", "tokens_per_s"), [(MISTRAL, 40_000), (NANO_12B, 25_000), (NANO_30B, 37_000)])
def test_long_prefills_run_at_the_expected_rate(name: str, tokens_per_s: float) -> None:
    tokens = 8192

    assert tokens / h100(name).prefill_s(tokens) == pytest.approx(tokens_per_s, rel=0.1)


@pytest.mark.parametrize("name", [MISTRAL, NANO_12B, NANO_30B])
def test_more_work_never_takes_less_time(name: str) -> None:
    timing = h100(name)
    prefills = [timing.prefill_s(tokens) for tokens in range(1, 4097, 64)]
    batches = [timing.decode_step_s(decode_count=count, context_tokens=count * 500) for count in range(1, 257)]
    contexts = [timing.decode_step_s(decode_count=8, context_tokens=tokens) for tokens in range(0, 100_000, 1000)]

    for times in (prefills, batches, contexts):
        assert times == sorted(times)


def test_a_batch_is_much_cheaper_than_its_requests_alone() -> None:
    timing = h100(MISTRAL)
    alone_s = timing.decode_step_s(decode_count=1, context_tokens=500)
    together_s = timing.decode_step_s(decode_count=32, context_tokens=32 * 500)

    assert together_s < 3 * alone_s


@pytest.mark.parametrize("name", [MISTRAL, NANO_12B, NANO_30B])
@pytest.mark.parametrize("field", ["memory_bytes_per_s", "flops_per_s"])
def test_a_faster_gpu_is_never_slower(name: str, field: str) -> None:
    timing = h100(name)
    faster = replace(timing, gpu=replace(timing.gpu, **{field: 2 * getattr(timing.gpu, field)}))

    assert faster.prefill_s(4096) <= timing.prefill_s(4096)
    for count in (1, 16, 128):
        context_tokens = count * 1000
        before_s = timing.decode_step_s(decode_count=count, context_tokens=context_tokens)
        assert faster.decode_step_s(decode_count=count, context_tokens=context_tokens) <= before_s


def test_two_gpus_are_less_than_twice_as_fast() -> None:
    """All-reduces and the gaps between kernels stay."""
    one = h100("qwen3-32b")
    two = replace(one, gpu_count=2)

    assert one.prefill_s(4096) / 2 < two.prefill_s(4096) < one.prefill_s(4096)


def test_a_long_prompt_costs_more_than_its_tokens() -> None:
    """Attention grows with the square of the length."""
    timing = h100(MISTRAL)

    assert timing.prefill_s(32_000) > 1.3 * 4 * timing.prefill_s(8_000)


def test_chunks_of_a_prompt_attend_to_as_much_as_the_whole() -> None:
    parameters = h100(MISTRAL).parameters
    parts = [parameters.chunk_attended_tokens(start_tokens=start, tokens=500) for start in (0, 500, 1000)]

    assert sum(parts) == parameters.chunk_attended_tokens(start_tokens=0, tokens=1500) == 1500 * 1501 / 2


def test_a_window_bounds_what_attention_looks_at() -> None:
    parameters = replace(h100(MISTRAL).parameters, window_tokens=100)
    expected = sum(min(position, 100) for position in range(51, 301))

    assert parameters.chunk_attended_tokens(start_tokens=50, tokens=250) == expected
    assert (parameters.attended_tokens(50), parameters.attended_tokens(500)) == (50, 100)


def test_no_work_takes_no_time() -> None:
    assert h100(MISTRAL).cost().total_s == 0


def test_the_time_scale_multiplies() -> None:
    assert h100(MISTRAL, time_scale=0.1).prefill_s(100) == pytest.approx(h100(MISTRAL).prefill_s(100) / 10)


def test_every_figure_that_cannot_be_read_from_a_name_has_a_source() -> None:
    for entry in catalogue().models:
        assert {"weights_bytes", "read_bytes", "kv_bytes_per_token"} <= set(entry.sources)
        assert not entry.state_bytes_per_sequence or "state_bytes_per_sequence" in entry.sources
        assert entry.experts is None or {"experts", "compute_factor"} <= set(entry.sources)
    assert all(gpu.source for gpu in catalogue().gpus)


@pytest.mark.parametrize(
    ("name", "kv_bytes", "state_bytes"),
    [
        (MISTRAL, 2 * 32 * 8 * 128 * 2, 0),
        (NANO_12B, 2 * 6 * 8 * 128 * 2, 28 * (128 * 80 * 128 * 4 + 12_288 * 3 * 2)),
        (NANO_30B, 2 * 6 * 2 * 128 * 2, 23 * (64 * 64 * 128 * 4 + 6_144 * 3 * 2)),
    ],
)
def test_memory_per_token_and_sequence_follows_from_the_architecture(
    name: str, kv_bytes: int, state_bytes: int
) -> None:
    parameters = h100(name).parameters

    assert (kv_bytes, state_bytes) == (parameters.kv_bytes_per_token, parameters.state_bytes_per_sequence)


def test_names_are_found_by_alias_and_without_regard_to_case() -> None:
    entry = known_model("mistralai/Mistral-7B-Instruct-v0.3")

    assert entry is not None
    assert entry.name == MISTRAL


def test_an_unknown_model_gets_figures_from_its_size() -> None:
    parameters = model_parameters("my-finetune", weights_bytes=14_496_047_104)
    mistral = h100(MISTRAL).parameters

    assert parameters == generic_parameters("my-finetune", weights_bytes=14_496_047_104)
    assert parameters.kv_bytes_per_token == pytest.approx(mistral.kv_bytes_per_token, rel=0.01)


def test_other_weights_of_a_known_model_scale_what_a_step_reads() -> None:
    whole = h100(NANO_30B).parameters
    half = model_parameters(NANO_30B, weights_bytes=whole.weights_bytes // 2)

    assert half.weights_read_bytes(8) == pytest.approx(whole.weights_read_bytes(8) / 2)


def test_an_unknown_gpu_is_none() -> None:
    assert gpu_speed("h900") is None

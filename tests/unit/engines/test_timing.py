"""Step times against figures that others published, and the shape of the curve."""

import pytest

from engines.model.catalogue import catalogue, generic_parameters, gpu_speed, known_model, model_parameters
from engines.model.timing import GpuSpeed, TimingModel

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


def test_the_mixture_of_experts_gives_the_published_token_time_at_four_streams() -> None:
    """NVIDIA: 721 tokens/s over 4 streams of Nemotron-3-Nano-30B-A3B on one H100, 5.5 ms a token."""
    step_s = h100(NANO_30B).decode_step_s(decode_count=4, context_tokens=4 * 200)

    assert step_s == pytest.approx(0.0055, rel=0.1)


@pytest.mark.parametrize(
    ("token_count", "gigabytes"), [(1, 3.6), (4, 7.35), (16, 17.9), (32, 25.3), (64, 30.2), (256, 31.6)]
)
def test_experts_read_more_with_each_token_until_all_are_read(token_count: int, gigabytes: float) -> None:
    assert h100(NANO_30B).parameters.weights_read_bytes(token_count) == pytest.approx(gigabytes * GB, rel=0.01)


def test_a_dense_model_reads_its_weights_once_whatever_the_batch() -> None:
    parameters = h100(MISTRAL).parameters

    assert parameters.weights_read_bytes(1) == parameters.weights_read_bytes(64) == parameters.weights_bytes


@pytest.mark.parametrize(("name", "tokens_per_s"), [(MISTRAL, 34_000), (NANO_12B, 20_000), (NANO_30B, 31_000)])
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


def test_half_the_gpu_takes_twice_the_time_apart_from_the_overhead() -> None:
    whole = h100(MISTRAL)
    half_speed = GpuSpeed(
        name="half",
        memory_bytes_per_s=whole.gpu.memory_bytes_per_s,
        memory_efficiency=whole.gpu.memory_efficiency,
        flops_per_s=whole.gpu.flops_per_s,
        compute_fraction=0.5,
    )
    half = TimingModel(parameters=whole.parameters, gpu=half_speed)
    overhead_s = whole.parameters.step_overhead_s

    assert half.prefill_s(4096) - overhead_s == pytest.approx(2 * (whole.prefill_s(4096) - overhead_s))


def test_no_work_takes_no_time() -> None:
    assert h100(MISTRAL).step_s(prefill_tokens=0, decode_count=0, context_tokens=0) == 0


def test_the_time_scale_multiplies() -> None:
    assert h100(MISTRAL, time_scale=0.1).prefill_s(100) == pytest.approx(h100(MISTRAL).prefill_s(100) / 10)


def test_every_figure_that_cannot_be_read_from_a_name_has_a_source() -> None:
    for entry in catalogue().models:
        assert {"weights_bytes", "kv_bytes_per_token", "prefill_efficiency", "step_overhead_s"} <= set(entry.sources)
        assert not entry.state_bytes_per_sequence or "state_bytes_per_sequence" in entry.sources
        assert entry.experts is None or "experts" in entry.sources
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

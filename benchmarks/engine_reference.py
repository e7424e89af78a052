"""Dedicated GPUs that are not in the fit, and the reference values of llm-d."""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from benchmarks.engine_rows import Family, GiB, Row, closed_loop, request_s, timing_of, tokens_per_s
from engines.model.batching import BatchLimits
from engines.model.simulation import EngineSetup, Served, Wanted, simulate

LLAMA: Final = "llama-3.1-8b-instruct"
LIMITS: Final = BatchLimits(sequences_max=256, step_tokens_max=8192)
A100_LIMITS: Final = BatchLimits(sequences_max=256, step_tokens_max=2048)
POOL_BYTES: Final = {"h100-80": 50 * GiB, "a100-80": 50 * GiB, "a100-40": 19 * GiB, "h200-141": 100 * GiB}
CHAT_PROMPT: Final = ((0.0, 10), (0.25, 60), (0.5, 140), (0.75, 290), (0.99, 1050), (1.0, 1050))
"""AccelMark suite A: the shape of the published quantiles of the prompts' lengths, halved. So their mean is 256, which
is what the runs' own totals give: 0.743 prompt tokens for each of the 344 tokens of an answer."""
CHAT_OUTPUT: Final = ((0.0, 80), (0.5, 340), (0.75, 512), (1.0, 512))
"""The same of the answers: their mean by the runs' totals, and the suite's bound of 512."""


def quantile_at(points: Sequence[tuple[float, int]], fraction: float) -> int:
    for (low, low_value), (high, high_value) in pairwise(points):
        if fraction <= high:
            return round(low_value + (high_value - low_value) * (fraction - low) / (high - low))
    return points[-1][1]


def chat(count: int, *, requests_per_s: float | None, seed: int) -> tuple[Wanted, ...]:
    """Requests with the suite's lengths; at random times when a rate is given."""
    dice, at_s, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        requests.append(
            Wanted(
                prompt_tokens=quantile_at(CHAT_PROMPT, dice.random()),
                output_tokens=quantile_at(CHAT_OUTPUT, dice.random()),
                at_s=None if requests_per_s is None else at_s,
            )
        )
        if requests_per_s is not None:
            at_s += dice.expovariate(requests_per_s)
    return tuple(requests)


def accelmark(gpu: str, requests: tuple[Wanted, ...], *, clients: int = 1) -> list[Served]:
    limits = A100_LIMITS if gpu.startswith("a100") else LIMITS
    setup = EngineSetup(
        timing=timing_of(LLAMA, gpu), kv_bytes=POOL_BYTES[gpu], requests=requests, limits=limits, clients=clients,
        request_s=request_s(gpu),
    )  # fmt: skip
    [served] = simulate([setup])
    return served


def dedicated(part: float) -> Iterator[Row]:
    yield from _chat_suite(part)
    yield from _sweeps(part)


def _chat_suite(part: float) -> Iterator[Row]:
    lengths = "distribution of lengths; Poisson arrivals"
    seen = {
        ("h100-80", "vLLM 0.7.3"): (906, (9.52, 26.8), 5128),
        ("a100-80", "vLLM 0.20.1"): (709, (13.21, 40.2), 3900),
        ("a100-40", "vLLM 0.7.3"): (482, (24.26, 57.85), 2413),
    }
    for (gpu, engine), (at_eight, at_five_qps, at_once) in seen.items():
        if gpu != "a100-80":  # its sustained run is in the fit
            served = accelmark(gpu, chat(round(160 * part) + 8, requests_per_s=None, seed=1), clients=8)
            yield Row(
                what=f"Llama-3-8B, {gpu}, {engine}, 8 clients", unit="tokens/s", measured=at_eight,
                modelled=tokens_per_s(served), assumed=lengths,
            )  # fmt: skip
        served = accelmark(gpu, chat(round(300 * part), requests_per_s=5, seed=2))
        yield Row(
            what=f"Llama-3-8B, {gpu}, {engine}, 5 requests/s: time per token", unit="ms", measured=at_five_qps[0],
            modelled=1000 * statistics.median(item.inter_token_s for item in served), assumed=lengths,
        )  # fmt: skip
        yield Row(
            what=f"Llama-3-8B, {gpu}, {engine}, 5 requests/s: first token", unit="ms", measured=at_five_qps[1],
            modelled=1000 * statistics.median(item.ttft_s for item in served), assumed=lengths,
        )  # fmt: skip
        served = accelmark(gpu, chat(100, requests_per_s=None, seed=3), clients=100)
        yield Row(
            what=f"Llama-3-8B, {gpu}, {engine}, 100 requests at once", unit="tokens/s", measured=at_once,
            modelled=tokens_per_s(served), assumed=lengths,
        )  # fmt: skip


def _sweeps(part: float) -> Iterator[Row]:
    a100, h100, h200 = (timing_of(LLAMA, gpu) for gpu in ("a100-40", "h100-80", "h200-141"))
    points = {}
    for clients in (1, 8):
        setup = closed_loop(
            a100, clients=clients, requests=max(round(clients * 20 * part), 4), prompt=1024, output=128,
            kv_bytes=POOL_BYTES["a100-40"], limits=A100_LIMITS,
        )  # fmt: skip
        [points[clients]] = simulate([setup])
    per_token_s = statistics.median(item.inter_token_s for item in points[1])
    yield Row(
        what="Llama-3.1-8B, a100-40, vLLM 0.23, 1 client: decode",
        unit="tokens/s",
        measured=75,
        modelled=1 / per_token_s,
    )
    yield Row(
        what="the same, 8 clients over 1", unit="x", measured=6.6,
        modelled=tokens_per_s(points[8]) / tokens_per_s(points[1]),
    )  # fmt: skip
    [served] = simulate(
        [EngineSetup(timing=h200, kv_bytes=POOL_BYTES["h200-141"], clients=8, limits=LIMITS,
                     requests=tuple(Wanted(prompt_tokens=32, output_tokens=128) for _ in range(8)))]
    )  # fmt: skip
    yield Row(
        what="Llama-3.1-8B, h200-141, vLLM 0.6, batch of 8, 32 in, 128 out", unit="ms", measured=833.4,
        modelled=1000 * max(item.ended_s for item in served),
    )  # fmt: skip
    for clients, seen_ms in ((1, 6.48), (4, 6.59), (16, 10.94), (64, 46.91)):
        yield Row(
            what=f"Llama-3.1-8B, h100-80, vLLM 0.21, {clients} clients: time per token", unit="ms", measured=seen_ms,
            modelled=1000 * h100.decode_step_s(decode_count=clients, context_tokens=clients * 200),
            assumed="200 tokens of context (short chat)",
        )  # fmt: skip


def llm_d(_: float) -> Iterator[Row]:
    """The rows of llm-d's calibration matrix whose model and GPU are in our data."""
    tokens = 8192
    for gpu, title, engine, seen in (
        ("h100-80", "Qwen3-32B on 2 x H100", "vLLM 0.23", 15928),
        ("h200-141", "Qwen3-VL-32B on 2 x H200", "vLLM 0.23", 15751),
        ("h100-80", "Qwen3-32B on 2 x H100", "SGLang 0.5.13", 30720),
    ):
        timing = timing_of("qwen3-32b", gpu, gpu_count=2)
        yield Row(
            what=f"{title}, {engine}: prompt tokens/s of an idle engine",
            unit="tokens/s",
            measured=seen,
            modelled=tokens / (timing.prefill_s(tokens) + request_s(gpu)),
            assumed="a prompt of one chunk of 8,192 tokens",
        )


def llm_d_simulator(_: float) -> Iterator[Row]:
    """The middle of each range that the simulator's documentation gives."""
    small, large = timing_of(LLAMA, "h100-80"), timing_of("qwen3-32b", "h100-80", gpu_count=2)
    for name, timing, first_ms, inter_ms in (
        ("7 to 8 B", small, (60, 120), (10, 15)),
        ("30 to 34 B on two GPUs", large, (160, 280), (20, 30)),
    ):
        yield Row(
            what=f"{name}: first token of 256 ({first_ms[0]} to {first_ms[1]} ms)", unit="ms",
            measured=sum(first_ms) / 2, modelled=1000 * (timing.prefill_s(256) + request_s("h100-80")),
        )  # fmt: skip
        yield Row(
            what=f"{name}: between tokens ({inter_ms[0]} to {inter_ms[1]} ms)", unit="ms",
            measured=sum(inter_ms) / 2, modelled=1000 * timing.decode_step_s(decode_count=1, context_tokens=256),
        )  # fmt: skip
    yield Row(
        what="7 to 8 B: each prompt token (0.15 to 0.30 ms)", unit="ms", measured=0.225,
        modelled=1000 * (small.prefill_s(4096) - small.prefill_s(2048)) / 2048,
    )  # fmt: skip


def dynamo(_: float) -> Iterator[Row]:
    """An 8 B model in fp8 on an H200: the profile that Dynamo ships for its planner, as its documentation sums it up.

    Rates and times of the source are two views of the same two runs; one of each is compared.
    """
    bf16 = timing_of(LLAMA, "h200-141")
    # Linear layers in fp8, the embedding and the output layer (128,256 x 4,096 each) in bf16.
    embedding = 128256 * 4096
    layers = bf16.parameters.active_parameters - embedding
    fp8 = replace(
        bf16.parameters,
        precision="fp8",
        read_bytes=layers + 2 * embedding,
        weights_bytes=layers + 4 * embedding,
        kv_bytes_per_token=bf16.parameters.kv_bytes_per_token // 2,
        compute_factor=2.0,
    )
    timing = replace(bf16, parameters=fp8)
    prompt, answer, batch = 3000, 150, 100
    yield Row(
        what="Llama-3.1-8B fp8, h200-141: first token of 3,000", unit="ms", measured=80,
        modelled=1000 * (timing.prefill_s(prompt) + request_s("h200-141")), assumed="fp8 kernels twice as fast as bf16",
    )  # fmt: skip
    context_tokens = batch * (prompt + answer // 2)
    yield Row(
        what="Llama-3.1-8B fp8, h200-141: between tokens at 10,000 tokens/s", unit="ms", measured=10,
        modelled=1000 * timing.decode_step_s(decode_count=batch, context_tokens=context_tokens),
        assumed="a batch of 100, which is 10,000 tokens/s at 10 ms; KV in fp8",
    )  # fmt: skip


def dynamo_profiling(_: float) -> Iterator[Row]:
    """15,505 prompt tokens/s a GPU are 3,000 tokens in 48.37 ms on four; 51.22 tokens/s a GPU are a batch of one."""
    timing = timing_of(LLAMA, "h100-80", gpu_count=4)
    prompt, answer = 3000, 150
    yield Row(
        what="Llama 8B on 4 x H100: first token of 3,000", unit="ms", measured=48.37,
        modelled=1000 * (timing.prefill_s(prompt) + request_s("h100-80")),
    )  # fmt: skip
    yield Row(
        what="Llama 8B on 4 x H100: between tokens, one request", unit="ms", measured=4.83,
        modelled=1000 * timing.decode_step_s(decode_count=1, context_tokens=prompt + answer // 2),
    )  # fmt: skip


FAMILIES: Final = (
    Family(
        name="dedicated",
        group="dedicated",
        title="One model on its own GPU, not in the fit",
        source=(
            "AccelMark verified results, suite A (github.com/FreedomIntelligence/AccelMark, commit 5797fc4); "
            'johnmusgrave.com, "vLLM throughput-latency sweep on NVIDIA A100"; vLLM performance benchmark, Buildkite '
            'build 9515; github.com/yobitelcomm/bench, recipe "concurrency sweep"'
        ),
        rows=dedicated,
        is_wrong_because=(
            "The engines span vLLM 0.6 to 0.23; the parameters of a GPU are one fit over several versions. The old "
            "ones (0.7.3 on the A100 40GB) run a prompt in a step of its own and lose more to each request, so that "
            "their times per token under load and to the first token are longer than modelled. The H100 run with "
            "vLLM 0.21 delivers fewer tokens at 64 clients than at 16, so something other than the GPU bounds it "
            "there."
        ),
    ),
    Family(
        name="llm_d",
        group="references",
        title="llm-d: tensor-parallel prompt rate",
        source="llm-d, guides/recipes/router/calibration/configuration-matrix.md (commit 127478c), measured GPU rows",
        rows=llm_d,
        is_wrong_because=(
            "SGLang's rate is more than the two GPUs' peak in bf16 allows (2 x 989 TFLOPS over 65.5 GFLOP a token is "
            "30,200 tokens/s), so part of those prompts was probably found in a cache. The row of gpt-oss-120b is left "
            "out: the model is not in our data."
        ),
    ),
    Family(
        name="llm_d_simulator",
        group="references",
        title="llm-d-inference-sim: reference values",
        source=(
            "llm-d-inference-sim 0.10, documentation: approximate ranges at batch 1, bf16, H100; no accuracy is claimed"
        ),
        rows=llm_d_simulator,
        is_wrong_because=(
            "All rows. The source calls its values approximate, and measurements contradict them: an 8 B model on "
            "an H100 makes a token in 6.5 to 7.7 ms and its first one of 280 tokens in 20 ms (the tables above). "
            "The model is not bent towards them."
        ),
    ),
    Family(
        name="dynamo",
        group="references",
        title="Dynamo: the profile of its planner",
        source=(
            "NVIDIA Dynamo, planner tests, profile H200_TP1P_TP1D as described there (Llama-3.1-8B-Instruct-FP8, 3,000 "
            "tokens in, 150 out): 40k tokens/s a GPU in prefill at 80 ms to the first token, 10k in decode at 10 ms"
        ),
        rows=dynamo,
        is_wrong_because=(
            "Both figures are round. A prompt in fp8 reaches twice the arithmetic of bf16 in the model, but no fp8 "
            "figure is in the fit. A step of 100 sequences is too long: more than a third of it is the host's time "
            "for each sequence, as fitted on other engines; this one shows at most a fifth of that. "
        ),
    ),
    Family(
        name="dynamo_profiling",
        group="references",
        title="Dynamo: what its profiler found",
        source=(
            "NVIDIA Dynamo, docs/benchmarks/pre_deployment_profiling.md (commit 0110cbc): its example configuration on "
            "H100, 3,000 tokens in, 150 out, an 8 B Llama (DeepSeek-R1-Distill) with tensor parallelism of 4"
        ),
        rows=dynamo_profiling,
        is_wrong_because=(
            "The page names the model only under its next picture. Small products on four GPUs reach less of the peak "
            "than the fit, which has seen single GPUs."
        ),
    ),
)

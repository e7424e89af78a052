"""Engines behind a stock Service, as llm-d's guide ``optimized-baseline`` measured them: the side without its router.

Eight servers of Qwen3-32B, each on two H100, get the requests in turn. A ladder of rates; at each one the requests of
so many seconds are sent at random times and all are answered before the next. Rows are all figures that the guide's
reports tell of that side, but for those that they call empty. The other side, with llm-d's router, depends on which
server keeps which prefix, and is not compared.
"""

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from benchmarks.engine_rows import Family, Row, request_s, timing_of, tokens_per_s
from engines.model.batching import BatchLimits
from engines.model.simulation import EngineSetup, Served, Wanted, simulate

SERVERS: Final = 8
GROUPS: Final = 150
PREFIX_TOKENS, QUESTION_TOKENS, OUTPUT_TOKENS = 6000, 1200, 1000
PROMPT_TOKENS: Final = PREFIX_TOKENS + QUESTION_TOKENS
POOL_BYTES: Final = int(2 * 85.5e9 * 0.9 - 65.6e9 - 6e9)
"""Of two H100, nine tenths, less the weights and 3 GB on each for activations and graphs."""
LADDER: Final = {
    3: 20, 10: 20, 15: 20, 20: 38, 22: 34, 25: 30, 30: 25, 35: 21, 40: 38, 43: 36, 46: 33, 49: 30, 52: 29, 55: 27,
    57: 26, 60: 25,
}  # fmt: skip
"""{requests/s to all servers: seconds}, from the guide's workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one report tells of the stock side, by rate in the order of the ladder; None: it calls the figure empty."""

    name: str
    tokens_per_s: tuple[int, ...]
    ttft_mean_s: tuple[float | None, ...] = ()
    ttft_p50_s: tuple[float | None, ...] = ()
    ttft_p90_s: tuple[float | None, ...] = ()
    itl_mean_ms: float | None = None
    """Over the whole ladder."""


REPORTS: Final = (
    Report(
        name="vLLM",
        tokens_per_s=(
            1797, 4215, 5381, 6205, 5517, 5965, 5702, 5890, 6336, 6588, 6459, 6265, 6303, 6290, 6089, 6551,
        ),
        ttft_mean_s=(
            0.415, 0.630, 0.881, 18.103, 20.171, 21.842, 24.597, 24.162, 68.673, 72.429, 70.084, 70.659, 74.326, 72.564,
            72.329, 75.586,
        ),
        ttft_p90_s=(
            0.522, 1.014, 1.593, 35.344, 39.436, 42.813, 46.036, 45.190, 126.238, 130.275, 129.810, 133.718, 134.981,
            134.034, 135.023, 138.663,
        ),
        itl_mean_ms=44.0,
    ),
    Report(
        name="vLLM, second report",
        tokens_per_s=(
            1889, 4944, 6066, 4555, 6239, 6350, 6251, 6544, 6228, 6860, 6526, 6956, 7049, 6402, 6317, 6764,
        ),
        ttft_p50_s=(
            None, None, None, 0.9, 18.3, 0.4, 0.8, 21.0, 20.0, 25.7, 20.4, 66.9, 69.9, 78.3, 83.1, 88.1,
        ),
        ttft_p90_s=(
            None, None, None, 2.4, 46.1, 0.9, 4.9, 46.2, 37.9, 61.9, 66.8, 139.9, 143.8, 158.5, 153.3, 154.1,
        ),
    ),
    Report(
        name="SGLang",
        tokens_per_s=(
            1647, 4644, 5740, 6018, 5843, 5906, 5831, 5746, 6629, 6828, 6686, 6285, 6488, 5855, 5769, 5642,
        ),
        ttft_p90_s=(
            0.867, 1.656, 1.396, 33.849, 35.845, 39.469, 43.176, 47.802, 119.486, 151.379, 125.039, 126.431, 131.208,
            129.790, 129.604, 172.690,
        ),
        itl_mean_ms=40.57,
    ),
)  # fmt: skip


def prefix_hit_fraction() -> float:
    """Of a prompt, what its server has kept, when every group comes to every server.

    The pool is always full of the newest requests, running or not, and a prefix is in it once: n requests have
    d = G (1 - (1 - 1/G)^n) prefixes of G groups, and n (question + answer) + d prefix tokens fill it.
    """
    pool_tokens = POOL_BYTES / timing_of("qwen3-32b", "h100-80", gpu_count=2).parameters.kv_bytes_per_token
    kept, low, high = 0.0, 0.0, pool_tokens
    for _ in range(60):
        count = (low + high) / 2
        kept = GROUPS * (1 - (1 - 1 / GROUPS) ** count)
        is_over = count * (QUESTION_TOKENS + OUTPUT_TOKENS) + kept * PREFIX_TOKENS > pool_tokens
        low, high = (low, count) if is_over else (count, high)
    return kept / GROUPS * PREFIX_TOKENS / PROMPT_TOKENS


@cache
def stage(rate: int) -> tuple[Served, ...]:
    """One server's part of one rate's requests."""
    dice = random.Random(rate)
    count = round(rate * LADDER[rate] / SERVERS)
    sent_s = sorted(dice.uniform(0, LADDER[rate]) for _ in range(count))
    [served] = simulate(
        [
            EngineSetup(
                timing=timing_of("qwen3-32b", "h100-80", gpu_count=2),
                kv_bytes=POOL_BYTES,
                requests=tuple(
                    Wanted(prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS, at_s=at_s) for at_s in sent_s
                ),
                limits=BatchLimits(sequences_max=256, step_tokens_max=8192, prefix_hit_fraction=prefix_hit_fraction()),
                request_s=request_s("h100-80"),
            )
        ]
    )
    return tuple(served)


def stock_service(part: float) -> Iterator[Row]:
    assumed = "0.9 of the memory; prompts found in part, by an always full pool"
    step = max(1, round(1 / part))
    for report in REPORTS:
        for place, rate in list(enumerate(LADDER))[::step]:
            served = stage(rate)
            first_s = [item.ttft_s for item in served]
            what = f"Qwen3-32B on 8 x 2 H100, {report.name}, {rate} requests/s"
            yield Row(
                what=f"{what}: output", unit="tokens/s", measured=report.tokens_per_s[place],
                modelled=SERVERS * tokens_per_s(served), assumed=assumed,
            )  # fmt: skip
            for name, seen_s, modelled_s in (
                ("mean", report.ttft_mean_s, statistics.fmean(first_s)),
                ("p50", report.ttft_p50_s, statistics.median(first_s)),
                ("p90", report.ttft_p90_s, statistics.quantiles(first_s, n=10)[-1] if len(first_s) > 1 else first_s[0]),
            ):
                measured = seen_s[place] if seen_s else None
                if measured is not None:
                    yield Row(
                        what=f"{what}: first token, {name}", unit="s", measured=measured, modelled=modelled_s,
                        assumed=assumed,
                    )  # fmt: skip
        if report.itl_mean_ms is not None:
            all_s = [item.inter_token_s for rate in list(LADDER)[::step] for item in stage(rate)]
            yield Row(
                what=f"Qwen3-32B on 8 x 2 H100, {report.name}, all rates: between tokens, mean", unit="ms",
                measured=report.itl_mean_ms, modelled=1000 * statistics.fmean(all_s), assumed=assumed,
            )  # fmt: skip


FAMILIES: Final = (
    Family(
        name="llm_d_service",
        group="references",
        title="llm-d: engines behind a stock Service",
        source=(
            "llm-d, guides/optimized-baseline, the side without the router: README (commit 021723b) and in "
            "benchmark-results vllm-qwen3-32b-h100 (53c5b20) and sglang-qwen3-32b-h100 (17e359c); the workload is "
            "benchmark-templates/guide.yaml"
        ),
        rows=stock_service,
        is_wrong_because=(
            "Under overload the first tokens of the slowest tenth (p90) come sooner than modelled, and so the mean: "
            "the model serves all in the order of their arrival, on servers that are equal. The second report's first "
            "tokens do not grow with the rate (18 s at 22 requests/s, 0.4 s at 25, 21 s at 35), and contradict the "
            "other two below 40 requests/s. SGLang is modelled with the same parameters as vLLM. Rows of one rate "
            "share one simulated run, so they are not independent; and they are most of their family's rows."
        ),
    ),
)

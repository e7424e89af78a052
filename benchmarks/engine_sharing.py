"""Two models on one A100, time-sliced and under MPS: NVIDIA's published sweep, against the engine model."""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Final, Literal

from benchmarks.engine_rows import Family, MiB, Row, closed_loop, request_s, timing_of, tokens_per_s
from engines.model.batching import BatchLimits
from engines.model.sharing import Sharing
from engines.model.simulation import simulate

Configuration = Literal["dedicated", "time-sliced", "fractions"]

SOURCE: Final = (
    'NVIDIA Dynamo documentation, "Interpreting GPU Sharing Results" and its three deployment guides '
    "(ai-dynamo/dynamo, docs/fern/pages/use-cases/gpu-sharing): Qwen3-4B, 8 x A100 40GB, 2,048 tokens in, 256 out, "
    "vLLM in Dynamo 1.3"
)
ACTIVATION_BYTES: Final = 800 * MiB
"""Assumed: what an engine takes beside weights and KV cache for steps of 2,048 tokens."""
SHARED_MODEL: Final = "qwen3-4b"
SHARED_GPU: Final = "a100-40"
SHARED_PROMPT, SHARED_OUTPUT = 2048, 256
POOL_BYTES: Final[dict[Configuration, float]] = {
    "dedicated": 0.85 * 40960 * MiB,
    "time-sliced": 0.85 * 20070 * MiB,
    "fractions": 0.40 * 40960 * MiB,
}
"""What vLLM sized itself to: the published --gpu-memory-utilization of the memory that it saw."""
SHARED_SEEN: Final[dict[Configuration, dict[int, tuple[float, float, float]]]] = {
    "dedicated": {
        1: (111.4, 103.6, 8.58),
        2: (227.5, 48.6, 8.61),
        4: (429.1, 49.0, 9.13),
        8: (671.2, 331.5, 11.00),
        16: (929.2, 431.0, 15.56),
        32: (1141.8, 481.8, 26.20),
    },
    "time-sliced": {
        1: (101.1, 216, 19.0),
        2: (193.0, 374, 19.3),
        4: (343.9, 571, 21.1),
        8: (572.0, 731, 25.2),
        16: (831.4, 777, 35.6),
        32: (943.0, 1702, 55.9),
    },
    "fractions": {
        1: (144.4, 185, 13.2),
        2: (259.2, 347, 14.1),
        4: (456.1, 549, 15.4),
        8: (722.8, 739, 19.3),
        16: (1003.4, 786, 28.9),
        32: (1132.4, 2159, 39.2),
    },
}
"""{configuration: {clients of each model: (tokens/s of a GPU, TTFT p50 in ms, inter-token p50 in ms)}}"""
DEDICATED_HIT: Final = {2: 0.99, 4: 0.99, 8: 0.5}
"""{clients: part of a prompt found in the prefix cache}. The sweep sends 40, 40, 40, 80, 160 and 320 prompts of one
seed after each other, so each point begins with those of the one before. The dedicated pool holds 170,000 tokens, 74
prompts with their answers; half a pool holds fewer than 40. So the second and third point find all their prompts, the
fourth the first half, every other point none."""

CACHED: Final = (2, 4)
"""Clients of the dedicated points that find all their prompts."""
HITS_ASSUMED: Final = "prefix cache hits, from the order of the sweep"


@cache
def shared_point(
    configuration: Configuration, clients: int, part: float, outside_s: float = request_s(SHARED_GPU)
) -> tuple[float, float, float]:
    """(tokens/s of a GPU, TTFT p50 in ms, inter-token p50 in ms) as modelled."""
    timing = timing_of(SHARED_MODEL, SHARED_GPU)
    warm = min(16, 2 * clients)
    count = max(round(max(40, 10 * clients) * part), 2 * clients)
    hit = DEDICATED_HIT.get(clients, 0.0) if configuration == "dedicated" else 0.0
    pool_bytes = POOL_BYTES[configuration] - timing.parameters.weights_bytes - ACTIVATION_BYTES
    setup = closed_loop(
        timing,
        clients=clients,
        requests=warm + count,
        prompt=SHARED_PROMPT,
        output=SHARED_OUTPUT,
        kv_bytes=int(pool_bytes),
        limits=BatchLimits(sequences_max=32, step_tokens_max=2048, prefix_hit_fraction=hit),
    )
    setup = replace(setup, request_s=outside_s)
    sharing = {
        "dedicated": Sharing(),
        "time-sliced": Sharing(switch_s=timing.gpu.switch_s),
        "fractions": Sharing(mode="mps", sm_fraction=0.5),
    }[configuration]
    engine_count = 1 if configuration == "dedicated" else 2
    answers = [served[warm:] for served in simulate([setup] * engine_count, sharing)]
    every = [item for served in answers for item in served]
    return (
        sum(tokens_per_s(served) for served in answers),
        1000 * statistics.median(item.ttft_s for item in every),
        1000 * statistics.median(item.inter_token_s for item in every),
    )


def _shared_rows(index: int, unit: str, part: float) -> Iterator[Row]:
    for configuration, points in SHARED_SEEN.items():
        for clients, seen in points.items():
            engines = "one model" if configuration == "dedicated" else "two models"
            yield Row(
                what=f"{configuration}, {engines} x {clients} clients",
                unit=unit,
                measured=seen[index],
                modelled=shared_point(configuration, clients, part)[index],
                assumed=HITS_ASSUMED if configuration == "dedicated" and clients in DEDICATED_HIT else "",
            )


def sharing_throughput(part: float) -> Iterator[Row]:
    yield from _shared_rows(0, "tokens/s", part)


def sharing_first_token(part: float) -> Iterator[Row]:
    yield from _shared_rows(1, "ms", part)


@cache
def seen_request_s(part: float) -> float:
    """Time of a request outside the steps as the two dedicated points with cached prompts show it."""
    waits_s = []
    for clients in CACHED:
        step_s = shared_point("dedicated", clients, part)[1] / 1000 - request_s(SHARED_GPU)
        waits_s.append(SHARED_SEEN["dedicated"][clients][1] / 1000 - step_s)
    return statistics.mean(waits_s)


def sharing_first_token_again(part: float) -> Iterator[Row]:
    outside_s = seen_request_s(part)
    for configuration, points in SHARED_SEEN.items():
        for clients, seen in points.items():
            if configuration == "dedicated" and clients in CACHED:
                continue
            yield Row(
                what=f"{configuration}, {clients} clients of each model",
                unit="ms",
                measured=seen[1],
                modelled=shared_point(configuration, clients, part, outside_s)[1],
                assumed=f"{1000 * outside_s:.0f} ms of each request outside the steps",
            )


def sharing_inter_token(part: float) -> Iterator[Row]:
    yield from _shared_rows(2, "ms", part)


def sharing_kept(part: float) -> Iterator[Row]:
    """Throughput of two models at c clients each in parts of one model's at 2c: the columns of the published table."""
    ways: tuple[Configuration, ...] = ("time-sliced", "fractions")
    for way in ways:
        for clients in (1, 2, 4, 8, 16):
            seen = SHARED_SEEN[way][clients][0] / SHARED_SEEN["dedicated"][2 * clients][0]
            model = shared_point(way, clients, part)[0] / shared_point("dedicated", 2 * clients, part)[0]
            yield Row(
                what=f"{way}, {2 * clients} requests on the GPU",
                unit="% kept",
                measured=100 * seen,
                modelled=100 * model,
            )


FAMILIES: Final = (
    Family(
        name="sharing_kept",
        group="sharing",
        title="Two models on one GPU: throughput kept",
        source=SOURCE,
        rows=sharing_kept,
        is_wrong_because=(
            "At four requests the published dedicated run had its prompts in the prefix cache; the shared runs, "
            "with half the memory each, had not. The model has the same asymmetry, by the arithmetic told below."
        ),
    ),
    Family(
        name="sharing_throughput",
        group="sharing",
        title="Two models on one GPU: throughput",
        source=SOURCE,
        rows=sharing_throughput,
        is_wrong_because=(
            "Worst where memory decides (32 clients): how much of its memory an engine leaves for the KV cache is "
            "assumed, and so is the number of preemptions. Under MPS the model is slow throughout: it lets the "
            "engines lose 5 % to each other, which this run does not show."
        ),
    ),
    Family(
        name="sharing_inter_token",
        group="sharing",
        title="Two models on one GPU: time between tokens",
        source=SOURCE,
        rows=sharing_inter_token,
        is_wrong_because=(
            "Time-sliced at few clients the model is a little fast: real switches cost more than moving registers and "
            "refilling caches. Under MPS it is slow, as above."
        ),
    ),
    Family(
        name="sharing_first_token",
        group="sharing",
        title="Two models on one GPU: time to the first token",
        source=SOURCE,
        rows=sharing_first_token,
        is_wrong_because=(
            "Too short nearly everywhere. Equal requests of a closed loop bunch: several prompts arrive within one "
            "step, and each waits for those before it. How many do depends on the milliseconds that frontend, router "
            "and client take between an answer and the next request, which are not published. The next table shows "
            "that they are the reason. Without knowing them, do not read times to the first token under a closed "
            "loop of equal requests from this model."
        ),
    ),
    Family(
        name="sharing_first_token_again",
        group="sharing",
        title="The same, with a request's time outside the engine read off the table",
        source=SOURCE,
        rows=sharing_first_token_again,
        is_wrong_because=(
            "No test of the model, since one input comes from the table itself: two dedicated points had all prompts "
            "in the prefix cache, and what their first tokens took beyond one step is taken as every request's time "
            "outside the engine. The other sixteen points follow."
        ),
        is_judged=False,
    ),
)

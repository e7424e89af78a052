"""Engines in virtual time: no token is lost, more of anything never hurts, equal inputs give equal results."""

import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.model.batching import BatchLimits
from engines.model.catalogue import generic_parameters, gpu_speed
from engines.model.sharing import SHARING_MODES, Sharing
from engines.model.simulation import EngineSetup, GpuSimulation, Served, Wanted, kv_geometry, simulate
from engines.model.timing import GpuSpeed, TimingModel

MiB = 1 << 20
GB = 10**9


def gpu(*, factor: float = 1.0) -> GpuSpeed:
    found = gpu_speed("h100-80")
    assert found is not None
    return replace(found, memory_bytes_per_s=found.memory_bytes_per_s * factor)


def setup(
    requests: tuple[Wanted, ...], *, clients: int = 4, kv_bytes: int = 512 * MiB, factor: float = 1.0
) -> EngineSetup:
    parameters = generic_parameters("made-up", weights_bytes=4 * GB)
    limits = BatchLimits(sequences_max=16, step_tokens_max=512)
    timing = TimingModel(parameters=parameters, gpu=gpu(factor=factor))
    return EngineSetup(timing=timing, kv_bytes=kv_bytes, requests=requests, clients=clients, limits=limits)


def open_loop(*, count: int, requests_per_s: float, seed: int = 1) -> tuple[Wanted, ...]:
    dice = random.Random(seed)
    lengths = [(dice.randint(1, 600), dice.randint(1, 80)) for _ in range(count)]
    gaps = [dice.expovariate(1.0) for _ in range(count)]
    return tuple(
        Wanted(prompt_tokens=prompt, output_tokens=output, at_s=sum(gaps[: index + 1]) / requests_per_s)
        for index, (prompt, output) in enumerate(lengths)
    )


def mean_latency_s(served: list[Served]) -> float:
    return statistics.mean(item.latency_s for item in served)


requests_of = st.lists(
    st.builds(Wanted, prompt_tokens=st.integers(1, 700), output_tokens=st.integers(1, 60)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=40)
@given(st.lists(requests_of, min_size=1, max_size=3), st.sampled_from(SHARING_MODES), st.integers(28, 120))
def test_tokens_out_are_tokens_asked_and_memory_holds(work: list[list[Wanted]], mode: str, pool_mib: int) -> None:
    """A small pool, so that many runs preempt."""
    engines = [setup(tuple(requests), kv_bytes=pool_mib * MiB) for requests in work]
    simulation = GpuSimulation(engines, Sharing(mode=mode, switch_s=0.0001))  # type: ignore[arg-type]
    answers = simulation.run()

    for requests, served, run in zip(work, answers, simulation.runs, strict=True):
        assert [item.output_tokens for item in served] == [wanted.output_tokens for wanted in requests]
        assert all(item.sent_s < item.first_token_s <= item.ended_s for item in served)
        assert run.kv_used_max <= run.batcher.block_limit
        assert run.batcher.used_blocks == 0


def test_a_pool_that_is_too_small_preempts_and_loses_nothing() -> None:
    requests = tuple(Wanted(prompt_tokens=200, output_tokens=200) for _ in range(12))
    simulation = GpuSimulation([setup(requests, clients=12, kv_bytes=60 * MiB)], Sharing())
    [served] = simulation.run()

    assert simulation.runs[0].batcher.preemption_count > 0
    assert [item.output_tokens for item in served] == [200] * 12


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_equal_inputs_give_equal_results(mode: str) -> None:
    engines = [setup(open_loop(count=30, requests_per_s=20, seed=seed)) for seed in (1, 2)]
    sharing = Sharing(mode=mode, switch_s=0.0001)  # type: ignore[arg-type]

    assert simulate(engines, sharing) == simulate(engines, sharing)


def test_more_bandwidth_is_never_slower() -> None:
    requests = open_loop(count=60, requests_per_s=15)
    latencies = [mean_latency_s(simulate([setup(requests, factor=factor)])[0]) for factor in (0.5, 1.0, 2.0, 4.0)]

    assert latencies == sorted(latencies, reverse=True)


def test_more_load_is_not_served_faster() -> None:
    latencies = [
        mean_latency_s(simulate([setup(open_loop(count=60, requests_per_s=rate))])[0]) for rate in (2, 10, 30, 100)
    ]

    assert latencies == sorted(latencies)


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_a_neighbour_never_helps_and_an_idle_one_does_not_hurt(mode: str) -> None:
    sharing = Sharing(mode=mode, switch_s=0.0001)  # type: ignore[arg-type]
    requests = open_loop(count=40, requests_per_s=20)
    [alone] = simulate([setup(requests)], sharing)
    beside_idle, _ = simulate([setup(requests), setup(())], sharing)
    beside_busy, _ = simulate([setup(requests), setup(open_loop(count=40, requests_per_s=20, seed=2))], sharing)

    assert beside_idle == alone
    assert mean_latency_s(beside_busy) > mean_latency_s(alone)


def test_mps_keeps_more_than_time_slices_when_memory_decides() -> None:
    requests = tuple(Wanted(prompt_tokens=16, output_tokens=100) for _ in range(8))
    ends = {
        mode: max(item.ended_s for served in simulate([setup(requests)] * 2, Sharing(mode=mode)) for item in served)
        for mode in SHARING_MODES
    }

    assert ends["mps"] < ends["time-sliced"]


def test_the_state_of_a_hybrid_model_counts_as_blocks() -> None:
    parameters = replace(generic_parameters("made-up", weights_bytes=4 * GB), state_bytes_per_sequence=10 * MiB)
    geometry = kv_geometry(parameters)

    assert geometry.blocks(1) * geometry.block_bytes >= 10 * MiB

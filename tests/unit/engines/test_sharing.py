"""Several engines on one GPU: nobody gets more than there is, and nobody waits without reason."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.model.sharing import SHARING_MODES, Demand, SharedGpu, Sharing, SharingMode, demand_of, progress_rates
from engines.model.timing import StepCost

MEMORY_BOUND = Demand(compute_fraction=0.1, memory_fraction=0.8)
COMPUTE_BOUND = Demand(compute_fraction=0.9, memory_fraction=0.2)
SLICED = Sharing(mode="time-sliced", slice_s=0.002, switch_s=0.0001)
MPS = Sharing(mode="mps", mps_loss_fraction=0.0)

fractions = st.floats(0, 1)
demands = st.lists(st.builds(Demand, compute_fraction=fractions, memory_fraction=fractions), min_size=1, max_size=6)
sharings = st.builds(
    Sharing,
    mode=st.sampled_from(SHARING_MODES),
    switch_s=st.floats(0, 0.001),
    sm_fraction=st.floats(0.1, 1),
    mps_loss_fraction=st.floats(0, 0.2),
)
seconds = st.floats(0, 0.1)
costs = st.builds(
    lambda host, device, compute, memory: StepCost(host, device, device * compute, device * memory),
    seconds,
    seconds,
    fractions,
    fractions,
)


@given(sharings, demands)
def test_progress_never_exceeds_the_gpu(sharing: Sharing, wanted: list[Demand]) -> None:
    rates = progress_rates(sharing, wanted)

    assert all(0 <= rate <= 1 for rate in rates)
    if sharing.mode == "time-sliced":
        assert sum(rates) <= 1 + 1e-9
    else:
        assert sum(rate * need.compute_fraction for rate, need in zip(rates, wanted, strict=True)) <= 1 + 1e-9
        assert sum(rate * need.memory_fraction for rate, need in zip(rates, wanted, strict=True)) <= 1 + 1e-9


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_alone_an_engine_goes_at_full_speed(mode: SharingMode) -> None:
    assert progress_rates(Sharing(mode=mode, switch_s=0.001), [MEMORY_BOUND]) == (1.0,)


def test_time_slices_are_equal_and_switches_cost() -> None:
    assert progress_rates(SLICED, [MEMORY_BOUND, COMPUTE_BOUND]) == pytest.approx((0.5 / 1.05, 0.5 / 1.05))


def test_under_mps_what_fits_together_is_not_slowed() -> None:
    halves = [Demand(compute_fraction=0.2, memory_fraction=0.5)] * 2

    assert progress_rates(MPS, halves) == pytest.approx((1.0, 1.0))


def test_under_mps_only_those_that_need_what_is_scarce_are_slowed() -> None:
    light = Demand(compute_fraction=0.05, memory_fraction=0.0)
    rates = progress_rates(MPS, [MEMORY_BOUND, MEMORY_BOUND, light])

    assert rates == pytest.approx((0.625, 0.625, 1.0))


def test_a_cap_on_sms_bounds_arithmetic_and_not_bandwidth() -> None:
    capped = Sharing(mode="mps", sm_fraction=0.5, mps_loss_fraction=0.0)

    assert progress_rates(capped, [COMPUTE_BOUND]) == pytest.approx((0.5 / 0.9,))
    assert progress_rates(capped, [MEMORY_BOUND]) == (1.0,)


def test_a_step_alone_takes_its_time_in_any_pieces() -> None:
    gpu = SharedGpu(SLICED)
    gpu.start(1, StepCost(0.001, 0.006, 0.001, 0.004))
    assert gpu.next_change_s() == pytest.approx(0.001)
    assert gpu.advance(0.003) == ()
    assert gpu.advance(0.0039) == ()

    assert gpu.advance(0.0002) == (1,)
    assert gpu.is_idle
    assert math.isinf(gpu.next_change_s())


def test_while_one_is_on_the_host_the_other_has_the_gpu() -> None:
    gpu = SharedGpu(SLICED)
    gpu.start(1, StepCost(0.010, 0.001, 0.0, 0.0))
    gpu.start(2, StepCost(0.0, 0.010, 0.0, 0.01))

    assert gpu.rates() == {1: 1.0, 2: 1.0}
    assert gpu.advance(0.01) == (2,)


@given(sharings, st.lists(costs, min_size=1, max_size=5))
def test_all_steps_end_and_none_earlier_than_alone(sharing: Sharing, steps: list[StepCost]) -> None:
    gpu = SharedGpu(sharing)
    for engine, cost in enumerate(steps):
        gpu.start(engine, cost)
    now_s = 0.0
    ended: dict[int, float] = {}
    while not gpu.is_idle:
        dt_s = max(gpu.next_change_s(), 1e-9)
        assert math.isfinite(dt_s)
        done = gpu.advance(dt_s)
        now_s += dt_s
        ended |= dict.fromkeys(done, now_s)

    assert sorted(ended) == list(range(len(steps)))
    for engine, cost in enumerate(steps):
        alone_rate = progress_rates(sharing, [demand_of(cost)])[0]
        assert ended[engine] >= cost.host_s + cost.device_s / alone_rate - 1e-9
    if sharing.mode == "time-sliced":
        assert now_s >= sum(cost.device_s for cost in steps) - 1e-9


@given(st.lists(costs, min_size=1, max_size=4), st.lists(st.floats(0.0001, 0.05), min_size=1, max_size=30))
def test_the_pieces_in_which_time_passes_do_not_matter(steps: list[StepCost], pieces: list[float]) -> None:
    whole, cut = SharedGpu(SLICED), SharedGpu(SLICED)
    for engine, cost in enumerate(steps):
        whole.start(engine, cost)
        cut.start(engine, cost)
    at_once = whole.advance(sum(pieces))
    in_pieces = [engine for piece in pieces for engine in cut.advance(piece)]

    assert set(at_once) ^ set(in_pieces) <= {engine for engine in range(len(steps)) if _is_close(whole, cut)}


def _is_close(one: SharedGpu, other: SharedGpu) -> bool:
    """Both are at the same point but for rounding."""
    left = [gpu.next_change_s() for gpu in (one, other)]
    return any(value < 1e-6 for value in left if math.isfinite(value))

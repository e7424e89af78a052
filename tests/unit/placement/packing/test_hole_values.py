"""What a hole in a GPU is worth: prices of the linear program of packing a mix of asks into GPUs."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.placement.packing.hole_values import STEPS, hole_values

demands = st.dictionaries(st.integers(1, STEPS), st.integers(1, 100), min_size=1, max_size=12)


def worth_at(demand: dict[int, int], *holes: int) -> list[float]:
    values = hole_values(demand)
    return [round(values[hole], 5) for hole in holes]


def test_half_a_gpu_is_worth_half_of_one_to_those_who_ask_for_halves() -> None:
    assert worth_at({500: 3, 1000: 1}, 0, 499, 500, 999, 1000) == [0, 0, 0.5, 0.5, 1]


def test_thirds_fill_a_gpu_although_their_thousandths_are_rounded_down() -> None:
    assert worth_at({333: 1}, 332, 333, 666, 1000) == [0, 0.33333, 0.66667, 1]


def test_a_rest_that_too_few_ask_for_is_worth_nothing() -> None:
    """Each 0.81 takes a whole GPU then, and who fits into the rests takes nothing."""
    assert worth_at({810: 100, 160: 10}, 190, 809, 810) == [0, 0, 1]


def test_the_same_rest_is_worth_what_it_saves_where_many_ask_for_it() -> None:
    """Six of 0.16 would take a GPU of their own."""
    assert worth_at({810: 10, 160: 100}, 190, 810) == [0.16667, 0.83333]


def test_a_pair_that_leaves_little_is_worth_as_much_as_one_that_leaves_nothing() -> None:
    """Nobody asks for the rest of two of 0.47, so that each takes half a GPU, and 0.53 holds one more."""
    assert worth_at({470: 10, 1000: 10}, 469, 530, 1000) == [0, 0.5, 1]


def test_without_demand_only_an_idle_gpu_is_worth_something() -> None:
    assert worth_at({}, 0, 999, 1000) == [0, 0, 1]
    assert worth_at({0: 5, STEPS + 1: 5}, 0, 999, 1000) == [0, 0, 1]


@given(demands)
def test_worth_grows_with_the_hole_and_an_idle_gpu_is_worth_one(demand: dict[int, int]) -> None:
    values = hole_values(demand)
    assert len(values) == STEPS + 1
    assert values[0] == 0
    assert values[STEPS] == pytest.approx(1)
    assert all(a <= b for a, b in itertools.pairwise(values))


@given(demands, st.integers(0, STEPS), st.integers(0, STEPS))
def test_a_hole_is_worth_at_least_what_its_parts_are(demand: dict[int, int], one: int, other: int) -> None:
    values = hole_values(demand)
    if one + other <= STEPS:
        assert values[one] + values[other] <= values[one + other] + 1e-6


@given(demands)
def test_by_these_prices_a_mix_takes_at_least_its_volume_and_at_most_what_a_packing_takes(
    demand: dict[int, int],
) -> None:
    """Duality from both sides: no packing into whole GPUs takes less, and prices below the volume would not be best."""
    values = hole_values(demand)
    price = sum(values[size] * count for size, count in demand.items())
    volume = sum(size * count for size, count in demand.items()) / STEPS
    assert volume <= price * (1 + 1e-6)
    assert price <= len(first_fit_decreasing(demand)) + 1e-6


def first_fit_decreasing(demand: dict[int, int]) -> list[int]:
    """What is left of each GPU."""
    left: list[int] = []
    for size in sorted(demand, reverse=True):
        for _ in range(demand[size]):
            fitting = next((i for i, free in enumerate(left) if free >= size), None)
            if fitting is None:
                left.append(STEPS - size)
            else:
                left[fitting] -= size
    return left

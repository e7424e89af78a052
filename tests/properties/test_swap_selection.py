"""Who gives way, for any candidates: enough, nobody for nothing, the cheapest, whatever the order they come in."""

import itertools
import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.swapper.policies.selection import Candidate, Choice, chosen

GPUS = ("gpu-0", "gpu-1")


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(0, 7))
    return [
        Candidate(
            key=f"c{index}",
            priority=draw(st.sampled_from([50, 125])),
            freed_bytes=draw(st.dictionaries(st.sampled_from(GPUS), st.integers(0, 9), min_size=1)),
            worth=(draw(st.integers(0, 5)) / 4,),
        )
        for index in range(count)
    ]


MISSING = st.dictionaries(st.sampled_from(GPUS), st.integers(1, 20), min_size=1)


def frees(chosen_ones: Sequence[Candidate], missing: dict[str, int]) -> bool:
    return all(sum(c.freed_bytes.get(uuid, 0) for c in chosen_ones) >= size for uuid, size in missing.items())


def of(choice: Choice, everyone: Sequence[Candidate]) -> list[Candidate]:
    return [next(c for c in everyone if c.key == key) for key in choice.keys]


@given(candidates(), MISSING, st.booleans())
def test_enough_is_freed_or_nobody_is_chosen_because_all_together_are_too_few(
    everyone: list[Candidate], missing: dict[str, int], adds: bool
) -> None:
    choice = chosen(everyone, missing_bytes=missing, adds=adds)

    if choice is None:
        assert not frees(everyone, missing)
    else:
        assert frees(of(choice, everyone), missing)


@given(candidates(), MISSING, st.booleans())
def test_no_victim_can_be_left_out(everyone: list[Candidate], missing: dict[str, int], adds: bool) -> None:
    choice = chosen(everyone, missing_bytes=missing, adds=adds)

    if choice is not None:
        victims = of(choice, everyone)
        for victim in victims:
            assert not frees([c for c in victims if c is not victim], missing)


@given(candidates(), MISSING, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_in_which_candidates_come_does_not_matter(
    everyone: list[Candidate], missing: dict[str, int], adds: bool, order: random.Random
) -> None:
    shuffled = list(everyone)
    order.shuffle(shuffled)

    assert chosen(everyone, missing_bytes=missing, adds=adds) == chosen(shuffled, missing_bytes=missing, adds=adds)


@given(candidates(), MISSING)
def test_no_set_that_frees_enough_is_cheaper(everyone: list[Candidate], missing: dict[str, int]) -> None:
    """Of the higher priority first, then of the lower."""

    def price(some: Sequence[Candidate]) -> tuple[float, float]:
        return (
            sum(c.worth[0] for c in some if c.priority == 125),
            sum(c.worth[0] for c in some if c.priority == 50),
        )

    choice = chosen(everyone, missing_bytes=missing, adds=True)

    if choice is not None:
        ours = price(of(choice, everyone))
        for count in range(len(everyone) + 1):
            for some in itertools.combinations(everyone, count):
                assert not frees(some, missing) or ours <= (price(some)[0] + 1e-9, price(some)[1] + 1e-9)


@given(candidates(), MISSING)
def test_in_order_nobody_gives_way_before_one_who_is_worth_less_and_would_do(
    everyone: list[Candidate], missing: dict[str, int]
) -> None:
    """The dearest victim is no dearer than the dearest of any other set that frees enough."""
    choice = chosen(everyone, missing_bytes=missing, adds=False)

    if choice is not None:
        dearest = max(((c.priority, c.worth, c.key) for c in of(choice, everyone)), default=None)
        for count in range(1, len(everyone) + 1):
            for some in itertools.combinations(everyone, count):
                if frees(some, missing) and dearest is not None:
                    assert dearest <= max((c.priority, c.worth, c.key) for c in some)

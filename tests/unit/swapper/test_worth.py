"""The live swapper asks its policy what each is worth, and no policy breaks the hard rules."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kit.outcomes import Outcome, Under
from schemas.swapper import WakeDecided
from schemas.units import GiB
from services.swapper.policies import POLICIES
from services.swapper.settings import SwapperSettings
from tests.unit.swapper.builders import Swapper, outline

NAMES = list(POLICIES)


def returned(swapper: Swapper, name: str, gib: int, *, restore_s: float) -> None:
    """It was parked, and came back in so long."""
    swapper.parked(name, gib)
    swapper.fact_only(replace(swapper.woken(name), restore_s=restore_s, verify_s=0.0))


def victims(outcomes: list[Outcome]) -> tuple[str, ...]:
    plain = [o.outcome if isinstance(o, Under) else o for o in outcomes]
    return next((fact.victim_ids for fact in plain if isinstance(fact, WakeDecided)), ())


def test_of_two_that_are_alike_the_one_that_came_back_sooner_gives_way() -> None:
    for quick, slow in (("b", "c"), ("c", "b")):
        swapper = Swapper()
        swapper.parked("a", 60)
        returned(swapper, quick, 30, restore_s=0.2)
        returned(swapper, slow, 30, restore_s=3.0)
        swapper.now_s += 10
        swapper.handle(swapper.load())
        swapper.parked("a", 30)

        assert (quick,) == victims(swapper.handle(swapper.wanted("a")))


def test_what_a_return_takes_is_measured_and_until_then_reckoned_from_bytes_and_link() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    replica = swapper.state.replicas["a"]

    assert round(0.25 + 10 * GiB / 50e9, 6) == round(swapper.state.restore_s(replica), 6)
    swapper.fact_only(replace(swapper.woken("a"), restore_s=0.7, verify_s=0.1))
    assert 0.8 == round(swapper.state.restore_s(replica), 6)


def test_one_that_was_asked_for_again_and_again_stays_and_the_other_gives_way() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    for name in "bc":
        swapper.resident(name, 30)
    for _ in range(20):
        swapper.now_s += 30
        swapper.handle(swapper.load("b"))
        swapper.now_s += 1
        swapper.handle(swapper.load())
    swapper.now_s += 30
    swapper.handle(swapper.load("c"))
    swapper.now_s += 1
    swapper.handle(swapper.load())
    swapper.now_s += 90
    swapper.handle(swapper.load())

    assert ["order wake a", "wake a <- c"] == outline(swapper.handle(swapper.wanted("a")))


def test_with_lru_the_one_used_last_stays_even_so() -> None:
    swapper = Swapper(SwapperSettings(policy="lru"))
    swapper.parked("a", 30)
    for name in "bc":
        swapper.resident(name, 30)
    for name in ("b", "b", "b", "c"):
        swapper.now_s += 30
        swapper.handle(swapper.load(name))
        swapper.now_s += 1
        swapper.handle(swapper.load())

    assert ["order wake a", "wake a <- b"] == outline(swapper.handle(swapper.wanted("a")))


def test_a_deployment_that_is_gone_is_forgotten() -> None:
    swapper = Swapper()
    swapper.resident("b", 30)
    swapper.handle(swapper.load("b"))

    swapper.fact_only(swapper.released("b"))

    policy = swapper.state.observed.policy
    known, never = (
        policy.worth(key, now_s=2000, since_s=1500, restore_s=1, size_bytes=GiB) for key in ("d-b", "d-never")
    )
    assert known == never
    assert set() == swapper.state.observed.working


@given(
    policy=st.sampled_from(NAMES),
    residents=st.lists(
        st.tuples(st.integers(5, 30), st.booleans(), st.booleans(), st.sampled_from([0.5, 500.0])),
        min_size=1,
        max_size=6,
    ),
    gib=st.integers(5, 60),
)
def test_no_policy_breaks_the_hard_rules_and_none_frees_more_than_is_needed(
    policy: str, residents: list[tuple[int, bool, bool, float]], gib: int
) -> None:
    """Not parkable, busy, or not long enough here: never a victim."""
    swapper = Swapper(SwapperSettings(policy=policy), gpu_count=1)  # type: ignore[arg-type]
    swapper.parked("wanted", gib)
    used_gib, busy, protected = 1, [], set()
    for index, (size, is_parkable, is_busy, minimum_s) in enumerate(residents):
        name = f"r{index}"
        if used_gib + size > 80:
            break
        used_gib += size
        swapper.resident(name, size, is_parkable=is_parkable, minimum_residency_s=minimum_s)
        busy += [name] if is_busy else []
        if not is_parkable or is_busy or minimum_s > 100:
            protected.add(name)
    swapper.now_s += 10
    swapper.handle(swapper.load(*busy))

    taken = victims(swapper.handle(swapper.wanted("wanted")))

    assert protected.isdisjoint(taken)
    freed = {name: swapper.state.replicas[name].freed_bytes["gpu-0"] for name in taken}
    missing = (used_gib + gib - 1 - 80) * GiB
    assert not taken or sum(freed.values()) >= missing
    for name in taken:
        assert sum(freed.values()) - freed[name] < missing

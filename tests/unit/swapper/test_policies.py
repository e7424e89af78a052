"""What each policy keeps, and what the default learns about traffic."""

import random

import pytest

from services.swapper.policies import DEFAULT_POLICY, POLICIES
from services.swapper.policies.port import Policy

GB = 10**9


def worth(policy: Policy, key: str, now_s: float, *, restore_s: float = 1.0, gigabytes: int = 10) -> tuple[float, ...]:
    return policy.worth(key, now_s=now_s, since_s=-1e9, restore_s=restore_s, size_bytes=gigabytes * GB)


def use(policy: Policy, key: str, at_s: float, *, runs_s: float = 0.1) -> None:
    policy.used(key, now_s=at_s, was_idle=True)
    policy.rested(key, now_s=at_s + runs_s)


def used_in_turn(name: str, *keys: str) -> Policy:
    """One use a minute."""
    policy = POLICIES[name]()
    for index, key in enumerate(keys):
        use(policy, key, 60.0 * index)
    return policy


def test_lru_keeps_who_was_used_last() -> None:
    policy = used_in_turn("lru", "a", "a", "a", "b")

    assert worth(policy, "a", 300) < worth(policy, "b", 300)


def test_lfu_keeps_who_was_used_most() -> None:
    policy = used_in_turn("lfu", "a", "a", "a", "b")

    assert worth(policy, "b", 300) < worth(policy, "a", 300)


def test_landlord_keeps_what_is_dear_to_bring_back_until_its_credit_is_used_up() -> None:
    policy = POLICIES["landlord"]()
    for key, restore_s in (("dear", 2.0), ("cheap", 1.0)):
        policy.restored(key, now_s=0, restore_s=restore_s, size_bytes=10 * GB)

    assert worth(policy, "cheap", 1) < worth(policy, "dear", 1)
    for _ in range(3):
        policy.parked("cheap", now_s=1)
        policy.restored("cheap", now_s=2, restore_s=1.0, size_bytes=10 * GB)
    assert worth(policy, "dear", 3) < worth(policy, "cheap", 3)


def test_cost_rate_keeps_what_comes_often_and_is_small() -> None:
    policy = POLICIES["cost-rate"]()
    for index in range(10):
        use(policy, "often", 60.0 * index)
    for index in range(3):
        use(policy, "rare", 300.0 * index)

    assert worth(policy, "rare", 601) < worth(policy, "often", 601)
    assert worth(policy, "often", 601, gigabytes=20) < worth(policy, "often", 601, gigabytes=10)


@pytest.mark.parametrize("name", list(POLICIES))
def test_one_that_is_not_known_has_a_worth_too_and_since_when_it_is_here_counts_as_a_use(name: str) -> None:
    policy = used_in_turn(name, "a", "b")

    def newcomer(since_s: float) -> tuple[float, ...]:
        return policy.worth("new", now_s=200, since_s=since_s, restore_s=1, size_bytes=GB)

    assert newcomer(10) <= newcomer(190)
    if name != "landlord":
        assert newcomer(10) < newcomer(190)


@pytest.mark.parametrize("name", list(POLICIES))
def test_one_that_is_forgotten_is_as_if_it_had_never_been(name: str) -> None:
    policy = used_in_turn(name, "a", "b", "b")
    policy.forgotten("b")

    assert worth(policy, "b", 500) == worth(policy, "never", 500)
    policy.used("b", now_s=600, was_idle=True)


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_same_calls_give_the_same_worth(name: str) -> None:
    rng = random.Random(3)
    keys = [rng.choice("abcdefgh") for _ in range(300)]

    first, second = used_in_turn(name, *keys), used_in_turn(name, *keys)

    assert [worth(first, key, 20_000) for key in "abcdefgh"] == [worth(second, key, 20_000) for key in "abcdefgh"]


def test_the_default_learns_from_independent_requests_that_how_often_tells_more_than_how_lately() -> None:
    """`rare` came a second ago, `often` five minutes ago; it comes ten times as often."""
    rng = random.Random(5)
    policy, now_s = POLICIES[DEFAULT_POLICY](), 0.0
    for _ in range(3000):
        now_s += rng.expovariate(1 / 20)
        use(policy, rng.choices(["often", "rare", "third"], weights=[10, 1, 5])[0], now_s)
    policy.used("often", now_s=now_s + 1, was_idle=True)
    policy.rested("often", now_s=now_s + 2)
    policy.used("rare", now_s=now_s + 300, was_idle=True)
    policy.rested("rare", now_s=now_s + 301)

    assert worth(policy, "rare", now_s + 302) < worth(policy, "often", now_s + 302)


def test_the_default_learns_from_bursts_that_how_lately_tells_more_than_how_often() -> None:
    """The same question, after traffic in which a model comes again and again, and then not for hours."""
    rng = random.Random(6)
    policy, now_s = POLICIES[DEFAULT_POLICY](), 0.0
    for _ in range(300):
        key = rng.choices(["often", "rare", "third"], weights=[10, 1, 5])[0]
        for _ in range(rng.randint(5, 15)):
            now_s += rng.expovariate(1 / 20)
            use(policy, key, now_s)
        now_s += 1000
    use(policy, "often", now_s + 1)
    use(policy, "rare", now_s + 1200)

    assert worth(policy, "often", now_s + 1202) < worth(policy, "rare", now_s + 1202)


def test_the_default_keeps_of_equals_what_takes_longer_to_bring_back() -> None:
    policy = used_in_turn(DEFAULT_POLICY, "a", "b")

    assert worth(policy, "a", 300, restore_s=2.0) > worth(policy, "a", 300, restore_s=1.0)

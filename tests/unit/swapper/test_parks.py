"""Warm windows, operators' parks, and orders that are repeated until a fact answers them."""

import pytest

from schemas.nodes import LeaseReleased
from schemas.orders import ParkOrdered
from schemas.placement import ParkAsked, WakeAsked
from schemas.swapper import DecisionClosed
from tests.unit.swapper.builders import NODE, Swapper, outline
from tests.unit.swapper.test_wakes import asked


def test_an_idle_model_stays_for_its_warm_window_and_parks_then() -> None:
    swapper = Swapper()
    swapper.resident("a", 30, warm_window_s=20)
    swapper.now_s += 19
    swapper.handle(swapper.load())

    assert [] == swapper.tick(after_s=0.9)
    assert ["park a", "order park a"] == outline(swapper.tick(after_s=0.1))


def test_the_warm_window_begins_anew_with_each_use() -> None:
    swapper = Swapper()
    swapper.resident("a", 30, warm_window_s=20)
    swapper.now_s += 15
    swapper.handle(swapper.load("a"))
    swapper.now_s += 19
    swapper.handle(swapper.load())

    assert [] == swapper.tick()
    assert ["park a", "order park a"] == outline(swapper.tick(after_s=1))


@pytest.mark.parametrize("is_heard", [True, False])
def test_a_warm_window_ends_only_when_gateways_say_that_it_is_idle(is_heard: bool) -> None:
    """No data means hold."""
    swapper = Swapper()
    swapper.resident("a", 30, warm_window_s=20)
    swapper.now_s += 1000
    if is_heard:
        swapper.handle(swapper.load())

    assert (["park a", "order park a"] if is_heard else []) == outline(swapper.tick())


def test_neither_training_nor_what_is_not_parkable_cools_down() -> None:
    swapper = Swapper()
    swapper.resident("t", 30, is_training=True, warm_window_s=1)
    swapper.resident("fixed", 30, is_parkable=False, warm_window_s=1)
    swapper.now_s += 1000
    swapper.handle(swapper.load())

    assert [] == swapper.tick()


def test_an_operator_parks_a_model_at_once_even_a_busy_one() -> None:
    swapper = Swapper()
    swapper.resident("a", 30)
    swapper.handle(swapper.load("a"))

    assert ["park a", "order park a"] == outline(swapper.handle(asked(ParkAsked, "a")))


def test_training_that_an_operator_parked_does_not_return_by_itself() -> None:
    swapper = Swapper()
    swapper.resident("t", 30, is_training=True)
    swapper.handle(asked(ParkAsked, "t"))
    swapper.handle(swapper.draining("t"))
    swapper.handle(swapper.has_parked("t"))

    assert [] == outline(swapper.tick(after_s=1000))
    assert ["order wake t", "wake t"] == outline(swapper.handle(asked(WakeAsked, "t")))


def test_an_operators_park_of_a_parked_model_does_not_undo_its_next_wake() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(asked(ParkAsked, "a"))
    swapper.handle(swapper.wanted("a"))
    swapper.handle(swapper.waking("a"))
    swapper.handle(swapper.waking("a", is_reserved=True))
    swapper.handle(swapper.woken("a"))

    assert [] == outline(swapper.tick())


def test_an_operators_park_of_a_model_that_is_waking_is_done_when_it_is_awake() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))
    swapper.handle(swapper.waking("a"))
    swapper.handle(asked(ParkAsked, "a"))
    swapper.handle(swapper.waking("a", is_reserved=True))
    swapper.handle(swapper.woken("a"))

    assert ["park a", "order park a"] == outline(swapper.tick())


def test_a_later_wish_of_the_operator_replaces_the_earlier_one() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(asked(ParkAsked, "a"))
    swapper.fact_only(asked(WakeAsked, "a"))

    replica = swapper.state.replicas["a"]
    assert (True, False) == (replica.is_asked_awake, replica.is_asked_parked)


def test_a_park_is_decided_once() -> None:
    swapper = Swapper()
    swapper.resident("a", 30)
    swapper.handle(asked(ParkAsked, "a"))

    assert [] == swapper.tick()


# --- Orders that nobody answers ---------------------------------------------------------------------------------------


def test_an_order_is_repeated_until_a_fact_answers_it() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))
    heard = [outline(swapper.tick(after_s=0.25)) for _ in range(8)]

    assert [[], [], [], ["order wake a"], [], [], [], ["order wake a"]] == heard
    swapper.handle(swapper.waking("a"))
    assert [[]] * 8 == [outline(swapper.tick(after_s=0.25)) for _ in range(8)]


def test_a_park_order_is_repeated_with_the_same_wake_epoch() -> None:
    swapper = Swapper()
    swapper.resident("a", 30)
    swapper.handle(asked(ParkAsked, "a"))

    (again,) = swapper.tick(after_s=1.0)

    assert isinstance(again, ParkOrdered)
    assert (1, "asked for by an operator") == (again.wake_epoch, again.reason)


@pytest.mark.parametrize(
    ("answer", "is_open"),
    [("waking", True), ("woken", False), ("refused", False), ("failed", False), ("ready", False), ("stayed", True)],
)
def test_a_wake_stays_open_until_its_end(answer: str, is_open: bool) -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))

    swapper.fact_only(getattr(swapper, answer)("a"))

    assert is_open == ("a" in swapper.state.decisions)


def test_an_order_without_an_answer_is_given_up_after_its_deadline() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))

    closed, *_ = swapper.tick(after_s=swapper.state.settings.order_deadline_s + 0.1)

    assert isinstance(closed, DecisionClosed)
    assert f"no answer from {NODE} in 60 s" == closed.reason


def test_an_order_that_the_node_is_carrying_out_is_not_given_up() -> None:
    swapper = Swapper()
    swapper.granted("a", 30)
    swapper.handle(swapper.wanted("a"))
    swapper.handle(swapper.starting("a"))

    assert [] == swapper.tick(after_s=10_000)


def test_a_released_replica_takes_its_decision_with_it() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))

    swapper.handle(LeaseReleased(node=NODE, at_s=1.0, replica_id="a", reason="retired"))

    assert ({}, {}) == (swapper.state.decisions, swapper.state.replicas)
    assert [] == swapper.tick(after_s=1.0)

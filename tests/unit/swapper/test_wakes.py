"""Who comes back and who gives way."""

import pytest
from msgspec.structs import replace

from kit.outcomes import Timer, Under
from schemas.orders import WakeOrdered
from schemas.placement import ParkAsked, WakeAsked
from schemas.swapper import WakeDecided
from services.swapper.core import SERVICE, Tick
from tests.unit.swapper.builders import NODE, WRITER_EPOCH, Swapper, outline


def asked(kind: type[ParkAsked] | type[WakeAsked], name: str) -> ParkAsked | WakeAsked:
    return kind(at_s=1.0, inbox_seq=1, command_id="c", tenant="default", deployment_id=f"d-{name}")


def test_a_wanted_model_with_room_is_ordered_at_once_and_the_order_leaves_before_its_fact() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)

    order, fact = swapper.handle(swapper.wanted("a", count=3))

    assert isinstance(order, WakeOrdered)
    assert isinstance(fact, WakeDecided)
    assert WakeOrdered.goes_ahead
    assert (NODE, WRITER_EPOCH, "a", 2, ()) == (
        order.node,
        order.writer_epoch,
        order.replica_id,
        order.wake_epoch,
        order.victim_ids,
    )
    assert ("3 waiting", 2) == (fact.reason, fact.wake_epoch)


def test_the_same_wish_again_changes_nothing_while_its_order_is_on_the_way() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))

    assert [] == swapper.handle(swapper.wanted("a"))


@pytest.mark.parametrize("name", ["a", "unknown"])
def test_a_wish_for_what_is_resident_or_unknown_needs_nothing(name: str) -> None:
    swapper = Swapper()
    swapper.resident("a", 30)
    wanted = swapper.wanted("a")

    assert [] == swapper.handle(type(wanted)(gateway="g", deployment_id="d-a", model=name, replica_id=name))


def test_a_wish_that_an_earlier_return_has_answered_counts_no_more() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.fact_only(swapper.woken("a"))
    late = swapper.wanted("a")
    swapper.fact_only(swapper.has_parked("a"))

    assert [] == outline(swapper.handle(late))


def test_an_idle_model_of_equal_priority_gives_way() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60)
    swapper.now_s += 1
    swapper.handle(swapper.load())

    assert ["order wake a", "wake a <- b"] == outline(swapper.handle(swapper.wanted("a")))


def test_a_busy_model_of_equal_priority_stays_until_the_wish_has_waited_long_enough() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60)
    swapper.now_s += 1
    swapper.handle(swapper.load("b"))
    long_s = swapper.state.settings.switch_after_s

    assert [] == swapper.handle(swapper.wanted("a", wait_s=long_s - 0.1))
    assert ["order wake a", "wake a <- b"] == outline(swapper.handle(swapper.wanted("a", wait_s=long_s)))


@pytest.mark.parametrize("silence", ["no gateway was heard", "the sample is old", "one of two is silent"])
def test_without_fresh_samples_a_model_counts_as_busy(silence: str) -> None:
    """A missing measurement is never zero."""
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60)
    match silence:
        case "the sample is old":
            swapper.handle(swapper.load())
            swapper.now_s += swapper.state.settings.load_fresh_s + 0.1
        case "one of two is silent":
            swapper.handle(swapper.load(gateway="silent"))
            swapper.now_s += swapper.state.settings.load_fresh_s + 0.1
            swapper.handle(swapper.load())
        case _:
            swapper.now_s += 1

    assert [] == swapper.handle(swapper.wanted("a"))


def test_a_gateway_that_is_gone_does_not_keep_models_busy() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60)
    swapper.handle(swapper.load("b", gateway="gone"))
    swapper.now_s += swapper.state.settings.gateway_gone_s + 0.1
    swapper.handle(swapper.load())

    assert ["order wake a", "wake a <- b"] == outline(swapper.handle(swapper.wanted("a")))


def test_training_of_a_lower_priority_gives_way_at_once_however_short_it_was_there() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("t", 60, is_training=True, minimum_residency_s=100)

    assert ["order wake a", "wake a <- t"] == outline(swapper.handle(swapper.wanted("a")))


def test_inference_stays_for_its_minimum_residency() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60, minimum_residency_s=5)
    swapper.handle(swapper.load())
    wanted = swapper.wanted("a", wait_s=60)

    swapper.now_s += 4.9
    swapper.handle(swapper.load())
    assert [] == swapper.handle(wanted)

    swapper.now_s += 0.2
    assert ["order wake a", "wake a <- b"] == outline(swapper.handle(wanted))


def test_what_is_not_parkable_never_gives_way() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60, is_parkable=False)
    swapper.now_s += 10
    swapper.handle(swapper.load())

    assert [] == swapper.handle(swapper.wanted("a", wait_s=60))


def test_a_busy_model_of_higher_priority_never_gives_way() -> None:
    swapper = Swapper()
    swapper.parked("a", 60, priority="low")
    swapper.resident("b", 60)
    swapper.now_s += 10
    swapper.handle(swapper.load("b"))

    assert [] == swapper.handle(swapper.wanted("a", wait_s=25))


def test_an_idle_model_of_higher_priority_gives_way_to_a_long_wait_only() -> None:
    """A GPU that nobody uses is no reason to let requests run out of time; it is guaranteed its return."""
    swapper = Swapper()
    swapper.parked("a", 60, priority="low")
    swapper.resident("b", 60)
    swapper.now_s += 10
    swapper.handle(swapper.load())

    assert [] == swapper.handle(swapper.wanted("a"))
    assert ["order wake a", "wake a <- b"] == outline(swapper.handle(swapper.wanted("a", wait_s=2)))


def test_training_of_a_higher_priority_does_not_give_way_to_a_lower_one() -> None:
    swapper = Swapper()
    swapper.parked("a", 60, priority="low")
    swapper.resident("t", 60, is_training=True, priority="high")
    swapper.now_s += 10
    swapper.handle(swapper.load())

    assert [] == swapper.handle(swapper.wanted("a", wait_s=25))


def test_the_fewest_victims_are_taken() -> None:
    """The least recently used ones come first; those that turn out not to be needed stay."""
    swapper = Swapper()
    swapper.parked("a", 50)
    swapper.resident("small", 10)
    swapper.now_s += 1
    swapper.resident("large", 60)
    swapper.now_s += 1
    swapper.handle(swapper.load())

    assert ["order wake a", "wake a <- large"] == outline(swapper.handle(swapper.wanted("a")))


def test_victims_are_chosen_by_priority_then_by_last_use_then_by_id() -> None:
    def ordered(last_used: str, *, low: str) -> list[str]:
        swapper = Swapper()
        swapper.parked("a", 20)
        for name in "bcd":
            swapper.resident(name, 25, priority="high" if name == low else None)
        swapper.now_s += 1
        swapper.handle(swapper.load(last_used))
        swapper.now_s += 1
        swapper.handle(swapper.load())
        return outline(swapper.handle(swapper.wanted("a")))[1:]

    assert ["wake a <- b"] == ordered("d", low="")
    assert ["wake a <- c"] == ordered("b", low="")
    assert ["wake a <- d"] == ordered("d", low="d")


def test_nobody_gives_way_when_all_together_would_free_too_little() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("fixed", 40, is_parkable=False)
    swapper.resident("b", 30)
    swapper.now_s += 1
    swapper.handle(swapper.load())

    assert [] == swapper.handle(swapper.wanted("a", wait_s=60))


def test_bytes_on_their_way_to_one_wake_are_not_promised_to_another() -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.parked("b", 60)
    swapper.resident("c", 60)
    swapper.now_s += 1
    swapper.handle(swapper.load())
    swapper.handle(swapper.wanted("a"))

    assert [] == swapper.handle(swapper.wanted("b"))
    swapper.handle(swapper.waking("a"))
    swapper.handle(swapper.draining("c"))
    assert [] == swapper.handle(swapper.wanted("b"))


def test_the_most_urgent_goes_first_and_nobody_less_urgent_takes_what_is_freed_for_it() -> None:
    swapper = Swapper()
    swapper.parked("urgent", 60)
    swapper.parked("small", 15, priority="high")
    swapper.resident("busy", 60)
    swapper.now_s += 1
    swapper.handle(swapper.load("busy"))
    swapper.handle(swapper.wanted("urgent"))

    assert [] == outline(swapper.handle(swapper.wanted("small")))


def test_a_first_start_of_inference_waits_for_idle_ones_and_that_of_training_for_free_room() -> None:
    def first_start(*, is_training: bool) -> list[str]:
        swapper = Swapper()
        swapper.resident("b", 60, priority="low", is_training=is_training)
        swapper.granted("new", 60, priority="low", is_training=is_training)
        swapper.now_s += 10
        swapper.handle(swapper.load())
        return outline(swapper.tick())

    assert ["order wake new", "wake new <- b"] == first_start(is_training=False)
    assert [] == first_start(is_training=True)


def test_nobody_gives_way_to_a_first_start_of_training_whatever_its_priority() -> None:
    swapper = Swapper()
    swapper.resident("b", 60, priority="low")
    swapper.granted("t", 60, is_training=True, priority="very-high")
    swapper.now_s += 10
    swapper.handle(swapper.load())

    assert [] == outline(swapper.tick())


def test_training_takes_its_gpu_back_when_the_room_was_free_for_a_while() -> None:
    swapper = Swapper()
    swapper.parked("t", 60, is_training=True)
    wait_s = swapper.state.settings.training_return_s

    assert [] == swapper.tick(after_s=wait_s / 2)
    assert ["order wake t", "wake t"] == outline(swapper.tick(after_s=wait_s / 2))


def test_a_refused_wake_is_decided_anew_after_a_pause() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))
    swapper.handle(swapper.refused("a"))

    assert [] == swapper.handle(swapper.wanted("a"))
    swapper.now_s += swapper.state.settings.refused_pause_s
    assert ["order wake a", "wake a"] == outline(swapper.handle(swapper.wanted("a")))


@pytest.mark.parametrize("fact", ["has_parked", "woken"])
def test_when_a_replica_has_moved_the_wishes_beside_it_are_looked_at_again(fact: str) -> None:
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60)
    swapper.handle(swapper.wanted("a"))
    if fact == "woken":
        swapper.fact_only(swapper.has_parked("b"))
        swapper.parked("c", 10)
        assert "order wake a" in outline(swapper.handle(swapper.woken("c")))
    else:
        assert ["order wake a", "wake a"] == outline(swapper.handle(swapper.has_parked("b")))


def test_an_operator_wakes_a_parked_model_and_it_gives_way_like_any_other() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)

    (order, fact) = swapper.handle(asked(WakeAsked, "a"))

    assert isinstance(order, WakeOrdered)
    assert isinstance(fact, WakeDecided)
    assert "asked for by an operator" == fact.reason


def test_an_order_for_a_held_request_continues_the_requests_trace() -> None:
    """Also when something else than the request triggers it."""
    swapper = Swapper()
    swapper.parked("a", 60)
    swapper.resident("b", 60)
    swapper.handle(swapper.wanted("a"), traceparent="00-1")

    outcomes = swapper.handle(swapper.has_parked("b"), traceparent="00-2")

    assert ["00-1", "00-1"] == [outcome.traceparent for outcome in outcomes if isinstance(outcome, Under)]


def test_a_new_instance_repeats_what_no_fact_has_answered_and_ticks() -> None:
    swapper = Swapper()
    swapper.parked("a", 30)
    swapper.handle(swapper.wanted("a"))

    outcomes = list(SERVICE.on_start(swapper.state, swapper.context()))

    assert ["order wake a", "timer"] == outline(outcomes)
    assert Timer(due_s=swapper.now_s + swapper.state.settings.tick_s, input=Tick()) == outcomes[1]


def test_a_failed_engine_is_not_asked_for_before_its_node_tries_it_again() -> None:
    """Else all its attempts are spent within a second or two, and it is given up for good."""
    swapper = Swapper()
    swapper.resident("a", 20)
    swapper.handle(replace(swapper.failed("a"), retry_s=4.0))

    assert [] == outline(swapper.tick(3.9)) + outline(swapper.handle(swapper.wanted("a")))
    swapper.now_s += 0.2
    assert ["order wake a", "wake a"] == outline(swapper.handle(swapper.wanted("a")))

"""What the gateway decides about single requests."""

from typing import Any

import pytest

from schemas.gateways import LoadSampled, ModelWanted
from schemas.messages import Fact
from services.gateway.actions import Bounce, Refuse
from tests.unit.gateway import fleet
from tests.unit.gateway.fleet import Story, parked_story, resident_story


def wanted_of(story: Story) -> list[ModelWanted]:
    found: list[Any] = story.signals(ModelWanted)
    return found


def samples_of(story: Story) -> list[tuple[int, int, int]]:
    """(in flight, waiting, arrived) of each sampled model."""
    found: list[Any] = story.signals(LoadSampled)
    return [(m.in_flight_count, m.waiting_count, m.arrived_count) for sample in found for m in sample.models]


# --- Routing ----------------------------------------------------------------------------------------------------------


def test_a_request_to_a_resident_model_goes_there_at_once() -> None:
    story = resident_story()

    request = story.arrive()

    assert [(request, "r")] == story.dispatched()
    assert [] == wanted_of(story)


def test_the_replica_with_the_fewest_requests_in_flight_serves_and_ties_go_by_id() -> None:
    story = resident_story()
    story.tell(fleet.proposed(replica="s"), fleet.ready(replica="s", endpoint="http://s"))
    story.open("r", "s")

    requests = [story.arrive() for _ in range(3)]
    story.note(story.core.finished(requests[1], now_s=story.now_s))
    story.arrive()

    assert ["r", "s", "r", "s"] == [replica for _, replica in story.dispatched()]


def test_nothing_is_routed_once_the_route_lease_has_ended() -> None:
    story = resident_story()
    story.open("r", term_s=1.0)

    story.pass_time(1.0)
    request = story.arrive()

    assert [] == story.dispatched()
    assert request in story.core.holds.of("d-m").waiting


def test_an_answer_of_the_holder_that_is_older_than_the_newest_is_ignored() -> None:
    story = resident_story()
    story.open(closed=("r",))

    story.note(story.core.lease("n", fleet.lease_of(1, "r"), sent_s=story.now_s, now_s=story.now_s))
    story.arrive()

    assert [] == story.dispatched()


def test_the_holders_endpoint_goes_before_that_of_an_older_fact() -> None:
    story = resident_story()
    lease = fleet.lease_of(9, "r")
    newer = type(lease)(version=9, open_ids=("r",), closed_ids=(), endpoints=("http://new",), term_s=9.0)
    story.note(story.core.lease("n", newer, sent_s=story.now_s, now_s=story.now_s))

    story.arrive()

    assert "http://new" == story.actions[0].endpoint  # type: ignore[attr-defined]


def test_a_draining_replica_gets_nothing_even_before_its_holder_says_so() -> None:
    story = resident_story()

    story.tell(fleet.draining())
    story.arrive()

    assert [] == story.dispatched()


def test_without_news_from_history_the_holder_alone_opens_a_drained_replica_again() -> None:
    """NATS went away right after the draining fact; the node agent parked and woke the model without it."""
    story = resident_story()
    story.tell(fleet.draining())
    story.open(closed=("r",))

    story.open("r")
    request = story.arrive()

    assert [(request, "r")] == story.dispatched()


@pytest.mark.parametrize(("model", "hint"), [("n", "Yours are: m."), ("mm", "Did you mean 'm'?")])
def test_an_unknown_model_is_refused_with_what_the_tenant_has(model: str, hint: str) -> None:
    story = resident_story()
    story.tell(fleet.admitted("secret", tenant="other"))

    story.arrive(model)

    refuse = story.actions[0]
    assert isinstance(refuse, Refuse)
    assert (404, "model_not_found") == (refuse.refusal.status, refuse.refusal.code)
    assert hint in refuse.refusal.message
    assert "secret" not in refuse.refusal.message


def test_another_tenants_model_does_not_exist() -> None:
    story = resident_story()

    request = story.arrive(tenant="other")

    assert {request: (404, "model_not_found")} == story.refused()


# --- Holding ----------------------------------------------------------------------------------------------------------


def test_a_held_request_asks_for_its_model_at_once_and_every_250_ms_with_the_same_epoch() -> None:
    story = parked_story()

    story.arrive()
    story.pass_time(1.0)

    assert [("r", 1)] * 5 == [(wanted.replica_id, wanted.wake_epoch) for wanted in wanted_of(story)]
    assert [0.0, 0.25, 0.5, 0.75, 1.0] == [wanted.oldest_wait_s for wanted in wanted_of(story)]
    assert [30.0, 29.75, 29.5, 29.25, 29.0] == [wanted.deadline_s for wanted in wanted_of(story)]


def test_a_hundred_held_requests_ask_once() -> None:
    story = parked_story()

    for _ in range(100):
        story.arrive()
    story.pass_time(0.25)

    assert [1, 100] == [wanted.waiting_count for wanted in wanted_of(story)]


def test_a_new_epoch_is_asked_for_at_once() -> None:
    story = parked_story()
    story.arrive()

    story.tell(fleet.parked(epoch=2))

    assert [1, 2] == [wanted.wake_epoch for wanted in wanted_of(story)]


def test_a_cold_model_is_asked_for_without_a_replica() -> None:
    story = Story()
    story.tell(fleet.admitted(), fleet.proposed())

    story.arrive()

    assert [""] == [wanted.replica_id for wanted in wanted_of(story)]


def two_parked() -> Story:
    """One model with a replica on each of two nodes, both parked."""
    story = parked_story()
    story.tell(fleet.joined(node="o", holder_url="http://other"), fleet.proposed(replica="s", node="o"))
    story.tell(fleet.granted(replica="s", node="o"), fleet.ready(replica="s", node="o", endpoint="http://s"))
    story.tell(fleet.parked(replica="s", node="o", epoch=4))
    story.open(node="o", closed=("s",))
    story.actions.clear()
    return story


def asked_for(story: Story) -> list[str]:
    return [signal.replica_id for signal in wanted_of(story)]


def test_of_several_parked_replicas_one_is_asked_for_and_serves_all_that_wait() -> None:
    story = two_parked()
    story.arrive()
    story.arrive()
    story.pass_time(0.3)
    assert {"r"} == set(asked_for(story))

    story.tell(fleet.resident(replica="r", epoch=1))
    story.open("r")
    for request, _ in story.dispatched():
        story.note(story.core.first_byte(request, now_s=story.now_s))

    assert {"r"} == {replica for _, replica in story.dispatched()}
    assert {"r"} == set(asked_for(story))


def test_while_one_replica_is_resident_nobody_waits_for_another() -> None:
    story = two_parked()
    story.tell(fleet.resident(replica="s", node="o", epoch=4, endpoint="http://s"))
    story.open("s", node="o")

    request = story.arrive()

    assert [(request, "s")] == story.dispatched()
    assert [] == asked_for(story)


@pytest.mark.parametrize(
    ("turned", "expected"),
    [
        (fleet.draining(replica="r"), "s"),
        (fleet.starting(replica="r"), "s"),
        (fleet.waking(replica="r"), "r"),
        (fleet.failed(replica="r"), "s"),
        (fleet.released("r"), "s"),
    ],
)
def test_the_replica_that_can_be_there_soonest_is_asked_for(turned: Fact, expected: str) -> None:
    story = two_parked()
    story.tell(turned)

    story.arrive()

    assert [expected] == asked_for(story)


def test_a_replica_on_a_node_whose_holder_is_silent_is_asked_for_last() -> None:
    """Facts say that it is resident, and its node may be gone: the parked one elsewhere can be had."""
    story = two_parked()
    story.tell(fleet.resident(replica="r", epoch=1))
    story.open("r", term_s=1.0)
    story.pass_time(1.0)

    story.arrive()
    assert ["s"] == asked_for(story)

    story.open("r")
    assert ["r"] == [replica for _, replica in story.dispatched()]


def test_every_wish_is_repeated_when_the_bus_is_back() -> None:
    story = parked_story()
    story.arrive()
    story.now_s += 0.01

    story.note(story.core.reconnected(now_s=story.now_s))

    assert 2 == len(wanted_of(story))


def test_held_requests_leave_in_order_of_arrival_with_a_ramp_that_doubles_with_each_first_token() -> None:
    story = parked_story(ramp_step_s=100.0)
    requests = [story.arrive() for _ in range(8)]

    story.tell(fleet.waking(), fleet.resident())
    story.open("r")
    counts = [len(story.dispatched())]
    for request in requests[:3]:
        story.note(story.core.first_byte(request, now_s=story.now_s))
        counts.append(len(story.dispatched()))

    assert [1, 3, 6, 8] == counts
    assert requests == [request for request, _ in story.dispatched()]


def test_one_slow_first_token_does_not_block_the_ramp() -> None:
    story = parked_story(ramp_step_s=0.25)
    for _ in range(4):
        story.arrive()
    story.open("r")

    story.pass_time(0.5)

    assert 4 == len(story.dispatched())


def test_a_request_that_arrives_during_the_ramp_queues_behind_the_held_ones() -> None:
    story = parked_story(ramp_step_s=100.0)
    first, second = story.arrive(), story.arrive()
    story.open("r")

    third = story.arrive()
    story.note(story.core.first_byte(first, now_s=story.now_s))

    assert [first, second, third] == [request for request, _ in story.dispatched()]


def test_the_deadline_is_the_smaller_of_the_clients_and_the_deployments() -> None:
    story = parked_story()
    impatient = story.arrive(patience_s=2.0)
    patient = story.arrive(patience_s=1000.0)

    story.pass_time(2.0)
    assert {impatient: (504, "deadline_exceeded")} == story.refused()

    story.pass_time(28.0)
    assert (504, "deadline_exceeded") == story.refused()[patient]
    assert {} == story.core.requests


def test_a_request_that_cannot_be_served_in_time_is_refused_at_once_and_its_model_is_asked_for() -> None:
    story = parked_story()
    story.tell(fleet.resident(wake_s=4.0), fleet.parked(epoch=2))

    story.arrive(patience_s=3.0)

    refuse = story.actions[0]
    assert isinstance(refuse, Refuse)
    assert (503, "model_loading", "4") == (refuse.refusal.status, refuse.refusal.code, refuse.refusal.retry_after)
    assert [2] == [wanted.wake_epoch for wanted in wanted_of(story)]


def test_the_time_a_wake_has_already_taken_counts() -> None:
    story = parked_story()
    story.tell(fleet.resident(wake_s=4.0), fleet.parked(epoch=2), fleet.waking(epoch=2, at_s=story.now_s))
    story.now_s += 2.0

    request = story.arrive(patience_s=3.0)

    assert request in story.core.holds.of("d-m").waiting


def test_a_full_hold_refuses_by_count_and_by_bytes() -> None:
    story = parked_story(hold_count_per_model_max=2, hold_bytes_max=10)
    story.arrive(size=4)
    too_many_bytes = story.arrive(size=7)
    story.arrive(size=4)
    too_many = story.arrive(size=1)

    assert {too_many_bytes: (429, "hold_full"), too_many: (429, "hold_full")} == story.refused()
    assert (2, 8) == (story.core.holds.count, story.core.holds.byte_count)


def test_a_client_that_leaves_the_hold_leaves_nothing_behind() -> None:
    story = parked_story()
    request = story.arrive()

    story.note(story.core.finished(request, now_s=story.now_s))
    story.tell(fleet.resident())
    story.open("r")

    assert [] == story.dispatched()
    assert (0, 0) == (story.core.holds.count, story.core.holds.byte_count)


def test_retiring_a_model_refuses_what_waits_for_it() -> None:
    story = parked_story()
    request = story.arrive()

    story.tell(fleet.retired())

    assert {request: (404, "model_not_found")} == story.refused()
    assert {} == story.core.holds.holds


def test_an_engine_that_will_not_be_tried_again_refuses_what_waits_and_what_comes() -> None:
    story = parked_story()
    waiting = story.arrive()

    story.tell(fleet.failed(is_final=True))
    later = story.arrive()

    assert {waiting: (503, "engine_failed"), later: (503, "engine_failed")} == story.refused()


def test_an_engine_that_is_tried_again_keeps_what_waits() -> None:
    story = parked_story()
    request = story.arrive()

    story.tell(fleet.failed(), fleet.starting(epoch=2), fleet.ready())
    story.open("r")

    assert [(request, "r")] == story.dispatched()


def test_a_stopping_gateway_refuses_what_waits_and_lets_the_rest_end() -> None:
    story = resident_story()
    running = story.arrive()
    story.tell(fleet.admitted("other"))
    waiting = story.arrive("other")

    story.note(story.core.stop(now_s=story.now_s))

    assert {waiting: (503, "gateway_stopping")} == story.refused()
    assert [running] == list(story.core.requests)


# --- Replicas that give a request back --------------------------------------------------------------------------------


def test_a_request_that_found_its_engine_asleep_waits_in_its_old_place() -> None:
    story = resident_story(shun_asleep_s=0.1)
    early, late = story.arrive(), story.arrive()
    story.open(closed=("r",))

    story.note(story.core.bounced(late, "r", Bounce.ASLEEP, now_s=story.now_s))
    story.note(story.core.bounced(early, "r", Bounce.ASLEEP, now_s=story.now_s))

    assert [early, late] == [request.request_id for request in story.core.holds.of("d-m").in_order()]
    assert 1 == len(wanted_of(story))


def test_a_replica_that_is_still_open_is_tried_again_after_a_pause() -> None:
    story = resident_story(shun_broken_s=0.5)
    request = story.arrive()

    story.note(story.core.bounced(request, "r", Bounce.UNREACHABLE, now_s=story.now_s))
    assert 1 == len(story.dispatched())
    story.pass_time(0.5)

    assert [(request, "r"), (request, "r")] == story.dispatched()


def test_a_broken_replica_hands_over_to_another_at_once() -> None:
    story = resident_story()
    story.tell(fleet.proposed(replica="s"), fleet.ready(replica="s", endpoint="http://s"))
    story.open("r", "s")
    request = story.arrive()

    story.note(story.core.bounced(request, "r", Bounce.CUT, now_s=story.now_s))

    assert [(request, "r"), (request, "s")] == story.dispatched()


def test_a_request_that_may_be_killing_its_engine_is_not_sent_for_ever() -> None:
    story = resident_story(cut_count_max=2, shun_broken_s=0.1)
    request = story.arrive()

    for _ in range(3):
        story.note(story.core.bounced(request, "r", Bounce.CUT, now_s=story.now_s))
        story.pass_time(0.1)

    assert {request: (502, "engine_cut")} == story.refused()
    assert {} == story.core.loads.by_replica


# --- Load -------------------------------------------------------------------------------------------------------------


def test_a_model_that_turns_busy_or_idle_is_told_at_once() -> None:
    story = resident_story()
    request = story.arrive()
    story.now_s += 1.0

    story.note(story.core.finished(request, now_s=story.now_s))
    story.note(story.core.finished(request, now_s=story.now_s))

    assert [(1, 0, 1), (0, 0, 0)] == samples_of(story)


def test_a_model_that_flickers_is_told_at_most_every_50_ms_and_no_arrival_is_lost() -> None:
    story = resident_story()

    for _ in range(10):
        request = story.arrive()
        story.now_s += 0.001
        story.note(story.core.finished(request, now_s=story.now_s))
    story.pass_time(0.1)

    assert [(1, 0, 1), (0, 0, 9)] == samples_of(story)


def test_a_sample_never_leaves_out_a_busy_model() -> None:
    """Readers take a model that is missing in a sample for an idle one, and may park it."""
    story = resident_story()
    story.tell(fleet.admitted("b"))
    story.arrive()
    story.now_s += 1.0
    story.actions.clear()

    story.arrive("b")

    found: list[Any] = story.signals(LoadSampled)
    assert [["d-b", "d-m"]] == [[model.deployment_id for model in sample.models] for sample in found]


def test_every_second_all_models_are_told_idle_ones_too() -> None:
    story = Story(sample_every_s=1.0)
    story.tell(fleet.admitted("a"), fleet.admitted("b"))

    story.pass_time(2.0)

    assert [(0, 0, 0)] * 4 == samples_of(story)


def test_a_gateway_without_models_says_that_it_is_alive() -> None:
    story = Story(sample_every_s=1.0)

    story.pass_time(1.0)

    assert 1 == len(story.signals(LoadSampled))

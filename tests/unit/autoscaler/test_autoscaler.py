"""To cold when nobody used a deployment for long and everybody says so; back at the first wish."""

import pytest

from kit.outcomes import Timer
from schemas.nodes import ReplicaParked
from schemas.placement import DeploymentRetired, WakeAsked
from services.autoscaler.core import Tick
from tests.unit.autoscaler.builders import Scaler


def asked(name: str) -> WakeAsked:
    return WakeAsked(at_s=1.0, inbox_seq=1, command_id="c", tenant="default", deployment_id=f"d-{name}")


def cold(name: str = "a") -> Scaler:
    scaler = Scaler()
    scaler.admit(name)
    scaler.now_s += 20
    scaler.handle(scaler.load())
    assert [scaler.decided(name, 0, "idle for 20 s")] == scaler.tick()
    return scaler


def test_it_looks_again_at_each_tick() -> None:
    scaler = Scaler()
    timer = Timer(due_s=scaler.now_s + scaler.state.settings.tick_s, input=Tick())

    assert [timer] == scaler.started
    assert [timer] == scaler.handle(Tick())


def test_an_idle_deployment_goes_cold_after_its_time_and_not_before() -> None:
    scaler = Scaler()
    scaler.admit("a", cold_after_s=20)
    scaler.now_s += 19
    scaler.handle(scaler.load())

    assert [] == scaler.tick(after_s=0.9)
    went_cold = scaler.tick(after_s=0.1)
    assert [scaler.decided("a", 0, "idle for 20 s")] == went_cold


def test_it_is_decided_once() -> None:
    assert [] == cold().tick(after_s=1)


@pytest.mark.parametrize("use", ["in flight", "wanted", "woken or parked"])
def test_each_use_begins_the_time_anew(use: str) -> None:
    scaler = Scaler()
    scaler.admit("a", cold_after_s=20)
    scaler.now_s += 15
    match use:
        case "in flight":
            scaler.handle(scaler.load("a"))
        case "wanted":
            scaler.handle(scaler.wanted("a"))
        case _:
            scaler.handle(parked("a", at_s=scaler.now_s))
    scaler.now_s += 19.9
    scaler.handle(scaler.load())

    assert [] == scaler.tick()
    went_cold = scaler.tick(after_s=0.1)
    assert [scaler.decided("a", 0, "idle for 20 s")] == went_cold


@pytest.mark.parametrize("silence", ["nobody was heard", "the sample is old", "one of two is silent"])
def test_without_fresh_samples_of_all_gateways_it_holds(silence: str) -> None:
    """A missing measurement is never zero."""
    scaler = Scaler()
    scaler.admit("a")
    scaler.now_s += 100
    if silence != "nobody was heard":
        scaler.handle(scaler.load(gateway="silent"))
        scaler.now_s += scaler.state.settings.load_fresh_s + 0.1
    if silence == "one of two is silent":
        scaler.handle(scaler.load())

    assert [] == scaler.tick()


def test_a_gateway_that_is_gone_holds_nothing_up() -> None:
    scaler = Scaler()
    scaler.admit("a")
    scaler.now_s += 100
    scaler.handle(scaler.load(gateway="gone"))
    scaler.now_s += scaler.state.settings.gateway_gone_s + 0.1
    scaler.handle(scaler.load())

    assert [scaler.decided("a", 0, "idle for 20 s")] == scaler.tick()


def test_after_a_restart_nothing_is_idle_for_longer_than_it_was_listened_to() -> None:
    scaler = Scaler()
    scaler.now_s = 500.0
    scaler.admit("a", cold_after_s=20)
    scaler.now_s = 1010.0
    scaler.handle(scaler.load())

    assert [] == scaler.tick()


@pytest.mark.parametrize(("cold_after_s", "is_training"), [(None, False), (20.0, True)])
def test_neither_training_nor_what_has_no_bound_goes_cold(cold_after_s: float | None, is_training: bool) -> None:
    scaler = Scaler()
    scaler.admit("a", cold_after_s=cold_after_s, is_training=is_training)
    scaler.now_s += 10_000
    scaler.handle(scaler.load())

    assert [] == scaler.tick()


def test_the_first_wish_brings_a_cold_deployment_back_and_the_next_ones_change_nothing() -> None:
    scaler = cold()

    assert [scaler.decided("a", 1, "3 waiting")] == scaler.handle(scaler.wanted("a", count=3))
    assert [] == scaler.handle(scaler.wanted("a"))


@pytest.mark.parametrize(("wished", "expected"), [(0, 1), (1, 1), (3, 3)])
def test_a_cold_deployment_comes_back_with_as_many_replicas_as_were_wished_for(wished: int, expected: int) -> None:
    """One that was admitted cold has one: somebody waits for it."""
    scaler = Scaler()
    scaler.admit("a", replica_count=wished)
    if wished:
        scaler.now_s += 20
        scaler.handle(scaler.load())
        assert [scaler.decided("a", 0, "idle for 20 s")] == scaler.tick()

    assert [scaler.decided("a", expected, "1 waiting")] == scaler.handle(scaler.wanted("a"))
    assert [] == scaler.handle(scaler.wanted("a"))


def test_an_operator_brings_a_cold_deployment_back() -> None:
    scaler = cold()

    assert [scaler.decided("a", 1, "asked for by an operator")] == scaler.handle(asked("a"))
    assert [] == scaler.handle(asked("a"))


@pytest.mark.parametrize("name", ["a", "unknown"])
def test_a_wish_for_what_is_not_cold_is_not_decided_here(name: str) -> None:
    scaler = Scaler()
    scaler.admit("a")

    assert [] == scaler.handle(scaler.wanted(name))
    assert [] == scaler.handle(asked(name))


def test_a_retired_deployment_is_forgotten() -> None:
    scaler = cold()
    scaler.handle(
        DeploymentRetired(at_s=1.0, inbox_seq=2, command_id="r", tenant="default", deployment_id="d-a", model="a")
    )

    assert [] == scaler.handle(scaler.wanted("a"))


def parked(name: str, *, at_s: float) -> ReplicaParked:
    return ReplicaParked(
        node="node-0",
        at_s=at_s,
        replica_id=f"{name}-1",
        deployment_id=f"d-{name}",
        model=name,
        wake_epoch=2,
        residue_bytes=0,
        host_bytes=0,
        copied_bytes=0,
        park_s=0.1,
        drain_s=0.1,
        reason="idle",
    )

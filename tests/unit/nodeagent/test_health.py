"""What watching GPUs leads to: foreign memory, faults, GPUs that go and come back, quarantines."""

from typing import TypeVar

import pytest

from kit.outcomes import Outcome, Timer
from schemas.nodes import (
    GpuFaulted,
    GpuFaultKind,
    GpuObserved,
    GpuQuarantined,
    GpuReinstated,
    LeaseGranted,
    LeaseRefused,
    LeaseReleased,
    NodeJoined,
    RefusalReason,
    ReplicaDraining,
    WakeRefused,
)
from schemas.placement import GpuCloseAsked, GpuReinstateAsked
from schemas.units import GiB
from services.nodeagent.gpu_inputs import (
    GpuBack,
    GpuFaultSeen,
    GpuGone,
    GpuMeasured,
    GpuTried,
    QuarantineOver,
    TryGpu,
)
from services.nodeagent.inputs import OveruseSeen, RestartDue, StopEngine
from tests.unit.nodeagent.builders import NODE, Agent, gpu, proposal, replica

T = TypeVar("T")
GPU = "gpu-0"


def looked(foreign_gib: float | None = 0.0, **values: object) -> GpuMeasured:
    foreign_bytes = None if foreign_gib is None else int(foreign_gib * GiB)
    return GpuMeasured(gpu_uuid=GPU, foreign_bytes=foreign_bytes, **values)  # type: ignore[arg-type]


def of_kind(outcomes: list[Outcome], kind: type[T]) -> list[T]:
    return [outcome for outcome in outcomes if isinstance(outcome, kind)]


def quarantined(agent: Agent, code: int = 95) -> GpuQuarantined:
    (fact,) = of_kind(agent.handle(GpuFaultSeen(gpu_uuid=GPU, code=code)), GpuQuarantined)
    return fact


# --- Foreign memory ---------------------------------------------------------------------------------------------------


def test_more_foreign_memory_counts_at_once() -> None:
    agent = Agent()

    (fact,) = agent.handle(looked(50))

    assert isinstance(fact, GpuObserved)
    assert 50 * GiB == fact.foreign_bytes
    assert 30 * GiB == agent.state.gpus[GPU].allocatable_bytes


def test_a_grant_is_checked_against_what_strangers_use_now() -> None:
    agent = Agent()
    agent.handle(looked(50))

    (refused,) = agent.handle(proposal(replica("a", 31)))

    assert isinstance(refused, LeaseRefused)
    assert (RefusalReason.NO_ROOM, 30 * GiB) == (refused.reason, refused.free_bytes)


def test_a_wake_is_checked_against_what_strangers_use_now() -> None:
    agent = Agent()
    agent.parked("a", 40)
    agent.handle(looked(60))

    (refused,) = agent.handle(agent.wake("a"))

    assert isinstance(refused, WakeRefused)
    assert 20 * GiB == refused.short_by_bytes


def test_leases_stay_when_strangers_take_more_than_is_left() -> None:
    """What is held and what is foreign are more than the GPU has: nothing new is granted, and nothing breaks."""
    agent = Agent()
    agent.resident("a", 60)

    agent.handle(looked(70))

    assert "resident" == agent.residency("a")
    assert of_kind(agent.handle(proposal(replica("b", 1))), LeaseRefused)


def test_a_small_change_of_foreign_memory_is_no_news() -> None:
    agent = Agent()
    agent.handle(looked(50))

    assert [] == agent.handle(looked(50.2))
    assert [] == agent.handle(looked(49.9))


def test_less_foreign_memory_counts_when_it_stays_so() -> None:
    agent = Agent()
    agent.handle(looked(50))

    told = [fact for _ in range(12) for fact in agent.handle(looked(10))]

    assert [10 * GiB] == [fact.foreign_bytes for fact in of_kind(told, GpuObserved)]


def test_a_stranger_that_comes_and_goes_stays_counted() -> None:
    agent = Agent()
    agent.handle(looked(50))

    told = [fact for _ in range(12) for gib in (0, 50) for fact in agent.handle(looked(gib))]

    assert [] == told


def test_a_missing_measurement_is_never_zero_and_is_told_once() -> None:
    agent = Agent()
    agent.handle(looked(50))

    told = [fact for _ in range(30) for fact in agent.handle(looked(None))]

    assert [GpuFaultKind.UNANSWERED] == [fact.kind for fact in of_kind(told, GpuFaulted)]
    assert 50 * GiB == agent.state.gpus[GPU].foreign_bytes


# --- Faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [13, 31, 43, 45, 63, 94, 9999])
def test_what_is_not_the_hardwares_fault_is_told_and_closes_nothing(code: int) -> None:
    agent = Agent()

    (fault,) = agent.handle(GpuFaultSeen(gpu_uuid=GPU, code=code, replica_id="a"))

    assert isinstance(fault, GpuFaulted)
    assert (GpuFaultKind.XID, code, "a") == (fault.kind, fault.code, fault.replica_id)
    assert of_kind(agent.handle(proposal(replica("b", 1))), LeaseGranted)


@pytest.mark.parametrize("code", [48, 64, 79, 95, 119])
def test_a_hardware_fault_closes_the_gpu_to_new_leases(code: int) -> None:
    agent = Agent()
    agent.resident("a", 10)

    fact = quarantined(agent, code)
    (refused,) = agent.handle(proposal(replica("b", 1)))

    assert (1, 60.0) == (fact.fault_count, fact.quarantine_s)
    assert isinstance(refused, LeaseRefused)
    assert RefusalReason.QUARANTINED == refused.reason
    assert "resident" == agent.residency("a")


def test_a_storm_of_one_error_is_told_once_in_a_while() -> None:
    agent = Agent()

    told = [fact for _ in range(20) for fact in agent.handle(GpuFaultSeen(gpu_uuid=GPU, code=31))]

    assert 1 == len(told)


def test_heat_is_told_once_for_as_long_as_it_lasts() -> None:
    agent = Agent()
    heat = [True, True, None, True, False, True]

    told = [fact for is_hot in heat for fact in agent.handle(looked(is_too_hot=is_hot, temperature_c=90))]

    assert [GpuFaultKind.THERMAL] * 2 == [fact.kind for fact in of_kind(told, GpuFaulted)]
    assert not of_kind(told, GpuQuarantined)


def test_memory_errors_from_before_are_not_news_and_new_ones_close_the_gpu() -> None:
    agent = Agent()
    assert [] == agent.handle(looked(ecc_error_count=7))
    assert [] == agent.handle(looked(ecc_error_count=None))

    told = agent.handle(looked(ecc_error_count=9))

    assert [GpuFaultKind.ECC] == [fact.kind for fact in of_kind(told, GpuFaulted)]
    assert 1 == len(of_kind(told, GpuQuarantined))


def test_overuse_is_the_workloads_fault() -> None:
    agent = Agent()
    agent.resident("a", 10)
    seen = OveruseSeen(gpu_uuid=GPU, replica_id="a", used_bytes=12 * GiB, granted_bytes=10 * GiB, is_stopped=False)

    (fault,) = agent.handle(seen)

    assert isinstance(fault, GpuFaulted)
    assert (GpuFaultKind.OVERUSE, "a") == (fault.kind, fault.replica_id)


def test_a_driver_that_is_silent_for_a_moment_holds_and_for_long_closes_the_gpu() -> None:
    agent = Agent()
    agent.handle(looked(50))
    silence = looked(None, problem="nvmlDeviceGetMemoryInfo: Timeout")

    moment = [fact for _ in range(25) for fact in agent.handle(silence)]
    long = [fact for _ in range(25) for fact in agent.handle(silence)]

    assert [] == moment
    assert [GpuFaultKind.UNANSWERED] == [fact.kind for fact in of_kind(long, GpuFaulted)]
    assert 1 == len(of_kind(long, GpuQuarantined))
    assert 50 * GiB == agent.state.gpus[GPU].foreign_bytes


# --- Lost and back ----------------------------------------------------------------------------------------------------


def test_what_is_on_a_lost_gpu_is_given_up_at_once() -> None:
    agent = Agent(gpu(0), gpu(1))
    agent.resident("a", 10)
    agent.granted("b", 75)
    agent.resident("c", 10, gpu_uuid="gpu-1")

    told = agent.handle(GpuGone(gpu_uuid=GPU))

    (joined,) = of_kind(told, NodeJoined)
    assert ["gpu-1"] == [offer.gpu_uuid for offer in joined.gpus]
    assert [GpuFaultKind.LOST] == [fact.kind for fact in of_kind(told, GpuFaulted)]
    assert ["a"] == [fact.replica_id for fact in of_kind(told, ReplicaDraining)]
    assert ["a"] == [stop.replica.replica_id for stop in of_kind(told, StopEngine)]
    assert ["b"] == [fact.replica_id for fact in of_kind(told, LeaseReleased)]
    assert "resident" == agent.residency("c")


def test_a_gpu_is_lost_once() -> None:
    agent = Agent(gpu(0), gpu(1))
    agent.handle(GpuGone(gpu_uuid=GPU))

    assert [] == agent.handle(GpuGone(gpu_uuid=GPU))


def test_a_gpu_that_comes_back_is_offered_and_tried_before_it_takes_anything() -> None:
    agent = Agent(gpu(0), gpu(1))
    agent.handle(GpuGone(gpu_uuid=GPU))
    agent.now_s += 100

    told = agent.handle(GpuBack(gpu=gpu(0)))

    (joined,) = of_kind(told, NodeJoined)
    assert [GPU, "gpu-1"] == [offer.gpu_uuid for offer in joined.gpus]
    assert "it was lost" == joined.gpus[0].quarantine_reason
    assert [TryGpu(gpu_uuid=GPU, fault_count=1)] == of_kind(told, TryGpu)
    assert of_kind(agent.handle(proposal(replica("a", 1))), LeaseRefused)
    agent.handle(GpuTried(gpu_uuid=GPU, fault_count=1))
    assert of_kind(agent.handle(proposal(replica("b", 1))), LeaseGranted)


def test_a_gpu_that_comes_back_soon_waits_for_the_end_of_its_quarantine() -> None:
    agent = Agent(gpu(0), gpu(1))
    agent.handle(GpuGone(gpu_uuid=GPU))

    back = agent.handle(GpuBack(gpu=gpu(0)))
    agent.now_s += 60
    over = agent.handle(QuarantineOver(gpu_uuid=GPU, fault_count=1))

    assert not of_kind(back, TryGpu)
    assert [TryGpu(gpu_uuid=GPU, fault_count=1)] == over


# --- Quarantine -------------------------------------------------------------------------------------------------------


def test_a_quarantine_ends_with_a_trial() -> None:
    agent = Agent()
    fact = quarantined(agent)
    agent.now_s += fact.quarantine_s

    (trial,) = agent.handle(QuarantineOver(gpu_uuid=GPU, fault_count=1))
    (back,) = agent.handle(GpuTried(gpu_uuid=GPU, fault_count=1))

    assert TryGpu(gpu_uuid=GPU, fault_count=1) == trial
    assert isinstance(back, GpuReinstated)
    assert back.away_s > fact.quarantine_s
    assert of_kind(agent.handle(proposal(replica("b", 1))), LeaseGranted)


def test_each_quarantine_lasts_longer_and_the_last_one_until_an_operator_says_so() -> None:
    agent = Agent()
    lasted = [quarantined(agent).quarantine_s]
    while lasted[-1]:
        tried = GpuTried(gpu_uuid=GPU, fault_count=len(lasted), problem="it answers with zeros")
        (fact,) = of_kind(agent.handle(tried), GpuQuarantined)
        lasted.append(fact.quarantine_s)

    assert [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 0.0] == lasted
    assert [] == agent.handle(QuarantineOver(gpu_uuid=GPU, fault_count=len(lasted)))
    asked = GpuReinstateAsked(at_s=0.0, inbox_seq=1, command_id="c", tenant="default", node=NODE, gpu_uuid=GPU)
    (back,) = agent.handle(asked)
    assert isinstance(back, GpuReinstated)


def closing(reason: str = "a new fan") -> GpuCloseAsked:
    return GpuCloseAsked(
        at_s=0.0, inbox_seq=1, command_id="c", tenant="default", node=NODE, gpu_uuid=GPU, reason=reason
    )


def test_what_an_operator_closed_only_an_operator_opens() -> None:
    agent = Agent()

    (fact,) = of_kind(agent.handle(closing()), GpuQuarantined)
    again = agent.handle(closing())
    fault = agent.handle(GpuFaultSeen(gpu_uuid=GPU, code=95))

    assert ("an operator closed it: a new fan", 0, 0.0) == (fact.reason, fact.fault_count, fact.quarantine_s)
    assert [] == again
    assert not of_kind(fault, GpuQuarantined)
    assert of_kind(agent.handle(proposal(replica("b", 1))), LeaseRefused)


def test_a_trial_that_was_under_way_does_not_open_what_an_operator_closed_meanwhile() -> None:
    agent = Agent()
    first = quarantined(agent)
    agent.now_s += first.quarantine_s
    agent.handle(QuarantineOver(gpu_uuid=GPU, fault_count=1))

    (fact,) = of_kind(agent.handle(closing()), GpuQuarantined)
    tried = agent.handle(GpuTried(gpu_uuid=GPU, fault_count=1))

    assert (1, 0.0) == (fact.fault_count, fact.quarantine_s), "a wish is no fault: the next real one lasts no longer"
    assert [] == tried


def test_a_gpu_that_was_well_for_a_day_begins_anew() -> None:
    agent = Agent()
    quarantined(agent)
    agent.handle(GpuTried(gpu_uuid=GPU, fault_count=1))
    agent.now_s += 100
    again = quarantined(agent)
    agent.handle(GpuTried(gpu_uuid=GPU, fault_count=2))
    agent.now_s += 2 * 86_400

    assert 2 == again.fault_count
    assert 1 == quarantined(agent).fault_count


def test_a_trial_without_room_says_nothing_and_is_repeated() -> None:
    agent = Agent()
    quarantined(agent)

    (timer,) = agent.handle(GpuTried(gpu_uuid=GPU, fault_count=1, problem="out of memory", is_conclusive=False))

    assert isinstance(timer, Timer)
    assert QuarantineOver(gpu_uuid=GPU, fault_count=1) == timer.input


def test_the_end_of_an_older_quarantine_tries_nothing() -> None:
    agent = Agent()
    quarantined(agent)
    agent.handle(GpuTried(gpu_uuid=GPU, fault_count=1, problem="it hangs"))
    agent.now_s += 60

    assert [] == agent.handle(QuarantineOver(gpu_uuid=GPU, fault_count=1))


def test_leases_without_a_process_end_with_the_quarantine_and_those_that_run_stay() -> None:
    agent = Agent()
    agent.parked("a", 40)
    agent.granted("b", 70)
    agent.granted("c", 60)
    assert ["parked", "starting", "granted"] == [agent.residency(name) for name in "abc"]

    told = agent.handle(GpuFaultSeen(gpu_uuid=GPU, code=95))

    assert ["c"] == [fact.replica_id for fact in of_kind(told, LeaseReleased)]
    assert ["parked", "starting"] == [agent.residency(name) for name in "ab"]


def test_a_parked_replica_wakes_on_a_quarantined_gpu_for_its_requests_have_nowhere_else_to_go() -> None:
    agent = Agent()
    agent.parked("a", 40)
    quarantined(agent)

    agent.handle(agent.wake("a"))

    assert "waking" == agent.residency("a")


def test_what_fails_on_a_quarantined_gpu_is_released_instead_of_started_again() -> None:
    agent = Agent()
    agent.resident("a", 40)
    quarantined(agent)
    agent.handle(agent.lost("a"))
    due = RestartDue(replica_id="a", lease_epoch=agent.lease("a").lease_epoch)

    assert of_kind(agent.handle(agent.wake("a")), WakeRefused)
    assert of_kind(agent.handle(due), LeaseReleased)


def test_starts_of_different_deployments_that_fail_are_the_gpus_fault() -> None:
    agent = Agent()
    for name in "abc":
        agent.granted(name, 10)

    told = [fact for name in "abc" for fact in agent.handle(agent.lost(name))]

    assert ["starts of 3 different deployments failed on it, and none succeeded since"] == [
        fact.reason for fact in of_kind(told, GpuQuarantined)
    ]


def test_one_deployment_that_does_not_start_is_its_own_fault() -> None:
    agent = Agent()
    agent.granted("a", 10)
    told: list[Outcome] = []
    for _ in range(4):
        told += agent.handle(agent.lost("a"))
        agent.handle(RestartDue(replica_id="a", lease_epoch=agent.lease("a").lease_epoch))

    assert not of_kind(told, GpuQuarantined)


def test_a_start_that_succeeds_clears_the_gpu_of_suspicion() -> None:
    agent = Agent()
    for name in "abcd":
        agent.granted(name, 10)
    agent.handle(agent.lost("a"))
    agent.handle(agent.lost("b"))
    agent.handle(agent.started("d"))

    assert not of_kind(agent.handle(agent.lost("c")), GpuQuarantined)


# --- A restart of the agent -------------------------------------------------------------------------------------------


def test_a_restarted_agent_offers_what_misbehaved_as_quarantined_and_ends_it_in_time() -> None:
    agent = Agent()
    fact = quarantined(agent)

    started = agent.service.on_start(agent.state, agent.context())
    (joined,) = of_kind(agent.handle(agent.probed()), NodeJoined)

    over = [timer for timer in of_kind(list(started), Timer) if isinstance(timer.input, QuarantineOver)]
    assert [fact.at_s + 60] == [timer.due_s for timer in over]
    assert fact.reason == joined.gpus[0].quarantine_reason
    assert of_kind(agent.handle(proposal(replica("b", 1))), LeaseRefused)

"""Replicas that span several GPUs of the node: granted, woken, parked and released on all of them at once."""

from typing import Any

import pytest

from kit.outcomes import Outcome
from schemas.nodes import LeaseGranted, LeaseRefused, RefusalReason, ReplicaParked, WakeRefused
from schemas.units import GiB
from services.nodeagent.inputs import EngineParked
from tests.unit.nodeagent.builders import Agent, gpu, outline, proposal, release, replica
from tests.unit.nodeagent.test_leases import without

BOTH = ("gpu-0", "gpu-1")


def agent_of_two(**values: Any) -> Agent:
    return Agent(gpu(0), gpu(1), **values)


def held_gib(agent: Agent) -> tuple[float, ...]:
    return tuple(agent.state.held_bytes(uuid) / GiB for uuid in BOTH)


def refusal(outcomes: list[Outcome]) -> LeaseRefused:
    (refused,) = outcomes
    assert isinstance(refused, LeaseRefused)
    return refused


# --- Grants -----------------------------------------------------------------------------------------------------------


def test_one_lease_is_granted_for_each_share_and_all_are_held_from_the_start_on() -> None:
    agent = agent_of_two()

    granted, *begun = agent.handle(proposal(replica("a", 30, gpu_uuids=BOTH)))

    assert isinstance(granted, LeaseGranted)
    leases = [(lease.replica_id, lease.shard_index, lease.gpu_uuid, lease.granted_bytes) for lease in granted.leases]
    assert [("a", 0, "gpu-0", 30 * GiB), ("a", 1, "gpu-1", 30 * GiB)] == leases
    assert ["ReplicaStarting a", "StartEngine a"] == outline(begun)
    assert (30, 30) == held_gib(agent)


def test_a_share_that_lacks_room_on_one_of_its_gpus_is_refused_on_all() -> None:
    agent = agent_of_two()
    agent.resident("fixed", 60, gpu_uuid="gpu-1", is_parkable=False)

    refused = refusal(agent.handle(proposal(replica("a", 30, gpu_uuids=BOTH))))

    assert (RefusalReason.NO_ROOM, f"short by {10 * GiB} bytes") == (refused.reason, refused.message)
    assert 20 * GiB == refused.free_bytes
    assert (0, 60) == held_gib(agent)


def test_a_share_on_a_gpu_that_is_not_here_refuses_the_whole_replica() -> None:
    refused = refusal(agent_of_two().handle(proposal(replica("a", 30, gpu_uuids=("gpu-0", "gpu-7")))))

    assert RefusalReason.UNKNOWN_GPU == refused.reason


def test_two_shards_on_one_gpu_are_refused() -> None:
    refused = refusal(agent_of_two().handle(proposal(replica("a", 30, gpu_uuids=("gpu-0", "gpu-0")))))

    assert "two of its shards are proposed for one GPU" == refused.message


def test_every_shard_counts_among_what_must_live_together() -> None:
    """Fixed on both, 50 of 80: whoever comes to either GPU finds 30 there."""
    agent = agent_of_two()
    agent.resident("wide", 50, gpu_uuids=BOTH, is_parkable=False)

    for uuid in BOTH:
        assert RefusalReason.NO_ROOM == refusal(agent.handle(proposal(replica("b", 31, gpu_uuid=uuid)))).reason


def test_weights_take_host_memory_once_however_many_gpus_a_replica_spans() -> None:
    agent = agent_of_two(host_gib=25)
    agent.resident("wide", 20, gpu_uuids=BOTH, weights_gib=20)

    assert ["LeaseGranted b"] == outline(agent.handle(proposal(replica("b", 20, weights_gib=5))))[:1]


# --- Parks and wakes --------------------------------------------------------------------------------------------------


def test_a_park_keeps_on_each_gpu_what_was_measured_there() -> None:
    agent = agent_of_two()
    agent.resident("wide", 30, gpu_uuids=BOTH)
    agent.handle(agent.park("wide"))
    assert (30, 30) == held_gib(agent)

    parked = agent.has_parked("wide")
    (fact,) = agent.handle(
        EngineParked(
            replica_id="wide",
            lease_epoch=parked.lease_epoch,
            residues=(GiB, 2 * GiB),
            host_bytes=10 * GiB,
            copied_bytes=0,
            park_s=0.1,
            drain_s=0.2,
            reason="idle",
        )
    )

    assert isinstance(fact, ReplicaParked)
    assert (3 * GiB, (GiB, 2 * GiB)) == (fact.residue_bytes, fact.shard_residue_bytes)
    assert (1, 2) == held_gib(agent)


def test_a_wake_waits_until_the_bytes_of_its_victims_on_every_gpu_are_proven_free() -> None:
    agent = agent_of_two()
    agent.parked("wide", 60, gpu_uuids=BOTH)
    agent.resident("left", 70, gpu_uuid="gpu-0")
    agent.resident("right", 70, gpu_uuid="gpu-1")

    ordered = agent.handle(agent.wake("wide", "left", "right"))
    first = agent.handle(agent.has_parked("left"))
    second = agent.handle(agent.has_parked("right"))

    assert "ReplicaWaking wide" == outline(ordered)[0]
    assert ["ParkEngine left", "ParkEngine right"] == [line for line in outline(ordered) if line.startswith("Park")]
    assert ["ReplicaParked left"] == outline(first)
    assert ["ReplicaParked right", "ReplicaWaking wide", "WakeEngine wide"] == outline(second)
    assert (61, 61) == held_gib(agent)


def test_a_wake_whose_victims_free_too_little_on_one_gpu_is_refused_with_what_is_missing_there() -> None:
    agent = agent_of_two()
    agent.parked("wide", 60, gpu_uuids=BOTH)
    agent.resident("left", 70, gpu_uuid="gpu-0")
    agent.resident("right", 70, gpu_uuid="gpu-1")

    (refused,) = agent.handle(agent.wake("wide", "left"))

    assert isinstance(refused, WakeRefused)
    assert 50 * GiB == refused.short_by_bytes


def test_a_victim_that_spans_both_gpus_gives_on_both() -> None:
    agent = agent_of_two()
    agent.parked("one", 60, gpu_uuid="gpu-1")
    agent.resident("wide", 70, gpu_uuids=BOTH)

    ordered = agent.handle(agent.wake("one", "wide"))
    freed = agent.handle(agent.has_parked("wide"))

    assert ["ReplicaWaking one", "ReplicaDraining wide", "ParkEngine wide"] == outline(ordered)
    assert ["ReplicaParked wide", "ReplicaWaking one", "WakeEngine one"] == outline(freed)
    assert (1, 61) == held_gib(agent)


def test_a_younger_wake_does_not_overtake_an_older_one_that_waits_on_another_gpu_too() -> None:
    """`wide` waits for the right GPU only; the bytes on the left that it needs are not given to `late` meanwhile."""
    agent = agent_of_two()
    agent.parked("wide", 60, gpu_uuids=BOTH)
    agent.parked("late", 40, gpu_uuid="gpu-0")
    agent.resident("left", 70, gpu_uuid="gpu-0")
    agent.resident("right", 70, gpu_uuid="gpu-1")
    agent.handle(agent.wake("wide", "left", "right"))

    assert ["WakeRefused late"] == outline(agent.handle(agent.wake("late", "left")))
    assert ["ReplicaParked left"] == outline(agent.handle(agent.has_parked("left")))
    assert ["WakeRefused late"] == outline(agent.handle(agent.wake("late")))
    assert "WakeEngine wide" in outline(agent.handle(agent.has_parked("right")))


def test_bytes_that_an_older_wake_waits_to_use_are_not_given_to_a_younger_one_whose_own_victims_are_late() -> None:
    """`wide` has all that it needs on the left and waits for the right; then `late` finds its own victim busy."""
    agent = agent_of_two()
    agent.parked("wide", 60, gpu_uuids=BOTH)
    agent.parked("late", 15, gpu_uuid="gpu-0")
    agent.resident("left", 60, gpu_uuid="gpu-0")
    agent.resident("slow", 17, gpu_uuid="gpu-0")
    agent.resident("right", 70, gpu_uuid="gpu-1")
    agent.handle(agent.wake("wide", "left", "right"))
    agent.handle(agent.wake("late", "slow"))

    assert ["ReplicaParked left"] == outline(agent.handle(agent.has_parked("left")))
    assert ["ParkAbandoned slow", "WakeRefused late"] == outline(agent.handle(agent.stayed("slow")))
    assert "WakeEngine wide" in outline(agent.handle(agent.has_parked("right")))


def test_bytes_beyond_what_an_older_wake_needs_there_begin_a_younger_one() -> None:
    agent = agent_of_two()
    agent.parked("wide", 30, gpu_uuids=BOTH)
    agent.parked("late", 40, gpu_uuid="gpu-0")
    agent.resident("left", 70, gpu_uuid="gpu-0")
    agent.resident("right", 70, gpu_uuid="gpu-1")
    agent.handle(agent.wake("wide", "left", "right"))
    agent.handle(agent.wake("late", "left"))

    assert ["ReplicaParked left", "ReplicaWaking late", "WakeEngine late"] == outline(
        agent.handle(agent.has_parked("left"))
    )


def test_a_victim_that_stays_refuses_the_wake_and_frees_its_claim_on_every_gpu() -> None:
    agent = agent_of_two()
    agent.parked("wide", 60, gpu_uuids=BOTH)
    agent.parked("late", 60, gpu_uuid="gpu-0")
    agent.resident("right", 70, gpu_uuid="gpu-1")
    agent.handle(agent.wake("wide", "right"))
    assert ["WakeRefused late"] == outline(agent.handle(agent.wake("late")))

    assert ["ParkAbandoned right", "WakeRefused wide"] == outline(agent.handle(agent.stayed("right")))
    assert "WakeEngine late" in outline(agent.handle(agent.wake("late")))


# --- Ends -------------------------------------------------------------------------------------------------------------


def test_a_release_frees_every_gpu_when_the_stop_is_proven() -> None:
    agent = agent_of_two()
    agent.resident("wide", 30, gpu_uuids=BOTH)
    agent.handle(release("wide"))
    assert (30, 30) == held_gib(agent)

    assert ["LeaseReleased wide"] == outline(agent.handle(agent.stopped("wide")))
    assert (0, 0) == held_gib(agent)


def test_a_lost_engine_gives_its_bytes_on_all_gpus_to_those_who_wait() -> None:
    agent = agent_of_two()
    agent.parked("a", 60, gpu_uuid="gpu-0")
    agent.parked("b", 60, gpu_uuid="gpu-1")
    agent.resident("wide", 70, gpu_uuids=BOTH)
    agent.handle(agent.wake("a", "wide"))
    agent.handle(agent.wake("b", "wide"))

    begun = outline(agent.handle(agent.lost("wide")))

    assert ["WakeEngine a", "WakeEngine b"] == [line for line in begun if line.startswith("WakeEngine")]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_replica_that_loses_one_of_its_gpus_is_released_from_all(kept: int) -> None:
    agent = agent_of_two()
    agent.resident("wide", 30, gpu_uuids=BOTH)

    outcomes = agent.handle(without(agent, gpu(kept)))

    assert ["ReplicaDraining wide", "StopEngine wide"] == [line for line in outline(outcomes) if line.endswith(" wide")]
    assert 30 == agent.state.held_bytes(BOTH[kept]) / GiB
    assert ["LeaseReleased wide"] == outline(agent.handle(agent.stopped("wide")))


def test_a_residue_that_is_only_known_as_a_sum_is_spread_evenly() -> None:
    """As in facts of before each shard was told."""
    agent = agent_of_two()
    agent.resident("wide", 30, gpu_uuids=BOTH)
    agent.handle(agent.park("wide"))
    fact = agent.handle(agent.has_parked("wide"))[0]
    assert isinstance(fact, ReplicaParked)

    assert (GiB, GiB) == fact.residues(2)
    assert (2, 1) == ReplicaParked(
        node="n", at_s=1.0, replica_id="r", deployment_id="d", model="m", wake_epoch=2, residue_bytes=3, host_bytes=0,
        copied_bytes=0, park_s=0.0, drain_s=0.0, reason="idle",
    ).residues(2)  # fmt: skip

"""The working copy of the account: no byte is promised twice within one decision."""

from schemas.units import GiB
from services.nodeagent.ledger import Ledger
from tests.unit.nodeagent.builders import Agent, gpu, replica


def test_an_empty_gpu_offers_its_capacity_less_the_reserve() -> None:
    ledger = Ledger(Agent(gpu(allocatable_gib=80)).state)

    assert 80 * GiB == ledger.free_bytes("gpu-0")


def test_a_gpu_that_is_not_here_has_nothing() -> None:
    assert 0 == Ledger(Agent().state).free_bytes("gpu-9")


def test_bytes_of_waiting_wakes_are_free_but_claimed_and_those_of_draining_replicas_are_promised() -> None:
    agent = Agent()
    agent.parked("a", 60)
    agent.resident("victim", 70)
    agent.handle(agent.wake("a", "victim"))

    ledger = Ledger(agent.state)

    assert 9 * GiB == ledger.free_bytes("gpu-0")
    assert (9 - 59) * GiB == ledger.unclaimed_bytes("gpu-0")
    assert (9 - 59 + 69) * GiB == ledger.promised_free_bytes("gpu-0")


def test_a_drain_that_has_ended_promises_nothing_any_more() -> None:
    agent = Agent()
    agent.resident("a", 70)
    agent.handle(agent.park("a"))

    ledger = Ledger(agent.state, settled=agent.lease("a"))

    assert 10 * GiB == ledger.promised_free_bytes("gpu-0")


def test_what_is_booked_in_one_decision_counts_in_its_next_step() -> None:
    ledger = Ledger(Agent().state)
    ledger.hold({"gpu-0": 50 * GiB})
    ledger.hold({"gpu-0": -20 * GiB})
    ledger.drop_claim({"gpu-0": -5 * GiB})

    assert (50 * GiB, 45 * GiB) == (ledger.free_bytes("gpu-0"), ledger.unclaimed_bytes("gpu-0"))


def test_those_that_take_turns_need_room_for_all_residues_and_the_largest_share() -> None:
    """40 fixed, residues 1 + 1, largest 30 - 1: 71 of 80. One more of 39 would need 40 + 3 + 38 = 81."""
    ledger = Ledger(Agent().state)
    ledger.lease(replica("fixed", 40, is_parkable=False))
    ledger.lease(replica("a", 30))
    ledger.lease(replica("b", 20))

    assert GiB == ledger.short_for_lease(replica("c", 39)).short_bytes
    assert 0 == ledger.short_for_lease(replica("c", 38)).short_bytes


def test_a_residue_is_never_counted_larger_than_the_share() -> None:
    ledger = Ledger(Agent().state)
    ledger.lease(replica("a", 1))

    assert 0 == ledger.short_for_lease(replica("b", 79)).short_bytes


def test_a_lease_on_another_gpu_does_not_count_here() -> None:
    ledger = Ledger(Agent().state)
    ledger.lease(replica("elsewhere", 80, gpu_uuid="gpu-9", is_parkable=False))

    assert 0 == ledger.short_for_lease(replica("a", 80)).short_bytes

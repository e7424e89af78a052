"""Which driver a replica is parked by, from its grant on, and what a park by a stop means for its lease."""

import msgspec
import pytest

from schemas.deployments import EngineKind, SwapDriver
from schemas.nodes import LeaseRefused, ParkTier, RefusalReason, ReplicaParked, ReplicaReady
from schemas.placement import ReplicaProposal
from schemas.units import GiB
from services.nodeagent.inputs import EngineParked, ParkEngine, StartEngine
from tests.unit.nodeagent.builders import Agent, effects, gpu, outline, proposal, replica


def of_kind(
    name: str, kind: EngineKind, *, wish: SwapDriver | None = None, gib: int = 30, is_parkable: bool = True
) -> ReplicaProposal:
    made = replica(name, gib, is_parkable=is_parkable)
    engine = msgspec.structs.replace(made.deployment.engine, kind=kind, swap_driver=wish)
    return msgspec.structs.replace(made, deployment=msgspec.structs.replace(made.deployment, engine=engine))


def agent_whose_node_can(*drivers: SwapDriver, host_gib: int = 1000) -> Agent:
    return Agent(msgspec.structs.replace(gpu(), swap_drivers=drivers), host_gib=host_gib)


def test_the_driver_is_chosen_at_the_grant_and_goes_with_every_effect_and_fact() -> None:
    agent = agent_whose_node_can(*SwapDriver)

    outcomes = agent.handle(proposal(of_kind("a", EngineKind.NIM)))
    (ready,) = agent.handle(agent.started("a"))
    draining = agent.handle(agent.park("a"))
    (parked,) = agent.handle(agent.has_parked("a"))

    assert isinstance(ready, ReplicaReady)
    assert isinstance(parked, ReplicaParked)
    started, asked = effects(outcomes)[0], effects(draining)[0]
    assert isinstance(started, StartEngine)
    assert isinstance(asked, ParkEngine)
    told = [started.swap_driver, ready.replicas[0].swap_driver, asked.swap_driver, parked.swap_driver]
    assert [SwapDriver.CHECKPOINT] * 4 == told


def test_a_driver_that_the_node_lacks_is_refused_at_the_grant_in_a_sentence() -> None:
    agent = agent_whose_node_can(SwapDriver.HTTP_SLEEP, SwapDriver.RESTART)

    (refused,) = agent.handle(proposal(of_kind("a", EngineKind.NIM, wish=SwapDriver.CHECKPOINT)))

    assert isinstance(refused, LeaseRefused)
    assert RefusalReason.SWAP_NOT_AVAILABLE == refused.reason
    assert "this node cannot park by 'checkpoint' on this GPU; it can by restart" == refused.message


def test_a_replica_that_is_never_parked_is_not_refused_for_its_driver() -> None:
    agent = agent_whose_node_can(SwapDriver.RESTART)

    outcomes = agent.handle(proposal(of_kind("a", EngineKind.NIM, wish=SwapDriver.CHECKPOINT, is_parkable=False)))

    assert ["LeaseGranted a", "ReplicaStarting a", "StartEngine a"] == outline(outcomes)


def test_host_memory_is_reserved_for_the_whole_process_where_that_is_what_is_parked() -> None:
    """30 GiB of share, 10 GiB of weights, 20 GiB of budget."""
    agent = agent_whose_node_can(*SwapDriver, host_gib=20)

    (refused,) = agent.handle(proposal(of_kind("a", EngineKind.NIM)))
    granted = agent.handle(proposal(of_kind("b", EngineKind.VLLM)))

    assert isinstance(refused, LeaseRefused)
    assert RefusalReason.NO_HOST_MEMORY == refused.reason
    assert "LeaseGranted b" == outline(granted)[0]


def stopped_for_its_park(agent: Agent, name: str) -> EngineParked:
    lease = agent.lease(name)
    return EngineParked(
        replica_id=name,
        lease_epoch=lease.lease_epoch,
        residues=(0,),
        host_bytes=0,
        copied_bytes=0,
        park_s=1.0,
        drain_s=0.0,
        reason="idle",
        swap_driver=SwapDriver.RESTART,
        tier=ParkTier.NOWHERE,
    )


def parked_by_a_stop() -> Agent:
    agent = agent_whose_node_can(SwapDriver.RESTART)
    agent.handle(proposal(of_kind("a", EngineKind.NIM)))
    agent.handle(agent.started("a"))
    agent.handle(agent.park("a"))
    agent.handle(stopped_for_its_park(agent, "a"))
    return agent


def test_a_park_by_a_stop_leaves_nothing_on_the_gpu_and_its_wake_is_a_cold_start() -> None:
    agent = parked_by_a_stop()
    assert 0 == agent.state.held_bytes("gpu-0")

    outcomes = agent.handle(agent.wake("a"))

    assert ["ReplicaStarting a", "StartEngine a"] == outline(outcomes)
    assert 30 * GiB == agent.state.held_bytes("gpu-0")
    assert ["ReplicaReady a"] == outline(agent.handle(agent.started("a")))


def test_the_end_of_the_engine_that_was_stopped_for_a_park_is_no_loss() -> None:
    """Somebody waited for its end, and hears of it late."""
    agent = agent_whose_node_can(SwapDriver.RESTART)
    agent.handle(proposal(of_kind("a", EngineKind.NIM)))
    agent.handle(agent.started("a"))
    agent.handle(agent.park("a"))
    lost = agent.lost("a")
    agent.handle(stopped_for_its_park(agent, "a"))

    assert [] == agent.handle(lost)


@pytest.mark.parametrize("size_gib", [10, 50])
def test_the_room_of_a_replica_parked_by_a_stop_is_free_to_the_last_byte(size_gib: int) -> None:
    agent = parked_by_a_stop()

    agent.resident("b", 30 + size_gib - 10)

    assert "resident" == agent.residency("b")

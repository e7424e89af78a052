"""The article's example, step by step: three models and a training job on two GPUs, in virtual time."""

from schemas.inbox import ParkRequested, RetireRequested, WakeRequested
from services.placement.state import ClusterState
from services.simulated import SimulatedSystem
from services.swarm.plan import inference, training


def states(system: SimulatedSystem) -> dict[str, str]:
    placement = system.state("placement")
    assert isinstance(placement, ClusterState), placement
    return {
        deployment.spec.name: ", ".join(r.state for r in placement.replicas_of(deployment.deployment_id))
        for deployment in placement.deployments.values()
    }


def gpus(system: SimulatedSystem) -> dict[str, str]:
    placement = system.state("placement")
    assert isinstance(placement, ClusterState), placement
    return {r.replica_id.rsplit("-d", 1)[0]: r.gpu_uuids[0] for r in placement.replicas.values()}


def article_system() -> SimulatedSystem:
    """One after the other: wished for together, 0.3 + 0.65 and 0.4 + 0.6 would all find room beside each other."""
    system = SimulatedSystem(seed=1)
    for spec in (
        inference("mistral", weights_gb=14.5, portion=0.3),
        inference("nano-12b", weights_gb=24.6, portion=0.4),
        inference("nano-30b", weights_gb=32.3, portion=0.65),
        training("fine-tune", weights_gb=20.0, portion=0.6),
    ):
        system.deploy([spec])
        system.run_for(1.0)
    system.run_for(16.0)
    return system


def test_three_models_share_two_gpus_and_training_waits_for_room() -> None:
    system = article_system()

    assert {
        "mistral": "resident",
        "nano-12b": "resident",
        "nano-30b": "resident",
        "fine-tune": "granted",
    } == states(system)
    where = gpus(system)
    assert where["mistral"] == where["nano-12b"]
    assert where["nano-30b"] == where["fine-tune"]


def test_training_runs_while_the_large_model_is_parked_and_yields_when_it_wakes() -> None:
    system = article_system()
    system.command(ParkRequested(command_id="p1", model="nano-30b"))
    system.run_for(5.0)
    assert "resident" == states(system)["fine-tune"]

    system.clients.request("nano-30b")
    system.run_for(5.0)

    assert ("resident", "parked") == (states(system)["nano-30b"], states(system)["fine-tune"])
    (request,) = system.clients.requests
    assert request.served_at_s is not None
    assert request.served_at_s - request.arrived_s < 1.5
    system.check()


def test_training_returns_to_its_gpu_when_the_large_model_is_idle_for_its_warm_window() -> None:
    system = article_system()
    system.command(ParkRequested(command_id="p1", model="nano-30b"))
    system.run_for(5.0)
    system.clients.request("nano-30b")
    system.run_for(330.0)

    assert ("parked", "resident") == (states(system)["nano-30b"], states(system)["fine-tune"])
    system.check()


def test_a_retired_model_gives_its_lease_back() -> None:
    system = article_system()

    system.command(RetireRequested(command_id="r1", model="nano-30b"))
    system.run_for(5.0)

    assert "nano-30b" not in states(system)
    assert "resident" == states(system)["fine-tune"]
    system.check()


def test_an_operator_can_wake_a_parked_model_without_a_request() -> None:
    system = article_system()
    system.command(ParkRequested(command_id="p1", model="mistral"))
    system.run_for(3.0)
    assert "parked" == states(system)["mistral"]

    system.command(WakeRequested(command_id="w1", model="mistral"))
    system.run_for(3.0)

    assert "resident" == states(system)["mistral"]


def test_a_wish_that_was_answered_does_not_undo_a_later_park() -> None:
    system = article_system()
    system.command(ParkRequested(command_id="p1", model="mistral"))
    system.run_for(2.0)
    system.clients.request("mistral")
    system.run_for(0.6)
    assert "resident" == states(system)["mistral"]

    system.command(ParkRequested(command_id="p2", model="mistral"))
    system.run_for(3.0)

    assert "parked" == states(system)["mistral"]

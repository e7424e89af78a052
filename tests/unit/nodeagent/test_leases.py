"""Grants, refusals and releases: as a whole, against what the node itself holds, ended only when bytes are free."""

import pytest

from kit.outcomes import Context, Outcome, Timer
from schemas.deployments import IsolationGrade
from schemas.nodes import GpuOffer, LeaseRefused, LeaseReleased, NodeAlive, NodeJoined, RefusalReason
from schemas.units import GiB
from services.nodeagent.core import SERVICE
from services.nodeagent.inputs import AliveDue, NodeProbed, ProbeNode, StartEngine, StopEngine
from services.nodeagent.settings import NodeAgentSettings
from tests.unit.nodeagent.builders import NODE, Agent, gpu, outline, proposal, release, replica, start_of


def refusal(outcomes: list[Outcome]) -> LeaseRefused:
    (refused,) = outcomes
    assert isinstance(refused, LeaseRefused)
    return refused


def test_a_proposal_that_fits_is_granted_and_started_at_once() -> None:
    agent = Agent()

    outcomes = agent.handle(proposal(replica("a", 30)))

    assert ["LeaseGranted a", "ReplicaStarting a", "StartEngine a"] == outline(outcomes)
    assert start_of(agent, "a") == outcomes[2]
    assert 30 * GiB == agent.state.held_bytes("gpu-0")


def test_the_same_proposal_again_changes_nothing() -> None:
    agent = Agent()
    agent.handle(proposal(replica("a", 30)))

    assert [] == agent.handle(proposal(replica("a", 30)))


def test_a_proposal_for_another_node_is_not_answered() -> None:
    assert [] == Agent().handle(proposal(replica("a", 30), node="node-1"))


def test_a_second_model_that_must_take_turns_is_granted_but_waits_for_its_first_start() -> None:
    agent = Agent()
    agent.resident("a", 60)

    assert ["LeaseGranted b"] == outline(agent.handle(proposal(replica("b", 50))))
    assert "granted" == agent.residency("b")


def test_a_proposal_is_refused_as_a_whole_when_one_of_its_replicas_does_not_fit() -> None:
    agent = Agent()

    refused = refusal(agent.handle(proposal(replica("a", 30), replica("b", 90))))

    assert ("a", "b") == refused.replica_ids
    assert {} == agent.state.replicas


def test_a_share_beyond_what_must_fit_together_is_refused_with_the_missing_bytes() -> None:
    """One that never parks holds 60 of 80, so 21 more can never be resident beside it."""
    agent = Agent()
    agent.resident("fixed", 60, is_parkable=False)

    refused = refusal(agent.handle(proposal(replica("b", 21))))

    assert (RefusalReason.NO_ROOM, f"short by {GiB} bytes") == (refused.reason, refused.message)
    assert 20 * GiB == refused.free_bytes


def test_two_that_never_park_are_refused_when_they_exceed_the_gpu_together() -> None:
    agent = Agent()
    agent.resident("a", 50, is_parkable=False)

    assert RefusalReason.NO_ROOM == refusal(agent.handle(proposal(replica("b", 31, is_parkable=False)))).reason
    assert ["LeaseGranted c"] == outline(agent.handle(proposal(replica("c", 30, is_parkable=False))))[:1]


def test_a_gpu_that_is_not_here_is_named_in_the_refusal() -> None:
    refused = refusal(Agent().handle(proposal(replica("a", 30, gpu_uuid="gpu-7"))))

    assert (RefusalReason.UNKNOWN_GPU, "no GPU gpu-7 on this node") == (refused.reason, refused.message)


@pytest.mark.parametrize("minimum", list(IsolationGrade))
def test_a_share_with_a_grade_that_the_gpu_cannot_give_is_refused(minimum: IsolationGrade) -> None:
    """Unenforced is never silent: this GPU gives `broker`, so `hardware` and `driver` are too much to ask."""
    agent = Agent(gpu(grade=IsolationGrade.BROKER))

    outcome = agent.handle(proposal(replica("a", 30, minimum_grade=minimum)))[0]

    is_refused = isinstance(outcome, LeaseRefused) and outcome.reason is RefusalReason.GRADE_NOT_AVAILABLE
    assert (minimum in {IsolationGrade.HARDWARE, IsolationGrade.DRIVER}) == is_refused


def test_weights_beyond_the_host_budget_are_refused_but_only_for_what_may_be_parked() -> None:
    agent = Agent(host_gib=25)
    agent.resident("a", 20, weights_gib=20)

    refused = refusal(agent.handle(proposal(replica("b", 10, weights_gib=6))))

    assert (RefusalReason.NO_HOST_MEMORY, f"host memory is short by {GiB} bytes") == (refused.reason, refused.message)
    assert ["LeaseGranted c"] == outline(agent.handle(proposal(replica("c", 10, weights_gib=6, is_parkable=False))))[:1]


# --- Releases ---------------------------------------------------------------------------------------------------------


def test_a_release_drains_and_stops_and_the_lease_ends_when_the_bytes_are_free() -> None:
    agent = Agent()
    agent.resident("a", 30)

    outcomes = agent.handle(release("a"))

    assert ["ReplicaDraining a", "StopEngine a"] == outline(outcomes)
    stop = outcomes[1]
    assert isinstance(stop, StopEngine)
    assert 7.0 == stop.drain_s
    assert 30 * GiB == agent.state.held_bytes("gpu-0")
    assert ["LeaseReleased a"] == outline(agent.handle(agent.stopped("a")))
    assert {} == agent.state.replicas


def test_a_release_without_a_process_ends_the_lease_at_once() -> None:
    agent = Agent()
    agent.resident("a", 60)
    agent.granted("b", 50)

    (released,) = agent.handle(release("b"))

    assert (
        LeaseReleased(node=NODE, at_s=agent.now_s, replica_id="b", reason="retired", lease_epoch=agent.seq - 1)
        == released
    )


@pytest.mark.parametrize("step", ["starting", "resident", "draining", "parked", "waking"])
def test_a_release_stops_the_engine_in_every_residency_that_has_one(step: str) -> None:
    agent = agent_with("a", step)

    outcomes = agent.handle(release("a"))

    assert ["ReplicaDraining a", "StopEngine a"] == outline(outcomes)
    assert "releasing" == agent.residency("a")
    assert ["LeaseReleased a"] == outline(agent.handle(agent.stopped("a")))


def test_a_second_release_changes_nothing() -> None:
    agent = agent_with("a", "resident")
    agent.handle(release("a"))

    assert [] == agent.handle(release("a"))


def test_a_waiting_wake_that_is_released_keeps_its_residue_until_the_stop_is_proven() -> None:
    agent = agent_with("a", "waiting")
    held_bytes = agent.state.held_bytes("gpu-0")

    agent.handle(release("a"))

    assert held_bytes == agent.state.held_bytes("gpu-0")
    assert "ReplicaWaking a" not in outline(agent.handle(agent.has_parked("victim")))
    assert ["LeaseReleased a"] == outline(agent.handle(agent.stopped("a")))


def test_bytes_of_a_release_go_to_the_wake_that_waits_for_them() -> None:
    agent = Agent()
    agent.parked("b", 60)
    agent.resident("a", 70)
    agent.handle(agent.wake("b", "a"))

    agent.handle(release("a"))

    assert ["LeaseReleased a", "ReplicaWaking b", "WakeEngine b"] == outline(agent.handle(agent.stopped("a")))


def agent_with(name: str, step: str) -> Agent:
    """An agent whose replica `name` (60 of 80) is in this residency; `victim` (70) is there where one is needed."""
    agent = Agent()
    match step:
        case "starting":
            agent.granted(name, 60)
        case "resident":
            agent.resident(name, 60)
        case "draining":
            agent.resident(name, 60)
            agent.handle(agent.park(name))
        case "parked":
            agent.parked(name, 60)
        case "waiting":
            agent.parked(name, 60)
            agent.resident("victim", 70)
            agent.handle(agent.wake(name, "victim"))
        case "waking":
            agent.parked(name, 60)
            agent.handle(agent.wake(name))
        case "releasing":
            agent.resident(name, 60)
            agent.handle(release(name))
        case "granted":
            agent.resident("victim", 70)
            agent.granted(name, 60)
        case _:
            assert step == "failed", step
            agent.granted(name, 60)
            for _ in range(agent.state.settings.start_attempt_count):
                agent.handle(agent.lost(name))
                if agent.residency(name) == "granted":
                    agent.handle(agent.wake(name))
    assert step == agent.residency(name), agent.residency(name)
    return agent


# --- Returns ----------------------------------------------------------------------------------------------------------


def test_a_new_agent_looks_at_its_node_first() -> None:
    agent = Agent()

    assert ProbeNode() == SERVICE.on_start(agent.state, context())[0]


def test_an_agent_says_that_it_is_there_from_its_start_on_and_keeps_no_history_of_it() -> None:
    agent = Agent()
    first = SERVICE.on_start(agent.state, context())[-1]
    assert isinstance(first, Timer)
    assert Timer(due_s=context().now_s, input=AliveDue()) == first

    alive, again = agent.handle(first.input)

    assert NodeAlive(node=NODE, machine_id="m", writer_epoch=1) == alive
    assert Timer(due_s=agent.now_s + agent.state.settings.alive_s, input=AliveDue()) == again


def test_an_agent_that_shall_not_say_so_is_silent() -> None:
    state = SERVICE.new_state(NodeAgentSettings(alive_s=0.0, burst_tick_s=0.0))

    assert [ProbeNode()] == list(SERVICE.on_start(state, context()))


def test_a_node_tells_what_its_host_has_and_how_its_operator_calls_it() -> None:
    state = SERVICE.new_state(NodeAgentSettings(node=NODE, labels={"zone": "a"}))
    probed = NodeProbed(
        machine_id="m", gpus=(gpu(),), host_budget_bytes=GiB, holder_url="", label="software GPU", cpu_millicores=8000,
        memory_bytes=64 * GiB,
    )  # fmt: skip

    joined = SERVICE.handlers[NodeProbed](state, probed, context())[0]

    assert isinstance(joined, NodeJoined)
    assert (8000, 64 * GiB, {"zone": "a"}) == (joined.cpu_millicores, joined.memory_bytes, joined.labels)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("granted", []),
        ("starting", ["StartEngine a"]),
        ("resident", ["AdoptEngine a"]),
        ("draining", ["ParkEngine a"]),
        ("parked", ["AdoptEngine a"]),
        ("waiting", []),
        ("waking", ["WakeEngine a"]),
        ("releasing", ["StopEngine a"]),
        ("failed", []),
    ],
)
def test_an_agent_that_returns_takes_up_each_replica_where_it_was_left(step: str, expected: list[str]) -> None:
    agent = agent_with("a", step)

    joined, *outcomes = agent.handle(probe(agent))

    assert isinstance(joined, NodeJoined)
    assert expected == [line for line in outline(outcomes) if line.endswith(" a")]


def test_a_parked_replica_is_adopted_as_parked() -> None:
    agent = agent_with("a", "parked")

    adopted = agent.handle(probe(agent))[1]

    assert getattr(adopted, "should_be_parked", None) is True


def test_an_effect_that_is_repeated_names_the_lease_and_wake_of_the_first_one() -> None:
    """So that it is adoption, not a second start."""
    agent = agent_with("a", "starting")

    assert start_of(agent, "a") == agent.handle(probe(agent))[1]
    assert isinstance(start_of(agent, "a"), StartEngine)


def test_what_a_new_agent_begins_before_it_has_looked_at_its_node_is_not_begun_twice() -> None:
    agent = agent_with("a", "parked")
    agent.resident("b", 10)
    looked = probe(agent)
    agent.handle(agent.wake("a"))

    assert ["NodeJoined", "AdoptEngine b"] == outline(agent.handle(looked))


def probe(agent: Agent) -> NodeProbed:
    """What comes back of the look at its node, after the agent began a new life."""
    SERVICE.on_start(agent.state, context())
    return NodeProbed(
        machine_id="m",
        gpus=tuple(agent.state.gpus.values()),
        host_budget_bytes=agent.state.host_budget_bytes,
        holder_url="http://node-0:7070",
        label="software GPU",
    )


def context() -> Context:
    return Context(now_s=1.0, writer_epoch=1)


# --- A GPU that vanishes ----------------------------------------------------------------------------------------------


def without(agent: Agent, *gpus: GpuOffer) -> NodeProbed:
    """What a new life of the agent finds: only these GPUs."""
    looked = probe(agent)
    return NodeProbed(
        machine_id=looked.machine_id,
        gpus=gpus,
        host_budget_bytes=looked.host_budget_bytes,
        holder_url=looked.holder_url,
        label=looked.label,
    )


@pytest.mark.parametrize("step", ["starting", "resident", "draining", "parked", "waiting", "waking"])
def test_a_replica_whose_gpu_is_gone_is_released_from_every_residency(step: str) -> None:
    """So that placement finds it another place; the agent goes on with the GPUs that are left."""
    agent = agent_with("a", step)

    outcomes = [line for line in outline(agent.handle(without(agent, gpu(1)))) if line.endswith(" a")]

    assert ["ReplicaDraining a", "StopEngine a"] == outcomes
    assert ["LeaseReleased a"] == outline(agent.handle(agent.stopped("a")))
    assert ["LeaseGranted b", "ReplicaStarting b", "StartEngine b"] == outline(
        agent.handle(proposal(replica("b", 30, gpu_uuid="gpu-1")))
    )


@pytest.mark.parametrize("step", ["granted", "failed"])
def test_a_lease_without_a_process_ends_at_once_when_its_gpu_is_gone(step: str) -> None:
    agent = agent_with("a", step)

    assert "LeaseReleased a" in outline(agent.handle(without(agent, gpu(1))))


def test_a_release_that_had_begun_goes_on_when_its_gpu_is_gone() -> None:
    agent = agent_with("a", "releasing")

    assert ["NodeJoined", "StopEngine a"] == outline(agent.handle(without(agent, gpu(1))))
    assert ["LeaseReleased a"] == outline(agent.handle(agent.lost("a")))

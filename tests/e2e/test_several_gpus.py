"""Models over several GPUs, several replicas, and gangs, as a user has them: over NATS, with real processes."""

import pytest

import sublet
from schemas.nodes import LeaseGranted, NodeJoined, ReplicaReady, ReplicaStarting
from schemas.placement import GangCommitted
from tests.e2e.stack import RunningStack, chat, eventually

pytestmark = pytest.mark.nats


def states(stack: RunningStack, model: str) -> list[str]:
    with stack.client() as client:
        view = client.deployment(model)
    return sorted(replica.state for replica in view.replicas) if view is not None else []


def test_a_model_over_two_gpus_answers_parks_and_comes_back(stack: RunningStack) -> None:
    others, before_count = stack.engines(), len(stack.facts())
    with stack.client() as client:
        client.deploy(sublet.deployment("wide", weights="2GB", share=0.2, gpus=2))
        eventually(lambda: states(stack, "wide") == ["resident"], "not resident")
        engines = stack.engines()
        client.park("wide")
        eventually(lambda: states(stack, "wide") == ["parked"], "not parked")

        assert chat(stack.openai(), "wide")
        eventually(lambda: ["resident"] == states(stack, "wide"), "placement has not heard of it")
        assert engines == stack.engines(), "a park keeps the process"
        client.retire("wide")
    eventually(lambda: stack.engines() == others, "its engine is still there")

    facts = stack.facts()
    granted = [
        fact
        for fact in facts[before_count:]
        if isinstance(fact, LeaseGranted) and fact.replicas[0].deployment.name == "wide"
    ]
    joined = [fact for fact in facts if isinstance(fact, NodeJoined)][-1]
    gpus = {gpu.gpu_uuid for gpu in joined.gpus}
    assert [gpus] == [{lease.gpu_uuid for lease in fact.leases} for fact in granted]


def test_a_gang_starts_together_and_all_of_it_serves(stack: RunningStack) -> None:
    others, before_count = stack.engines(), len(stack.facts())
    with stack.client() as client:
        client.deploy(sublet.deployment("team", weights="1GB", share=0.1, replicas=2, gang=True))
        eventually(lambda: states(stack, "team") == ["resident", "resident"], "not resident")
        assert chat(stack.openai(), "team")
        client.retire("team")
    eventually(lambda: stack.engines() == others, "its engines are still there")

    facts = stack.facts()[before_count:]
    (committed,) = (fact for fact in facts if isinstance(fact, GangCommitted))
    commit = facts.index(committed)
    begun = [facts.index(f) for f in facts if isinstance(f, ReplicaStarting) and f.model == "team"]
    ready = {one.replica_id for f in facts if isinstance(f, ReplicaReady) for one in f.replicas if one.model == "team"}
    assert set(committed.replica_ids) == ready
    assert all(commit < number for number in begun), "a part of it started before its commit"

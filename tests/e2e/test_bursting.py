"""A model above its request, and back: over NATS, with real processes and the software GPU's limits."""

import pytest

import sublet
from schemas.nodes import GaveBack, LeaseResized, ResizeReason
from tests.e2e.stack import RunningStack, chat, eventually

pytestmark = pytest.mark.nats


def granted_bytes(stack: RunningStack, model: str) -> int:
    with stack.client() as client:
        view = client.deployment(model)
    return sum(replica.granted_bytes for replica in view.replicas) if view is not None else 0


def request_bytes(stack: RunningStack, model: str) -> int:
    with stack.client() as client:
        view = client.deployment(model)
    return sum(replica.request_bytes for replica in view.replicas) if view is not None else 0


def test_a_model_grows_above_its_request_and_gives_back_for_one_that_is_new(stack: RunningStack) -> None:
    others, before_count = stack.engines(), len(stack.facts())
    with stack.client() as client:
        client.deploy(sublet.deployment("greedy", weights="1GB", share=0.1, limit=1.0))
        eventually(lambda: granted_bytes(stack, "greedy") > request_bytes(stack, "greedy") > 0, "it has not grown")
        assert chat(stack.openai(), "greedy")
        client.deploy(sublet.deployment("newcomer", weights="1GB", share=0.3))  # Fits beside it, on the GPU it fills.
        eventually(lambda: "resident" == stack.state_of("newcomer"), "it has no room")
        assert chat(stack.openai(), "greedy")
        for name in ("newcomer", "greedy"):
            client.retire(name)
    eventually(lambda: stack.engines() == others, "its engines are still there")

    facts = stack.facts()[before_count:]
    grown = [f for f in facts if isinstance(f, LeaseResized) and f.reason is ResizeReason.BURST and f.model == "greedy"]
    given = [f for f in facts if isinstance(f, GaveBack) and f.model == "greedy"]
    assert grown
    assert any(f.is_enough and f.freed_bytes > 0 for f in given), given
    assert not any(f.step in ("park", "stop") for f in given), given

"""One stack for all end-to-end tests, with two models on it. Each test gets it ready and leaves it alive."""

from collections.abc import Iterator

import pytest

import sublet
from tests.e2e.stack import RunningStack, eventually

CHAT, OTHER = "chat", "other"


@pytest.fixture(scope="session")
def session_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    stack = RunningStack.start(tmp_path_factory.mktemp("e2e") / "state")
    try:
        with stack.client() as client:
            for model in (CHAT, OTHER):
                client.deploy(sublet.deployment(model, weights="2GB", share=0.3))
        eventually(lambda: {"resident"} == {stack.state_of(model) for model in (CHAT, OTHER)}, "not resident")
        yield stack
    finally:
        assert 0 == stack.stop()


@pytest.fixture
def stack(session_stack: RunningStack) -> RunningStack:
    """Ready: whatever an earlier test killed is back, and both models are resident and alone."""
    session_stack.wait_ready()
    session_stack.wait_only(CHAT, OTHER)
    return session_stack

"""Parts die while models are in use: requests to resident models do not notice, engines stay, and all comes back."""

import os
import signal
import time
from pathlib import Path

import pytest

import sublet
from schemas.deployments import SwapDriver
from schemas.nodes import LeaseGranted, LeaseReleased, ReplicaFailed, ReplicaParked, ReplicaReady, ReplicaResident
from tests.e2e.conftest import CHAT, OTHER
from tests.e2e.stack import Load, RunningStack, answers, chat, eventually, survivors

pytestmark = pytest.mark.nats
NOTICED_S = 10.0
"""A chat takes a fraction of a second, on a busy host a few; one that waits for a part that is away takes longer."""


@pytest.mark.parametrize("part", ["nodeagent", "placement", "swapper", "autoscaler", "nats"])
def test_no_request_to_a_resident_model_fails_when_a_part_dies(stack: RunningStack, part: str) -> None:
    engines = stack.engines()
    with Load(stack.openai(), CHAT) as load:
        stack.wait_back(part, was=stack.kill(part))

    assert [] == load.problems
    assert load.longest_s < NOTICED_S
    assert engines == stack.engines(), "engines are adopted, not restarted"


def test_a_model_wakes_after_every_part_that_decides_has_died(stack: RunningStack) -> None:
    with stack.client() as client:
        client.park(OTHER)
    eventually(lambda: stack.state_of(OTHER) == "parked", "not parked")
    engines = stack.engines()
    for part in ("nodeagent", "placement", "swapper", "autoscaler"):
        stack.kill(part)

    assert chat(stack.openai(), OTHER)
    assert engines == stack.engines()


def test_a_park_copies_nothing_and_goes_by_the_memory_broker(stack: RunningStack) -> None:
    before_count = len(stack.facts())
    with stack.client() as client:
        client.park(OTHER)
    eventually(lambda: stack.state_of(OTHER) == "parked", "not parked")
    assert chat(stack.openai(), OTHER)

    facts = stack.facts()[before_count:]
    (parked,) = [fact for fact in facts if isinstance(fact, ReplicaParked) and fact.model == OTHER]
    (back,) = [fact for fact in facts if isinstance(fact, ReplicaResident) and fact.model == OTHER]
    assert (SwapDriver.STORE, 0) == (parked.swap_driver, parked.copied_bytes)
    assert back.swap_driver is SwapDriver.STORE
    assert back.copied_bytes > 0


def test_models_serve_park_and_wake_over_the_death_of_the_memory_broker(stack: RunningStack) -> None:
    engines, (broker,) = stack.engines(), stack.brokers()
    with Load(stack.openai(), CHAT) as load:
        os.kill(broker, signal.SIGKILL)
        eventually(lambda: stack.brokers() - {broker} != set(), "the broker was not started again")
        with stack.client() as client:
            client.park(OTHER)
        eventually(lambda: stack.state_of(OTHER) == "parked", "not parked")
        assert chat(stack.openai(), OTHER)

    assert [] == load.problems
    assert engines == stack.engines()


def test_the_gateway_comes_back_and_serves(stack: RunningStack) -> None:
    stack.wait_back("gateway", was=stack.kill("gateway"))

    assert chat(stack.openai(), CHAT)


def test_models_come_back_after_the_holder_died_with_its_engines(stack: RunningStack) -> None:
    engines = stack.engines()

    stack.wait_back("holder", was=stack.kill("holder"))

    eventually(lambda: len(stack.engines()) == len(engines), "engines were not started again")
    assert not engines & stack.engines()
    assert chat(stack.openai(), CHAT)
    assert chat(stack.openai(), OTHER)


def test_nobody_but_gateway_and_engines_is_needed_for_a_resident_model(stack: RunningStack) -> None:
    """Not dead but silent, all at once: no connection breaks, and nobody answers."""
    silent = [stack.pids[part] for part in ("nats", "placement", "swapper", "autoscaler", "nodeagent")]
    try:
        with Load(stack.openai(), CHAT) as load:
            for pid in silent:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(3.0)
            answered_count = load.answered_count
            eventually(lambda: load.answered_count > answered_count + 5, "chats wait for somebody who is silent")
    finally:
        for pid in silent:
            os.kill(pid, signal.SIGCONT)

    assert [] == load.problems


@pytest.mark.slow
def test_all_who_decide_and_nats_are_away_for_long_and_nothing_is_done_twice_when_they_are_back(
    stack: RunningStack,
) -> None:
    """Silent for 15 s, which breaks connections, and killed then: resident traffic goes on, a parked model wakes."""
    with stack.client() as client:
        client.park(OTHER)
    eventually(lambda: stack.state_of(OTHER) == "parked", "not parked")
    eventually(lambda: len(leases(stack)) == 2, "a lease of another test is not released yet")
    engines, before_count = stack.engines(), len(stack.facts())
    away = {part: stack.pids[part] for part in ("nats", "placement", "swapper", "autoscaler")}
    with Load(stack.openai(), CHAT) as load:
        for pid in away.values():
            os.kill(pid, signal.SIGSTOP)
        time.sleep(15.0)
        answered_count = load.answered_count
        eventually(lambda: load.answered_count > answered_count + 5, "chats wait for somebody who is silent")
        for pid in away.values():
            os.kill(pid, signal.SIGKILL)
        for part, pid in away.items():
            stack.wait_back(part, was=pid)

    assert [] == load.problems
    assert load.longest_s < NOTICED_S
    assert [] == changes(stack, since=before_count)

    assert chat(stack.openai(), OTHER)
    eventually(lambda: stack.state_of(OTHER) == "resident", "not resident")
    assert ["ReplicaResident"] == changes(stack, since=before_count)
    assert engines == stack.engines()


def leases(stack: RunningStack) -> set[str]:
    """Replicas that have one."""
    held: set[str] = set()
    for fact in stack.facts():
        if isinstance(fact, LeaseGranted):
            held |= {replica.replica_id for replica in fact.replicas}
        elif isinstance(fact, LeaseReleased):
            held.discard(fact.replica_id)
    return held


def changes(stack: RunningStack, *, since: int) -> list[str]:
    """What the node agent did to its replicas after so many facts."""
    done = (LeaseGranted, LeaseReleased, ReplicaFailed, ReplicaParked, ReplicaReady, ReplicaResident)
    return [type(fact).__name__ for fact in stack.facts()[since:] if isinstance(fact, done)]


def test_a_killed_supervisor_leaves_nothing_and_the_next_one_goes_on(tmp_path: Path) -> None:
    stack = RunningStack.start(tmp_path / "state")
    with stack.client() as client:
        client.deploy(sublet.deployment("kept", weights="1GB", share=0.2))
    chat(stack.openai(), "kept")
    api_key, everybody = stack.context.api_key, stack.everybody()
    assert len(everybody) > 8, everybody

    stack.process.kill()
    stack.process.wait()
    eventually(lambda: not survivors(everybody), "something outlived the supervisor")

    stack = RunningStack.start(tmp_path / "state")
    try:
        assert api_key == stack.context.api_key
        assert chat(stack.openai(), "kept"), "its engine is started again"
        everybody = stack.everybody()
    finally:
        assert 0 == stack.stop()
    assert not survivors(everybody)
    assert not stack.folder.runtime.exists()


def test_a_second_up_says_that_it_runs_already(stack: RunningStack) -> None:
    import subprocess
    import sys

    again = subprocess.run(
        [sys.executable, "-m", "services", "up", "--state", str(stack.folder.path)],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip

    assert 0 == again.returncode
    assert f"already running (pid {stack.process.pid})" in again.stdout
    assert answers(f"{stack.context.gateway_url}/healthz")

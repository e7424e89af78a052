"""The holder keeps the memory broker: started, told to the agent, started again, ended with it."""

import os
import signal
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from kit.process import identity_of, is_alive
from services.holder.main import Holder, running
from services.holder.settings import HolderSettings
from tests.integration.broker.peers import Agent

pytestmark = pytest.mark.anyio


def broker_id(holder: Holder) -> str:
    assert holder.broker is not None
    agent = Agent(holder.broker.control_socket)
    try:
        return agent.view().broker_id
    finally:
        agent.close()


async def test_a_killed_broker_is_started_again_and_ends_with_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBLET_BROKER_ARENA_DIR", str(tmp_path / "arena"))
    settings = HolderSettings(state_dir=str(tmp_path / "h"), port=0, term_s=0.1, cgroup="off")
    async with running(settings) as holder:
        assert holder.broker is not None
        first = await anyio.to_thread.run_sync(broker_id, holder)
        os.kill(holder.broker.pid, signal.SIGKILL)
        with anyio.fail_after(60):
            while holder.broker.restart_count == 0 or not holder.broker.pid:
                await anyio.sleep(0.02)
        second = await anyio.to_thread.run_sync(broker_id, holder)
        last = identity_of(holder.broker.pid)
        seen_by_containers = {path.name for path in holder.broker.engine_socket.parent.iterdir()}

    assert first != second
    assert {"engines.sock"} == seen_by_containers, "nothing that starts programs or opens accounts is in that folder"
    assert last is not None
    assert not is_alive(last)
    assert not (tmp_path / "arena").exists(), "an orderly end leaves no image"

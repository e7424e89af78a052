"""Looks at suspects with real processes: who serves or sleeps is adopted, who is silent is ended only at last."""

import os
import signal
from pathlib import Path

import pytest

import softgpu
from schemas.deployments import EngineKind
from tests.integration.test_node_several_gpus import CONTEXT_BYTES, Hands, hands_on, host, replica

__all__ = ["host"]
pytestmark = pytest.mark.anyio


def engine_pids(software: softgpu.Host) -> list[int]:
    processes = [process for device in software.status()["devices"] for process in device["processes"]]
    return sorted({process["pid"] for process in processes if process["used_bytes"]} - {os.getpid()})


async def look(hands: Hands, word: str) -> tuple[str, dict[str, object]]:
    answer = await hands.do(word)
    return answer["kind"], answer["result"]


async def test_an_engine_is_adopted_as_it_is_found_and_put_to_sleep_where_its_lease_says_so(
    tmp_path: Path, host: softgpu.Host
) -> None:
    async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED)) as hands:
        await hands.do("start")
        kind, found = await look(hands, "look resident")
        assert ("EngineFound", False) == (kind, found["is_parked"])

        kind, found = await look(hands, "look parked")
        assert ("EngineFound", True, [CONTEXT_BYTES, CONTEXT_BYTES]) == (kind, found["is_parked"], found["residues"])

        kind, found = await look(hands, "look resident")
        assert ("EngineFound", True) == (kind, found["is_parked"])
        await hands.do("stop")


async def test_a_silent_engine_is_in_doubt_adopted_when_it_answers_again_and_ended_only_when_it_may_be(
    tmp_path: Path, host: softgpu.Host
) -> None:
    async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED)) as hands:
        await hands.do("start")
        (pid,) = engine_pids(host)
        os.kill(pid, signal.SIGSTOP)
        kind, _ = await look(hands, "look resident")
        assert "EngineUnexplained" == kind

        os.kill(pid, signal.SIGCONT)
        kind, _ = await look(hands, "look and end")
        assert "EngineFound" == kind, "it could be adopted"

        os.kill(pid, signal.SIGSTOP)
        answer = await hands.do("look and end")
        assert "EngineLost" == answer["kind"], answer
        assert ([0, 0], []) == (answer["used"], answer["limits"])

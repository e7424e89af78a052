"""What no lease names, with real processes: counted as taken while it lives, then ended and cleared."""

from pathlib import Path

import anyio
import pytest

import softgpu
from schemas.deployments import EngineKind
from schemas.units import MiB
from services.nodeagent.holder_client import HolderClient
from tests.integration.test_node_several_gpus import hands_on, host, replica

__all__ = ["host"]
pytestmark = pytest.mark.anyio

CACHE_BYTES = 64 * MiB
"""An engine's cache grows and shrinks with its requests."""


async def test_an_engine_that_a_lease_names_is_ours_and_left_alone(tmp_path: Path, host: softgpu.Host) -> None:
    async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED)) as hands:
        started = await hands.do("start")

        assert {"foreign": [0, 0]} == await hands.do("record 7")
        answer = await hands.do("reconcile")

        assert (0, ["wide-1"], started["limits"]) == (answer["strays"], answer["left"], answer["limits"])
        await hands.do("stop")


async def test_an_engine_of_no_lease_counts_as_taken_and_is_ended_with_its_limits(
    tmp_path: Path, host: softgpu.Host
) -> None:
    """A node's journal was lost: its holder runs what nobody knows."""
    async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED)) as hands:
        started = await hands.do("start")
        assert all(started["used"])
        hands.kill()
        async with hands.again() as returned:
            foreign = (await returned.do("record"))["foreign"]
            apart = [abs(taken - used) for taken, used in zip(foreign, started["used"], strict=True)]
            assert max(apart) < CACHE_BYTES < min(foreign), (foreign, started["used"])

            answer = await returned.do("reconcile")

            assert (1, [], []) == (answer["strays"], answer["left"], answer["leaves"])
            assert ([0, 0], []) == (answer["used"], answer["limits"])
            assert {"foreign": [0, 0]} == await returned.do("record")


async def test_an_engine_of_another_lease_of_a_replica_is_ended_and_the_next_start_clears_up(
    tmp_path: Path, host: softgpu.Host
) -> None:
    async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED)) as hands:
        await hands.do("start")
        await hands.do("record 8")

        answer = await hands.do("reconcile")
        assert (1, [0, 0], ["wide-1"]) == (answer["strays"], answer["used"], answer["left"])

        again = await hands.do("reconcile")
        assert 0 == again["strays"]


async def test_a_cgroup_without_an_engine_or_a_lease_goes(tmp_path: Path, host: softgpu.Host) -> None:
    """A former holder could not clear it."""
    async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED)) as hands:
        started = await hands.do("start")
        holder = HolderClient(str(tmp_path / "state" / "holder.sock"))
        own = Path((await holder.view()).engines[0].namespace)
        if not own.is_absolute():
            pytest.skip("needs a cgroup v2 folder of its own")
        left = own.with_name(own.name.replace("wide-1", "gone-1"))
        await anyio.Path(left).mkdir()
        assert {"gone-1": str(left)} == (await holder.view()).leftover_namespaces
        await holder.close()
        await hands.do("record 7")

        answer = await hands.do("reconcile")

        assert ([], 0, started["limits"]) == (answer["leaves"], answer["strays"], answer["limits"])
        assert not await anyio.Path(left).exists()
        assert await anyio.Path(own).exists()
        await hands.do("stop")

"""Three servers, of which one may be lost: writers wait for a new leader and see nothing else."""

from pathlib import Path

import pytest

from benchmarks.bus_leader import lose_leaders
from benchmarks.nats_cluster import NatsCluster
from kit.bus_nats import NatsBus
from kit.nats_server import stream_configs

pytestmark = [pytest.mark.nats, pytest.mark.anyio]


async def test_a_lost_leader_costs_writers_some_seconds_and_no_fact(tmp_path: Path) -> None:
    said: list[str] = []
    async with NatsCluster(tmp_path) as cluster:
        async with NatsBus(cluster.url) as bus:
            for config in stream_configs():
                present = (await bus.api(f"STREAM.INFO.{config['name']}"))["config"]
                assert (3, "limits") == (present["num_replicas"], present["retention"])
        outcome = await lose_leaders(cluster, kills=1, say=said.append)

    assert [] == outcome.problems
    assert 0 == outcome.error_count
    assert outcome.acknowledged_count > 0
    assert max(outcome.gaps_s) < 30.0, said

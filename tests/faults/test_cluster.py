"""Three servers, of which one may be lost: writers wait for a new leader and see nothing else."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from benchmarks.bus_leader import lose_leaders
from benchmarks.ledger import read_all
from benchmarks.nats_cluster import NatsCluster
from kit.bus import BusError, Entry, Stream
from kit.bus_nats import NatsBus
from kit.history import append_surely
from kit.nats_server import MiB, stream_configs

pytestmark = [pytest.mark.nats, pytest.mark.anyio, pytest.mark.slow]


async def until_answered(bus: NatsBus, name: str, request: dict[str, Any]) -> None:
    """One call of JetStream's API on a cluster that is still choosing its leader."""
    with anyio.fail_after(60):
        while True:
            try:
                await bus.api(name, request)
                return
            except BusError:
                await anyio.sleep(0.2)


async def test_a_full_cluster_is_told_at_once_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    history = next(config for config in stream_configs(replica_count=3) if config["name"] == Stream.HISTORY)
    filler = {"name": "FILLER", "subjects": ["filler"], "storage": "file", "num_replicas": 3}
    cluster, told = NatsCluster(tmp_path, max_file_store_bytes=12 * MiB), list[str]()
    try:
        await cluster.start_all()
        async with NatsBus(cluster.url) as bus, anyio.create_task_group() as tg:
            await until_answered(bus, f"STREAM.CREATE.{Stream.HISTORY}", history)
            await until_answered(bus, "STREAM.CREATE.FILLER", filler)
            for number in range(24):
                await bus.publish_stored("filler", bytes(256 * 1024), id=f"filler-{number}")
            acknowledged: list[str] = []

            async def work() -> None:
                last_seq = 0
                for number in range(300):
                    batch = [entry(f"{number}-{place}") for place in range(1 + number % 3)]
                    last_seq = await append_surely(bus, "sublet.fact.w.>", batch, last_seq=last_seq, hold=hold)
                    acknowledged.extend(one.id for one in batch)

            def hold(_: str, why: str) -> None:
                if why:
                    told.append(why)

            tg.start_soon(work)
            with anyio.fail_after(60):
                while not told:
                    await anyio.sleep(0.05)
            assert "store is full" in told[0]
            assert len(acknowledged) < 600
            await until_answered(bus, "STREAM.DELETE.FILLER", {})
            with anyio.fail_after(60):
                while len(acknowledged) < 600:
                    await anyio.sleep(0.05)
            assert acknowledged == [stored.id async for stored in read_all(bus, ["sublet.fact.w.>"])]
    finally:
        cluster.kill_all()


def entry(entry_id: str) -> Entry:
    return Entry(
        subject="sublet.fact.w.x", body=bytes(20_000), id=entry_id, cause_seq=0, cursor_seq=0, previous_hash="0"
    )


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
    assert max(outcome.gaps_s) < 60.0, said

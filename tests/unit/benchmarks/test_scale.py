"""The stand-in node agents of the scale benchmark, and the pure core among them."""

import json
from pathlib import Path

import anyio
import pytest

from benchmarks import scale
from benchmarks.scale_agents import StandIn, StandIns
from benchmarks.scale_core import CoreAlone
from benchmarks.scale_stage import training
from kit.bus import Entry
from kit.bus_memory import MemoryBus, MemoryServer
from kit.processor import CHAIN_START, chain_hash
from schemas.catalogue import decode, encode
from schemas.messages import Fact, fact_subject, prefix_of
from schemas.nodes import LeaseGranted, LeaseReleased, NodeJoined, ReplicaReady
from schemas.placement import (
    GangAbandoned,
    GangCommitted,
    PlacementFact,
    PlacementProposed,
    ReleaseProposed,
    ReplicaProposal,
    ShareProposal,
)
from schemas.units import GiB

pytestmark = pytest.mark.anyio


def proposed(*names: str, node: int = 0, gang_id: str = "") -> PlacementProposed:
    replicas = tuple(
        ReplicaProposal(
            replica_id=name,
            deployment_id=f"d-{name}",
            tenant="default",
            deployment=training(name),
            shares=(
                ShareProposal(
                    replica_id=name, shard_index=0, gpu_uuid=f"GPU-{node}-0", request_bytes=GiB, limit_bytes=GiB
                ),
            ),
        )
        for name in names
    )
    return PlacementProposed(
        at_s=0.0, proposal_id=f"p-{names[0]}", node=f"node-{node}", replicas=replicas, reason="", gang_id=gang_id
    )


def stand_in() -> StandIn:
    return StandIn(0, now_s=lambda: 0.0)


def taken(node: StandIn) -> list[Fact]:
    facts = [decode(entry.body) for entry in node.take()[0]]
    assert all(isinstance(fact, Fact) for fact in facts)
    return facts  # type: ignore[return-value]


def test_a_proposal_is_answered_by_one_grant_and_all_that_is_ready_by_one_fact() -> None:
    node = stand_in()

    node.receive(proposed("a", "b"), 1)
    node.receive(proposed("c"), 2)

    first, second, ready = taken(node)
    assert isinstance(first, LeaseGranted)
    assert ["a", "b"] == [lease.replica_id for lease in first.leases]
    assert isinstance(second, LeaseGranted)
    assert second.proposal_id == "p-c"
    assert isinstance(ready, ReplicaReady)
    assert ["a", "b", "c"] == [one.replica_id for one in ready.replicas]
    assert not node.has_news


def test_a_gang_starts_when_it_is_committed_and_gives_its_leases_back_when_it_is_not() -> None:
    node = stand_in()
    node.receive(proposed("a", gang_id="g"), 1)
    node.receive(proposed("b", gang_id="h"), 2)
    assert [LeaseGranted, LeaseGranted] == [type(fact) for fact in taken(node)]

    node.receive(GangCommitted(at_s=0.0, node="node-0", gang_id="g", replica_ids=("a",)), 3)
    node.receive(GangAbandoned(at_s=0.0, node="node-0", gang_id="h", replica_ids=("b",), reason="no room"), 4)

    released, ready = taken(node)
    assert isinstance(released, LeaseReleased)
    assert released.replica_id == "b"
    assert isinstance(ready, ReplicaReady)
    assert ["a"] == [one.replica_id for one in ready.replicas]


def test_its_facts_continue_one_chain() -> None:
    node, last_hash = stand_in(), CHAIN_START
    node.join()
    entries = node.take()[0]
    node.receive(proposed("a"), 1)
    node.receive(ReleaseProposed(at_s=0.0, node="node-0", replica_id="a", reason="retired"), 2)
    entries += node.take()[0]

    for entry in entries:
        assert entry.previous_hash == last_hash
        last_hash = chain_hash(last_hash, id=entry.id, subject=entry.subject, body=entry.body)
    assert len(entries) == 5


async def test_on_a_bus_all_join_and_each_answers_under_its_own_prefix() -> None:
    server = MemoryServer()
    async with MemoryBus(server) as bus, MemoryBus(server) as placement:
        agents = StandIns(bus, 3)
        await agents.join()
        async with anyio.create_task_group() as tg:
            tg.start_soon(agents.serve)
            facts = [proposed("a", node=0), proposed("b", "c", node=2)]
            await placement.append(
                prefix_of("placement"), [_entry(n, fact) for n, fact in enumerate(facts)], last_seq=0
            )
            with anyio.fail_after(60):
                await agents.until(lambda seen: seen.ready_count == 3)
            tg.cancel_scope.cancel()
        joins = [await bus.last(prefix_of(f"node.node-{number}")) for number in range(3)]

    assert [ReplicaReady, NodeJoined, ReplicaReady] == [type(decode(stored.body)) for stored in joins if stored]
    assert {"a", "b", "c"} == set(agents.seen.ready_at_s)


def _entry(number: int, fact: PlacementFact) -> Entry:
    return Entry(
        subject=fact_subject("placement", fact),
        body=encode(fact),
        id=f"placement:test:{number}",
        cause_seq=0,
        cursor_seq=0,
        previous_hash="",
    )


def test_the_core_alone_fills_a_small_cluster() -> None:
    core = CoreAlone(2)

    core.deploy(16)

    assert core.proposed_count == 16
    assert all(replica.state == "resident" for replica in core.processor.state.replicas.values())


def test_a_wrong_folder_is_said_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        scale.main(["--json", str(tmp_path / "none" / "out.json")])

    assert stopped.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_quick_run_of_the_core_writes_its_figure(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    assert scale.main(["--only", "core", "--quick", "--json", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["figures"]["core_decisions_per_s"] > 0

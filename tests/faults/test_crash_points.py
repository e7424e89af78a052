"""Every service in its real shell, killed at every step, twice, or taken for dead while it only stood still.

The calm run of a story gives the list of points; each one is tried in a run of its own. `make test` tries a sample with
every step of every service; SUBLET_CRASH_POINTS=kinds tries every step with every kind of input and outcome, and
SUBLET_CRASH_POINTS=all every single point (some 11,000 runs). Those two are spread over all processors.
"""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

from kit.bus import Entry
from kit.bus_memory import MemoryServer
from kit.processor import CHAIN_START, chain_hash
from schemas.catalogue import encode
from schemas.inbox import DeployRequested, RetireRequested
from schemas.messages import fact_subject, prefix_of
from schemas.nodes import LeaseRefused
from schemas.placement import DeploymentRetired, PlacementProposed, ReplicaProposal, ShareProposal
from tests.faults import virtual_time
from tests.faults.mortal import IN_FLIGHT, STORED, Point
from tests.faults.mortal_fleet import AGENT, NODE, TENANT, WRITERS, Fleet, running
from tests.faults.spread import failures
from tests.faults.stories import spec
from tests.faults.telling import calm, expect_calm, tell

EXTENT = os.environ.get("SUBLET_CRASH_POINTS", "sample")
assert EXTENT in {"sample", "kinds", "all"}, "SUBLET_CRASH_POINTS is sample, kinds or all"
PROCESS_COUNT = 1 if EXTENT == "sample" else len(os.sched_getaffinity(0))
SAMPLED_OF = 12
"""One of so many kinds is tried at each step, beside the step's first."""


def points(writer: str) -> list[Point]:
    """Where to try it."""
    return chosen(calm().members[writer].passed[0])


def chosen(passed: Sequence[Point], extent: str = EXTENT) -> list[Point]:
    if extent == "all":
        return list(passed)
    kinds = list({(point.step, point.kind): point for point in reversed(passed)}.values())
    if extent == "kinds":
        return kinds
    first = {point.step: point for point in reversed(kinds)}
    if extent == "steps":
        return list(first.values())
    return [p for p in kinds if p is first[p.step] or zlib.crc32(str(p).encode()) % SAMPLED_OF == 0]


def try_each(tries: Sequence[Any], attempt: Callable[[Any], None]) -> None:
    """All of them, so that one report names every point that fails."""
    assert tries
    calm()  # Here, so that a forked process has it already.
    failed = failures(tries, attempt, process_count=PROCESS_COUNT)
    assert not failed, "\n".join(f"{point}: {error}" for point, error in failed.items())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_any_step_it_comes_back_and_the_story_ends_alike(writer: str) -> None:
    def attempt(point: Point) -> None:
        fleet = tell(kills={writer: (point,)})
        assert [point] == fleet.members[writer].killed_at
        expect_calm(fleet)

    try_each(points(writer), attempt)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_again_while_it_recovers(writer: str) -> None:
    """First in the middle of an append, with an effect or an order out; then at every step of taking over."""
    found = [p for p in points(writer) if p.step in (IN_FLIGHT, STORED, "released", "journaled")]
    firsts = found if EXTENT == "all" else found[len(found) // 2 :][:1]
    pairs = []
    for first in firsts:
        second_life = tell(kills={writer: (first,)}).members[writer].passed[1]
        recovery = second_life[: 1 + [p.step for p in second_life].index("subscribed")]
        seconds = (
            chosen(recovery, "steps")[WRITERS.index(writer) % 2 :: 2]
            if EXTENT == "sample"
            else chosen(recovery, "kinds")
        )
        pairs += [(first, second) for second in seconds]

    def attempt(pair: tuple[Point, Point]) -> None:
        fleet = tell(kills={writer: pair})
        assert list(pair) == fleet.members[writer].killed_at
        expect_calm(fleet)

    try_each(pairs, attempt)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("writer", [w for w in WRITERS if w != AGENT])
def test_one_that_only_stood_still_gives_way_to_its_successor(writer: str) -> None:
    """Stopped (SIGSTOP) until another instance has taken over, it goes on with what it had in hand, and rebuilds."""

    def attempt(point: Point) -> None:
        fleet = tell(freeze=(writer, point))
        first = fleet.members[writer]
        assert 1 == first.frozen_count
        assert first.runner is not None
        assert 1 <= first.runner.status.rebuilt_count, "it never noticed"
        expect_calm(fleet)

    tried = chosen(before_farewell(calm().members[writer].passed[0]))
    try_each(tried[::4] if EXTENT == "sample" else tried, attempt)


def before_farewell(passed: Sequence[Point]) -> list[Point]:
    """Without the snapshot at the clean end of the story: who is stopped in it ends anyway, and nobody succeeds it."""
    tried = list(passed)
    while tried and tried[-1].kind.startswith("sublet snapshot "):
        tried.pop()
    return tried


RETIREMENT = DeploymentRetired(at_s=0.0, inbox_seq=1, command_id="x", tenant=TENANT, deployment_id="d1", model="a")
STRANGE = {
    "a fact of another chain": (encode(RETIREMENT), False),
    "no JSON": (b"{not json", True),
    "no JSON, of another chain": (b"{not json", False),
    "no fact": (encode(RetireRequested(command_id="x", model="a")), True),
}
"""{what: its bytes, and whether they continue the writer's chain}"""


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", STRANGE)
def test_what_a_stranger_puts_under_a_prefix_is_left_out_by_all(kind: str, writer: str) -> None:
    """The writer rebuilds itself and goes on; whoever reads it goes on reading it."""

    async def intrude(fleet: Fleet) -> None:
        await anyio.sleep(3.0)
        runner = fleet.members[writer].runner
        assert runner is not None
        assert runner.processor is not None
        body, continues = STRANGE[kind]
        fleet.intrude(writer, body, previous_hash=runner.processor.last_hash if continues else "another")

    fleet = tell(beside=intrude)

    first = fleet.members[writer]
    assert first.runner is not None
    assert 1 == first.runner.status.rebuilt_count
    expect_calm(fleet)


@pytest.mark.timeout(900)
def test_a_batch_larger_than_one_append_is_committed_in_parts_whoever_dies_in_between() -> None:
    """450 wishes arrive during one slow append, and each has its fact: they do not fit into one batch."""

    def flood(kills: tuple[Point, ...]) -> Fleet:
        async def story() -> Fleet:
            async with running({"placement": kills}, writers=("placement",), append_s=0.5) as fleet:
                for number in range(450):
                    wish = spec(f"m{number}", 0.5)
                    await fleet.command(DeployRequested(command_id=f"c{number}", deployment=wish))
                await fleet.until(lambda: 450 == len(fleet.commands_named()), what="all are in history")
                fleet.check_history()
                fleet.check_commands()
                fleet.check_replay(fleet.members["placement"])
                return fleet

        return virtual_time.run(story)

    passed = flood(()).members["placement"].passed[0]
    large = [p for p in passed if p.step in ("committing", IN_FLIGHT, STORED, "committed") and "and more" in p.kind]
    assert 2 <= len([p for p in large if p.step == "committing"]), large

    def attempt(point: Point) -> None:
        assert [point] == flood((point,)).members["placement"].killed_at

    try_each(large[::3] if EXTENT == "sample" else large, attempt)


@pytest.mark.timeout(900)
def test_a_backlog_larger_than_one_append_is_handled_once_whoever_dies_in_between() -> None:
    """410 proposals came while the agent was away: it answers each once, over two appends of its take-over."""

    def catch_up(kills: tuple[Point, ...]) -> Fleet:
        async def story() -> Fleet:
            async with running({AGENT: kills}, writers=(AGENT,), begin=_propose_many) as fleet:
                await fleet.until(lambda: bool(fleet.agent.gpus), what="the node is known")
                answers = Counter(f.proposal_id for _, f in fleet.facts if isinstance(f, LeaseRefused))
                assert {f"p{number}": 1 for number in range(410)} == answers
                fleet.check_history()
                fleet.check_replay(fleet.members[AGENT])
                return fleet

        return virtual_time.run(story)

    life = catch_up(()).members[AGENT].passed[0]
    recovery = life[: 1 + [p.step for p in life].index("subscribed")]
    assert 2 == len([p for p in recovery if p.step == "committing"]), recovery

    def attempt(point: Point) -> None:
        assert [point] == catch_up((point,)).members[AGENT].killed_at

    try_each(chosen(recovery, "steps")[::3] if EXTENT == "sample" else recovery, attempt)


def _propose_many(server: MemoryServer) -> None:
    """Facts of a placement that believes in a GPU which this node does not have."""
    previous_hash = CHAIN_START
    entries = []
    for number in range(410):
        share = ShareProposal(
            replica_id=f"r{number}", shard_index=0, gpu_uuid="GPU-elsewhere", request_bytes=1, limit_bytes=1
        )
        replica = ReplicaProposal(
            replica_id=f"r{number}", deployment_id=f"d{number}", tenant="t", deployment=spec("m", 0.1), shares=(share,)
        )
        fact = PlacementProposed(
            at_s=0.0, proposal_id=f"p{number}", node=NODE, replicas=(replica,), reason="", alternatives=()
        )
        subject, body, name = fact_subject("placement", fact), encode(fact), f"placement:x:{number}"
        entries.append(
            Entry(subject=subject, body=body, id=name, cause_seq=0, cursor_seq=0, previous_hash=previous_hash)
        )
        previous_hash = chain_hash(previous_hash, id=name, subject=subject, body=body)
    server.append(prefix_of("placement"), entries, 0)

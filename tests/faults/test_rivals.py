"""Two instances that each believe to be the one writer: history stays one line, whoever wins."""

import random
from collections.abc import Sequence

import pytest

from benchmarks.bus_rivals import figures_of, race
from benchmarks.ledger import oracle
from kit.bus import Stored
from kit.bus_nats import NatsBus
from kit.nats_server import NatsServer, ensure_streams
from kit.processor import CHAIN_START, chain_hash
from tests.fixtures.nats import own_nats_server

__all__ = ["own_nats_server"]


@pytest.mark.nats
@pytest.mark.anyio
async def test_rivals_never_write_two_facts_in_one_place(own_nats_server: NatsServer) -> None:
    async with NatsBus(own_nats_server.url) as bus:
        await ensure_streams(bus)

    async def kill() -> None:
        own_nats_server.kill()
        await own_nats_server.start_async()

    outcome = await race(own_nats_server.url, rounds=240, kill=kill, kill_every=random.randint(40, 60))

    figures = figures_of(outcome)
    assert [] == outcome.problems
    assert (0, 0) == (figures["race_both_won_count"], figures["race_skipped_count"])
    assert min(outcome.won.values()) > 0
    assert 240 == outcome.won["a"] + outcome.won["b"]


def chain(ids: Sequence[str]) -> list[Stored]:
    previous = CHAIN_START
    facts = []
    for seq, entry_id in enumerate(ids, start=1):
        facts.append(
            Stored(seq=seq, time_s=0, subject="sublet.fact.w.x", body=b"", id=entry_id, previous_hash=previous)
        )
        previous = chain_hash(previous, id=entry_id, subject="sublet.fact.w.x", body=b"")
    return facts


def test_the_oracle_finds_what_it_is_there_for() -> None:
    good = chain(["a", "b", "c"])
    rival = Stored(seq=4, time_s=0, subject="sublet.fact.w.x", body=b"", id="z", previous_hash=good[1].previous_hash)
    assert [] == oracle(good)
    assert ["z does not continue the facts before it"] == oracle([*good, rival])
    assert ["c is there twice"] == oracle([*good, good[2]])

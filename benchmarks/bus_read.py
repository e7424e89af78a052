"""An ordered read of a whole stream: ours to typed facts, nats-py's ordered consumer to bytes.

Both read the same stream of facts with their three headers, from the first to the last. Ours parses ids, causes and
hashes from the headers and decodes each body to its class; the other calls back with each message (it parses headers
too, into a dict) and counts. nats-py: ``subscribe(ordered_consumer=True, cb=...)`` with its defaults. The stream is in
the server's memory.
"""

import statistics
import time
from contextlib import aclosing
from typing import Final

import anyio
from nats.aio.msg import Msg

from benchmarks.bus_publish import in_memory
from benchmarks.bus_sides import PREFIX, Raw, entry, ratio, raw, server
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus import APPEND_ENTRIES_MAX, Bus, CaughtUp, Stream
from kit.bus_nats import NatsBus
from schemas.catalogue import decode
from schemas.nodes import ReplicaResident

BARS: Final = (Wanted(figure="read_ratio", op=">=", bar=1.0),)
ROUND_TIMEOUT_S: Final = 120.0


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    count, rounds = setting.count(50_000, 2000), setting.count(5, 2)
    ours_s: list[float] = []
    theirs_s: list[float] = []
    async with (
        server(setting.folder, streams=in_memory()) as started,
        NatsBus(started.url) as bus,
        raw(started.url) as other,
        setting.progress.showing(lambda: f"rounds {len(theirs_s)}/{rounds}"),
    ):
        await _fill(bus, count)
        await _ours(bus, count)
        await _theirs(other, count)
        for _ in range(rounds):
            ours_s.append(await _ours(bus, count))
            theirs_s.append(await _theirs(other, count))
    figures: dict[str, Value] = {
        "read_facts_per_s": round(count / statistics.median(ours_s)),
        "read_raw_messages_per_s": round(count / statistics.median(theirs_s)),
        "read_ratio": ratio(theirs_s, ours_s),
    }
    return Measured(figures=figures)


async def _fill(bus: Bus, count: int) -> None:
    last_seq = 0
    while last_seq < count:
        size = min(APPEND_ENTRIES_MAX, count - last_seq)
        batch = [entry(last_seq + number) for number in range(size)]
        last_seq = (await bus.append(PREFIX, batch, last_seq=last_seq)).last_seq


async def _ours(bus: Bus, count: int) -> float:
    """Seconds until the last fact is decoded."""
    facts = 0
    began_s = time.perf_counter()
    with anyio.fail_after(ROUND_TIMEOUT_S):
        async with aclosing(bus.read(Stream.HISTORY, ["sublet.fact.>"], after_seq=0)) as reading:
            async for item in reading:
                if isinstance(item, CaughtUp):
                    break
                facts += isinstance(decode(item.body), ReplicaResident)
    assert facts == count, facts
    return time.perf_counter() - began_s


async def _theirs(other: Raw, count: int) -> float:
    """Seconds until the last message was handed over."""
    done = anyio.Event()
    messages = 0

    async def receive(_message: Msg) -> None:
        nonlocal messages
        messages += 1
        if messages == count:
            done.set()

    began_s = time.perf_counter()
    subscription = await other.js.subscribe("sublet.fact.>", ordered_consumer=True, cb=receive)
    with anyio.fail_after(ROUND_TIMEOUT_S):
        await done.wait()
    took_s = time.perf_counter() - began_s
    await subscription.unsubscribe()
    return took_s

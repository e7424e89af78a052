"""One checked append after the other, awaited, beside ``js.publish`` of ready bytes into the same stream.

The two take turns message by message. Ours encodes a fact, puts five headers on (the check by prefix takes two) and is
refused if another wrote; the other is the same 320 bytes without headers or check. The server syncs before it answers.
"""

import time
from typing import Final

from benchmarks.bus_sides import PREFIX, RAW_SUBJECT, entry, fact, raw, server, us
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus_nats import NatsBus
from schemas.catalogue import encode

BARS: Final = (Wanted(figure="append_ratio_p50", op="<=", bar=1.3),)
WARM_UP_COUNT: Final = 50


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    count = setting.count(2000, 100)
    ours_s: list[float] = []
    theirs_s: list[float] = []
    async with (
        server(setting.folder) as started,
        NatsBus(started.url) as bus,
        raw(started.url) as other,
        setting.progress.showing(lambda: f"appended {len(ours_s)}/{count}"),
    ):
        body = encode(fact(0))
        last_seq = 0
        for number in range(WARM_UP_COUNT + count):
            began_s = time.perf_counter()
            last_seq = (await bus.append(PREFIX, [entry(number)], last_seq=last_seq)).last_seq
            between_s = time.perf_counter()
            await other.js.publish(RAW_SUBJECT, body)
            if number >= WARM_UP_COUNT:
                ours_s.append(between_s - began_s)
                theirs_s.append(time.perf_counter() - between_s)
    figures: dict[str, Value] = {
        "append_us_p50": us(ours_s, 0.5),
        "append_us_p99": us(ours_s, 0.99),
        "append_raw_us_p50": us(theirs_s, 0.5),
        "append_raw_us_p99": us(theirs_s, 0.99),
        "append_ratio_p50": round(us(ours_s, 0.5) / us(theirs_s, 0.5), 3),
    }
    return Measured(figures=figures)

"""Many stored messages on their way at once: ours typed, with headers and a span each, beside nats-py's publish_async.

A window of `WINDOW` unacknowledged messages on each side. nats-py: ``publish_async`` of ready bytes without headers,
``publish_async_max_pending`` set to the window. Ours: so many tasks, each of which encodes a fact, opens a span and
awaits the acknowledgement before its next message; every message has its own deadline.

Two forms: `publish_stored` (an id and a trace, two headers, a command or a record) and `append` (each task a writer
with a prefix of its own, the three headers of a fact and the two of the check). The streams are in the server's memory:
on disk the disk would be measured. Sampled spans are recorded and batched as in the product, and exported to nowhere.
"""

import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final

import anyio
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from benchmarks.bus_sides import UNSAMPLED, Raw, entry, fact, ratio, raw, server
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus import Stream
from kit.bus_nats import NatsBus
from kit.nats_server import stream_configs
from kit.telemetry import Tracer, new_traceparent
from schemas.catalogue import encode
from schemas.messages import prefix_of

BARS: Final = (
    Wanted(figure="publish_ratio", op=">=", bar=1.0),
    Wanted(figure="publish_sampled_ratio", op=">=", bar=0.45),
    Wanted(figure="append_window_ratio", op=">=", bar=1.0),
    Wanted(figure="append_window_sampled_ratio", op=">=", bar=0.45),
)
WINDOW: Final = 512
RECORD_SUBJECT: Final = "sublet.record.bench"
RAW_RECORD_SUBJECT: Final = "sublet.record.raw"

Side = Callable[[int], Awaitable[None]]
"""Stores so many messages; done when all are acknowledged."""


class _Nowhere(SpanExporter):
    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def recording_tracer() -> Tracer:
    """Records every sampled span and exports it in batches, as the product does, to nowhere."""
    return Tracer(_Nowhere(), Resource.create({"service.name": "sublet-bench"}), root_ratio=1.0)


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    count, rounds = setting.count(10_000, 600), setting.count(7, 2)
    seconds: dict[str, list[float]] = {}
    tracer = recording_tracer()
    try:
        async with (
            server(setting.folder, streams=in_memory()) as started,
            NatsBus(started.url) as bus,
            raw(started.url, pending_max=WINDOW) as other,
            setting.progress.showing(lambda: f"rounds {len(seconds.get('append_sampled', ()))}/{rounds}"),
        ):
            last_seqs = [0] * WINDOW
            sides = _sides(bus, other, tracer, last_seqs)
            for side in sides.values():
                await side(count // 10)
            for _ in range(rounds):
                for stream in (Stream.HISTORY, Stream.RECORD):
                    await bus.api(f"STREAM.PURGE.{stream}")
                last_seqs[:] = [0] * WINDOW
                for name, side in sides.items():
                    began_s = time.perf_counter()
                    await side(count)
                    seconds.setdefault(name, []).append(time.perf_counter() - began_s)
    finally:
        tracer.shutdown()
    return Measured(figures={**_figures(count, seconds), "publish_dropped_spans_count": tracer.dropped_count})


def in_memory() -> list[dict[str, Any]]:
    """The product's streams of facts and records, in the server's memory."""
    used = [config for config in stream_configs() if config["name"] in (Stream.HISTORY, Stream.RECORD)]
    return [{**config, "storage": "memory"} for config in used]


def _sides(bus: NatsBus, other: Raw, tracer: Tracer, last_seqs: list[int]) -> dict[str, Side]:
    numbers = itertools.count()

    def storing(traceparent: str) -> Side:
        async def store(number: int) -> None:
            with tracer.span("store", parent=traceparent) as span:
                body = encode(fact(number))
                await bus.publish_stored(RECORD_SUBJECT, body, id=f"bench:{number}", traceparent=span.traceparent)

        return lambda count: _windowed(itertools.islice(numbers, count), lambda _, number: store(number))

    def appending(traceparent: str) -> Side:
        async def append(task: int, number: int) -> None:
            writer = f"node.w{task}"
            with tracer.span("append", parent=traceparent) as span:
                made = entry(number, writer=writer, traceparent=span.traceparent)
                stored = await bus.append(prefix_of(writer), [made], last_seq=last_seqs[task])
            last_seqs[task] = stored.last_seq

        return lambda count: _windowed(itertools.islice(numbers, count), append)

    sampled = new_traceparent(is_sampled=True)
    body = encode(fact(0))
    return {
        "publish_raw": lambda count: _raw(other, RAW_RECORD_SUBJECT, body, count),
        "publish": storing(UNSAMPLED),
        "publish_sampled": storing(sampled),
        "append_raw": lambda count: _raw(other, "sublet.fact.raw.bench_v1", body, count),
        "append": appending(UNSAMPLED),
        "append_sampled": appending(sampled),
    }


async def _raw(other: Raw, subject: str, body: bytes, count: int) -> None:
    for _ in range(count):
        await other.js.publish_async(subject, body)
    await other.js.publish_async_completed()


async def _windowed(numbers: Iterator[int], store: Callable[[int, int], Awaitable[None]]) -> None:
    async def work(task: int) -> None:
        for number in numbers:
            await store(task, number)

    async with anyio.create_task_group() as tg:
        for task in range(WINDOW):
            tg.start_soon(work, task)


def _figures(count: int, seconds: dict[str, list[float]]) -> dict[str, Value]:
    def rate(name: str) -> float:
        return round(count / statistics.median(seconds[name]))

    return {
        "publish_raw_per_s": rate("publish_raw"),
        "publish_per_s": rate("publish"),
        "publish_sampled_per_s": rate("publish_sampled"),
        "append_window_raw_per_s": rate("append_raw"),
        "append_window_per_s": rate("append"),
        "append_window_sampled_per_s": rate("append_sampled"),
        # Of rates: theirs in seconds over ours.
        "publish_ratio": ratio(seconds["publish_raw"], seconds["publish"]),
        "publish_sampled_ratio": ratio(seconds["publish_raw"], seconds["publish_sampled"]),
        "append_window_ratio": ratio(seconds["append_raw"], seconds["append"]),
        "append_window_sampled_ratio": ratio(seconds["append_raw"], seconds["append_sampled"]),
    }

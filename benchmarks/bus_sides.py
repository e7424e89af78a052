"""The two sides of the bus's comparisons: our bus, and nats-py as its users have it, on one server of their own.

Both connect with the same settings. nats-py is given bytes that are ready, without headers unless a section says so;
our side makes its bytes from a message, and puts its headers on, inside the measured time.
"""

import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nats
from nats.aio.client import Client
from nats.js import JetStreamContext

from benchmarks.report import quantile
from kit.bus import Entry
from kit.bus_nats import PING_INTERVAL_S, PINGS_OUTSTANDING_MAX, RECONNECT_WAIT_S, NatsBus
from kit.nats_server import NatsServer, ServerConfig, ensure_streams
from kit.telemetry import new_traceparent
from schemas.catalogue import encode
from schemas.messages import fact_subject, prefix_of
from schemas.nodes import ReplicaResident

WRITER: Final = "node.bench"
PREFIX: Final = prefix_of(WRITER)
RAW_SUBJECT: Final = "sublet.fact.raw.replica_resident_v1"
"""Where nats-py publishes: the same stream, a prefix of its own."""
PREVIOUS_HASH: Final = "0123456789abcdef0123456789abcdef"
UNSAMPLED: Final = new_traceparent(is_sampled=False)


def fact(number: int) -> ReplicaResident:
    """A fact of the usual size: about 320 bytes."""
    return ReplicaResident(
        at_s=1_790_000_000.0 + number / 1000,
        node="bench",
        replica_id=f"r-{number:08d}",
        deployment_id="d-0123456789abcdef",
        model="org/model-7b-instruct",
        wake_epoch=number,
        endpoint="http://127.0.0.1:41234",
        copied_bytes=14_500_000_000,
        reserve_s=0.0123,
        restore_s=0.4567,
        verify_s=0.0456,
        wake_s=0.5146,
    )


def entry(number: int, *, writer: str = WRITER, traceparent: str = UNSAMPLED) -> Entry:
    """The fact on its way into history, with the three headers that every traced fact has."""
    made = fact(number)
    return Entry(
        subject=fact_subject(writer, made),
        body=encode(made),
        id=f"{writer}:1-1:{number}",
        cause_seq=number,
        cursor_seq=number,
        previous_hash=PREVIOUS_HASH,
        traceparent=traceparent,
    )


@asynccontextmanager
async def server(folder: Path, *, streams: Sequence[Mapping[str, Any]] = ()) -> AsyncIterator[NatsServer]:
    """A server as the product runs it (``sync_interval: always``), with the product's streams, or with these."""
    async with NatsServer(folder / "nats", ServerConfig(store_directory=folder / "store")) as started:
        async with NatsBus(started.url) as bus:
            for config in streams:
                await bus.api(f"STREAM.CREATE.{config['name']}", config)
            if not streams:
                await ensure_streams(bus)
        yield started


@dataclass(frozen=True, slots=True)
class Raw:
    """nats-py's side."""

    client: Client
    js: JetStreamContext


@asynccontextmanager
async def raw(url: str, *, pending_max: int = 4000) -> AsyncIterator[Raw]:
    """nats-py with our connection settings; at most `pending_max` acknowledgements of `publish_async` outstanding."""
    client = await nats.connect(
        url,
        ping_interval=PING_INTERVAL_S,
        max_outstanding_pings=PINGS_OUTSTANDING_MAX,
        reconnect_time_wait=RECONNECT_WAIT_S,
        max_reconnect_attempts=-1,
    )
    try:
        yield Raw(client, client.jetstream(publish_async_max_pending=pending_max))
    finally:
        await client.close()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios: a slow moment of the machine meets one round, of both."""
    return round(statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)), 3)


def us(values_s: Sequence[float], fraction: float) -> float:
    """The quantile of times, in microseconds with one digit."""
    return round((quantile(values_s, fraction) or 0.0) * 1e6, 1)

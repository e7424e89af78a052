"""A hundred SIGKILLs of the server under load: what was acknowledged is there once, and everybody goes on.

Several writers append with their checks (`kit.history.append_surely`), some alone and some in batches, others publish
stored messages, and readers follow, while the server is killed and started again about once a second. Then the streams
are read from their beginning and compared with what each caller was told.
"""

import bisect
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import anyio
from anyio.abc import TaskGroup

from benchmarks.bus_sides import entry, fact, server
from benchmarks.report import Value, quantile
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus import Bus, CaughtUp, Entry, Stored, Stream
from kit.bus_nats import NatsBus
from kit.history import append_surely
from kit.nats_server import NatsServer
from schemas.catalogue import encode
from schemas.messages import prefix_of

WRITER_COUNT: Final = 4
PUBLISHER_COUNT: Final = 4
READER_COUNT: Final = 2
UP_S: Final = (0.5, 1.0)
"""Between the server's return and the next kill, at random between these."""
DOWN_S: Final = 0.1
PATIENCE_S: Final = 10.0
"""After the last return; who still waits then is unresolved."""
CATCH_UP_S: Final = 60.0

BARS: Final = (
    Wanted(figure="kill_count", op=">=", bar=100),
    Wanted(figure="kill_lost_count", op="==", bar=0),
    Wanted(figure="kill_stored_twice_count", op="==", bar=0),
    Wanted(figure="kill_unresolved_count", op="==", bar=0),
    Wanted(figure="kill_failed_calls_count", op="==", bar=0),
    Wanted(figure="kill_reader_faults_count", op="==", bar=0),
    Wanted(figure="kill_blind_s_worst", op="<=", bar=2.0),
)


@dataclass(slots=True)
class Follower:
    """What one reader saw of one stream."""

    stream: Stream
    seqs: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Ledger:
    """What every caller was told. Times are of `time.monotonic`."""

    acknowledged: dict[str, int] = field(default_factory=dict)
    """{id: sequence}, of facts and stored messages."""
    acknowledged_at_s: list[float] = field(default_factory=list)
    """Of appends."""
    followers: list[Follower] = field(default_factory=list)
    killed_at_s: list[float] = field(default_factory=list)
    back_at_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    waiting_count: int = 0
    is_over: bool = False


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    kills = setting.count(100, 2)
    ledger = Ledger()
    unresolved_count: list[int] = []
    async with server(setting.folder) as started:
        async with (
            NatsBus(started.url, name="writers") as writers,
            NatsBus(started.url, name="publishers") as publishers,
            NatsBus(started.url, name="readers") as readers,
            setting.progress.showing(lambda: _progress(ledger, kills)),
            anyio.create_task_group() as tg,
        ):
            _start(tg, ledger, writers, publishers, readers)
            await _kill(started, ledger, kills)
            await _settle(ledger)
            unresolved_count.append(ledger.waiting_count)
            tg.cancel_scope.cancel()
        figures = await _judged(started, ledger, unresolved_count[0])
    return Measured(figures=figures, notes=_notes(ledger))


def _start(tg: TaskGroup, ledger: Ledger, writers: Bus, publishers: Bus, readers: Bus) -> None:
    for number in range(READER_COUNT):
        stream = (Stream.HISTORY, Stream.INBOX)[number % 2]
        follower = Follower(stream)
        ledger.followers.append(follower)
        tg.start_soon(_follow, readers, follower)
    for number in range(WRITER_COUNT):
        tg.start_soon(_write, writers, ledger, f"node.w{number}", number)
    for number in range(PUBLISHER_COUNT):
        tg.start_soon(_publish, publishers, ledger, number)


async def _write(bus: Bus, ledger: Ledger, writer: str, extra: int) -> None:
    """Appends 1 to `extra` + 1 facts at a time."""
    last_seq = count = 0
    while not ledger.is_over:
        batch = [entry(count + part, writer=writer) for part in range(1 + count % (extra + 1))]
        count += len(batch)

        async def append(batch: list[Entry] = batch, last_seq: int = last_seq) -> int:
            return await append_surely(bus, prefix_of(writer), batch, last_seq=last_seq)

        seq = await _told(ledger, append)
        if seq is None:
            return
        last_seq = seq
        for part, stored in enumerate(batch):
            ledger.acknowledged[stored.id] = last_seq - len(batch) + 1 + part
        ledger.acknowledged_at_s.append(time.monotonic())


async def _publish(bus: Bus, ledger: Ledger, publisher: int) -> None:
    count = 0
    while not ledger.is_over:
        id_ = f"command-{publisher}-{count}"
        count += 1

        async def publish(id_: str = id_, count: int = count) -> int:
            return await bus.publish_stored("sublet.in.bench.deploy", encode(fact(count)), id=id_)

        seq = await _told(ledger, publish)
        if seq is not None:
            ledger.acknowledged[id_] = seq


async def _told(ledger: Ledger, call: Callable[[], Awaitable[int]]) -> int | None:
    """What the call answered; a failure is counted. While it runs, it counts as waiting."""
    ledger.waiting_count += 1
    try:
        return await call()
    except Exception as error:  # noqa: BLE001  (any failure of a caller is a finding)
        ledger.failures[f"{type(error).__name__}: {error}"] += 1
        return None
    finally:
        ledger.waiting_count -= 1


async def _follow(bus: Bus, follower: Follower) -> None:
    filters = {Stream.HISTORY: "sublet.fact.>", Stream.INBOX: "sublet.in.>"}[follower.stream]
    async with aclosing(bus.read(follower.stream, [filters], after_seq=0)) as reading:
        async for item in reading:
            if isinstance(item, Stored):
                follower.seqs.append(item.seq)
                follower.at_s.append(time.monotonic())


async def _kill(started: NatsServer, ledger: Ledger, kills: int) -> None:
    chosen = random.Random(7)
    for _ in range(kills):
        await anyio.sleep(chosen.uniform(*UP_S))
        ledger.killed_at_s.append(time.monotonic())
        started.kill()
        await anyio.sleep(DOWN_S)
        await started.start_async()
        ledger.back_at_s.append(time.monotonic())
    await anyio.sleep(UP_S[1])


async def _settle(ledger: Ledger) -> None:
    """Until every call has ended, and every reader has seen all that was acknowledged."""
    ledger.is_over = True
    with anyio.move_on_after(PATIENCE_S):
        while ledger.waiting_count:  # noqa: ASYNC110  (a counter, not an event)
            await anyio.sleep(0.05)
    with anyio.move_on_after(CATCH_UP_S):
        while not _all_seen(ledger):  # noqa: ASYNC110  (the same)
            await anyio.sleep(0.05)


def _all_seen(ledger: Ledger) -> bool:
    return all(follower.seqs[-1:] == [_newest(ledger, follower.stream)] for follower in ledger.followers)


def _newest(ledger: Ledger, stream: Stream) -> int:
    is_command = stream is Stream.INBOX
    return max(seq for id_, seq in ledger.acknowledged.items() if id_.startswith("command-") == is_command)


async def _judged(started: NatsServer, ledger: Ledger, unresolved_count: int) -> dict[str, Value]:
    async with NatsBus(started.url) as bus:
        stored = {stream: await _all_of(bus, stream) for stream in (Stream.HISTORY, Stream.INBOX)}
    return {**verdict(ledger, stored, unresolved_count=unresolved_count), **_times(ledger)}


def verdict(ledger: Ledger, stored: Mapping[Stream, Sequence[Stored]], *, unresolved_count: int) -> dict[str, Value]:
    """What the streams hold, against what callers were told and readers saw."""
    ids = Counter(item.id for items in stored.values() for item in items)
    at = {(item.id, item.seq) for items in stored.values() for item in items}
    faults = 0
    for follower in ledger.followers:
        faults += abs(len(follower.seqs) - len(stored[follower.stream]))
        faults += sum(seen != item.seq for seen, item in zip(follower.seqs, stored[follower.stream], strict=False))
    return {
        "kill_count": len(ledger.killed_at_s),
        "kill_acknowledged_count": len(ledger.acknowledged),
        "kill_stored_count": ids.total(),
        "kill_lost_count": sum(told not in at for told in ledger.acknowledged.items()),
        "kill_stored_twice_count": sum(count > 1 for count in ids.values()),
        "kill_unresolved_count": unresolved_count,
        "kill_failed_calls_count": ledger.failures.total(),
        "kill_reader_faults_count": faults,
    }


def _times(ledger: Ledger) -> dict[str, Value]:
    gaps_s = [_first_after(ledger.acknowledged_at_s, killed_s) - killed_s for killed_s in ledger.killed_at_s]
    blind_s = [
        _first_after(follower.at_s, back_s) - back_s for follower in ledger.followers for back_s in ledger.back_at_s
    ]
    return {
        "kill_append_gap_s_p50": _rounded(quantile(gaps_s, 0.5)),
        "kill_append_gap_s_worst": _rounded(max(gaps_s)),
        "kill_blind_s_p50": _rounded(quantile(blind_s, 0.5)),
        "kill_blind_s_worst": _rounded(max(blind_s)),
    }


async def _all_of(bus: Bus, stream: Stream) -> list[Stored]:
    found: list[Stored] = []
    filters = {Stream.HISTORY: "sublet.fact.>", Stream.INBOX: "sublet.in.>"}[stream]
    with anyio.fail_after(CATCH_UP_S):
        async with aclosing(bus.read(stream, [filters], after_seq=0)) as reading:
            async for item in reading:
                if isinstance(item, CaughtUp):
                    return found
                found.append(item)
    raise AssertionError("a reading ends only when it is closed")


def _first_after(times_s: list[float], moment_s: float) -> float:
    """The first of these (ascending) times behind the moment; infinite when there is none."""
    at = bisect.bisect_right(times_s, moment_s)
    return times_s[at] if at < len(times_s) else float("inf")


def _rounded(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else round(value, 3)


def _progress(ledger: Ledger, kills: int) -> str:
    return f"kills {len(ledger.killed_at_s)}/{kills}  acknowledged {len(ledger.acknowledged)}"


def _notes(ledger: Ledger) -> list[str]:
    return [f"Calls that failed: {count} x {text}." for text, count in ledger.failures.most_common(5)]

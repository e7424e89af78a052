"""What every bus must do, written once. Each implementation inherits `BusSuite` and says how to connect."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import ClassVar

import anyio
import pytest

from kit.bus import (
    AppendConflict,
    Bus,
    CaughtUp,
    Entry,
    HistoryGone,
    NoAnswer,
    Reading,
    Received,
    Stored,
    Stream,
    subject_matches,
)

PREFIX = "sublet.fact.placement.>"
OTHER_PREFIX = "sublet.fact.swapper.>"
ALL_FACTS = ["sublet.fact.>"]
PATIENCE_S = 60.0

Connect = Callable[[str], Awaitable[Bus]]


def entry(id: str, *, subject: str = "sublet.fact.placement.planned", body: bytes = b"{}", **more: object) -> Entry:
    known: dict[str, object] = {"cause_seq": 0, "cursor_seq": 0, "previous_hash": "", **more}
    return Entry(subject=subject, body=body, id=id, **known)  # type: ignore[arg-type]


def entries(*ids: str, subject: str = "sublet.fact.placement.planned") -> list[Entry]:
    return [entry(id, subject=subject) for id in ids]


async def taken(reading: Reading, count: int) -> list[Stored | CaughtUp]:
    with anyio.fail_after(PATIENCE_S):
        return [await reading.__anext__() for _ in range(count)]


async def read_to_end(
    bus: Bus, stream: Stream, filters: Sequence[str], *, after_seq: int = 0, stream_id: str = ""
) -> tuple[list[Stored], CaughtUp]:
    found: list[Stored] = []
    with anyio.fail_after(PATIENCE_S):
        async with aclosing(bus.read(stream, filters, after_seq=after_seq, stream_id=stream_id)) as reading:
            async for item in reading:
                if isinstance(item, CaughtUp):
                    return found, item
                found.append(item)
    raise AssertionError("a reading ends only when it is closed")


def ids(items: Sequence[Stored | CaughtUp]) -> list[str]:
    return [item.id if isinstance(item, Stored) else "caught up" for item in items]


class Inbox:
    """Collects what a subscription receives."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._changed = anyio.Event()

    def __call__(self, received: Received) -> None:
        self.received.append(received)
        self._changed.set()

    async def until(self, count: int) -> list[Received]:
        with anyio.fail_after(PATIENCE_S):
            while len(self.received) < count:
                self._changed = anyio.Event()
                await self._changed.wait()
        return self.received


class BusSuite:
    """`connect(name)` gives a new connection to the same, initially empty server."""

    pytestmark: ClassVar = [pytest.mark.anyio]

    @pytest.fixture
    def connect(self) -> Connect:
        raise NotImplementedError

    @pytest.fixture
    async def bus(self, connect: Connect) -> Bus:
        return await connect("first")

    @pytest.fixture
    async def other(self, connect: Connect) -> Bus:
        return await connect("second")

    # ---- append ------------------------------------------------------------------------------------------------

    async def test_an_append_at_the_known_end_is_stored(self, bus: Bus) -> None:
        first = await bus.append(PREFIX, entries("a"), last_seq=0)
        second = await bus.append(PREFIX, entries("b"), last_seq=first.last_seq)

        assert second.last_seq == first.last_seq + 1
        assert ids((await read_to_end(bus, Stream.HISTORY, ALL_FACTS))[0]) == ["a", "b"]

    async def test_everything_of_an_entry_is_read_back(self, bus: Bus) -> None:
        sent = entry(
            "id-1",
            body=b'{"x": "\xc3\xa4"}\r\n\x00',
            cause_seq=7,
            cursor_seq=12,
            previous_hash="abc",
            traceparent="00-a-b-01",
        )
        acknowledged = await bus.append(PREFIX, [sent], last_seq=0)

        [stored], _ = await read_to_end(bus, Stream.HISTORY, ALL_FACTS)

        assert stored.seq == acknowledged.last_seq
        assert stored.time_s > 0
        for name in ("subject", "body", "id", "cause_seq", "cursor_seq", "previous_hash", "traceparent"):
            assert getattr(sent, name) == getattr(stored, name), name

    async def test_an_append_behind_anothers_is_a_conflict(self, bus: Bus, other: Bus) -> None:
        await other.append(PREFIX, entries("theirs"), last_seq=0)

        with pytest.raises(AppendConflict):
            await bus.append(PREFIX, entries("mine"), last_seq=0)

        assert ids((await read_to_end(bus, Stream.HISTORY, ALL_FACTS))[0]) == ["theirs"]

    async def test_the_check_covers_every_subject_of_the_prefix_and_no_other(self, bus: Bus) -> None:
        await bus.append(OTHER_PREFIX, entries("x", subject="sublet.fact.swapper.planned"), last_seq=0)
        first = await bus.append(PREFIX, entries("a", subject="sublet.fact.placement.one"), last_seq=0)

        with pytest.raises(AppendConflict):
            await bus.append(PREFIX, entries("b", subject="sublet.fact.placement.two.17"), last_seq=0)

        second = await bus.append(PREFIX, entries("b", subject="sublet.fact.placement.two.17"), last_seq=first.last_seq)
        assert second.last_seq == first.last_seq + 1

    async def test_a_writer_knows_its_own_id_after_a_conflict(self, bus: Bus) -> None:
        """What a lost acknowledgement looks like: the same bytes conflict, and the prefix's last message is ours."""
        stored = await bus.append(PREFIX, entries("a", "b"), last_seq=0)

        with pytest.raises(AppendConflict):
            await bus.append(PREFIX, entries("a", "b"), last_seq=0)
        newest = await bus.last(PREFIX)

        assert newest is not None
        assert (newest.id, newest.seq) == ("b", stored.last_seq)

    async def test_the_same_id_is_no_reason_to_refuse(self, bus: Bus) -> None:
        """Nothing rests on a table of ids with a window."""
        first = await bus.append(PREFIX, entries("a"), last_seq=0)
        second = await bus.append(PREFIX, entries("a", "a"), last_seq=first.last_seq)

        assert second.last_seq == first.last_seq + 2

    async def test_a_batch_is_stored_as_one_without_a_gap(self, bus: Bus) -> None:
        acknowledged = await bus.append(PREFIX, entries("a", "b", "c"), last_seq=0)
        found, _ = await read_to_end(bus, Stream.HISTORY, ALL_FACTS)

        assert ids(found) == ["a", "b", "c"]
        assert [stored.seq for stored in found] == [
            acknowledged.last_seq - 2,
            acknowledged.last_seq - 1,
            acknowledged.last_seq,
        ]

    async def test_a_batch_that_conflicts_leaves_nothing(self, bus: Bus, other: Bus) -> None:
        await other.append(PREFIX, entries("theirs"), last_seq=0)

        with pytest.raises(AppendConflict):
            await bus.append(PREFIX, entries("a", "b", "c"), last_seq=0)

        assert ids((await read_to_end(bus, Stream.HISTORY, ALL_FACTS))[0]) == ["theirs"]

    async def test_batches_of_two_writers_do_not_mix(self, bus: Bus, other: Bus) -> None:
        async def write(bus: Bus, prefix: str, subject: str, name: str) -> None:
            last_seq = 0
            for number in range(10):
                batch = entries(*(f"{name}-{number}-{part}" for part in range(5)), subject=subject)
                last_seq = (await bus.append(prefix, batch, last_seq=last_seq)).last_seq

        async with anyio.create_task_group() as tg:
            tg.start_soon(write, bus, PREFIX, "sublet.fact.placement.planned", "p")
            tg.start_soon(write, other, OTHER_PREFIX, "sublet.fact.swapper.planned", "s")
        found, _ = await read_to_end(bus, Stream.HISTORY, ALL_FACTS)

        assert len(found) == 100
        for first in range(0, 100, 5):
            batch = [stored.id.rpartition("-")[0] for stored in found[first : first + 5]]
            assert len(set(batch)) == 1, batch

    async def test_the_last_of_an_empty_prefix_is_none(self, bus: Bus) -> None:
        await bus.append(OTHER_PREFIX, entries("x", subject="sublet.fact.swapper.planned"), last_seq=0)

        assert await bus.last(PREFIX) is None

    # ---- read --------------------------------------------------------------------------------------------------

    async def test_a_read_of_an_empty_stream_is_caught_up_at_once(self, bus: Bus) -> None:
        found, end = await read_to_end(bus, Stream.HISTORY, ALL_FACTS)

        assert found == []
        assert end.last_seq == 0

    async def test_a_read_is_caught_up_where_nothing_matches(self, bus: Bus) -> None:
        acknowledged = await bus.append(PREFIX, entries("a", "b"), last_seq=0)

        found, end = await read_to_end(bus, Stream.HISTORY, ["sublet.fact.swapper.>"])

        assert found == []
        assert end.last_seq == acknowledged.last_seq

    async def test_caught_up_names_the_end_of_the_stream_not_the_last_match(self, bus: Bus) -> None:
        first = await bus.append(PREFIX, entries("a"), last_seq=0)
        newest = await bus.append(OTHER_PREFIX, entries("x", subject="sublet.fact.swapper.planned"), last_seq=0)

        found, end = await read_to_end(bus, Stream.HISTORY, [PREFIX])

        assert [stored.seq for stored in found] == [first.last_seq]
        assert end.last_seq == newest.last_seq

    async def test_a_read_goes_on_with_what_comes_later(self, bus: Bus, other: Bus) -> None:
        await bus.append(PREFIX, entries("a", "b"), last_seq=0)

        async with aclosing(other.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
            assert ids(await taken(reading, 3)) == ["a", "b", "caught up"]
            await bus.append(PREFIX, entries("c"), last_seq=2)
            assert ids(await taken(reading, 1)) == ["c"]

    async def test_a_read_starts_behind_any_sequence(self, bus: Bus) -> None:
        await bus.append(PREFIX, entries("a", "b", "c", "d"), last_seq=0)

        for after_seq, expected in ((0, ["a", "b", "c", "d"]), (2, ["c", "d"]), (4, [])):
            found, end = await read_to_end(bus, Stream.HISTORY, ALL_FACTS, after_seq=after_seq)
            assert ids(found) == expected
            assert end.last_seq == 4

    async def test_several_filters_give_one_order(self, bus: Bus) -> None:
        subjects = ["sublet.fact.placement.a.1", "sublet.fact.placement.b", "sublet.fact.placement.a.2"] * 5
        batch = [entry(str(number), subject=subject) for number, subject in enumerate(subjects)]
        await bus.append(PREFIX, batch, last_seq=0)

        found, _ = await read_to_end(bus, Stream.HISTORY, ["sublet.fact.placement.b", "sublet.fact.placement.a.1"])

        assert [int(stored.id) for stored in found] == [number for number in range(15) if number % 3 != 2]

    @pytest.mark.parametrize(
        "filters",
        [
            ["sublet.fact.node.n1.>", "sublet.fact.node.>"],
            ["sublet.fact.node.n1.>", "sublet.fact.node.n1.>"],
            ["sublet.fact.node.n1.>", "sublet.fact.node.*.granted"],
            ["sublet.fact.node.*.granted", "sublet.fact.*.n2.*", "sublet.fact.placement.>"],
        ],
    )
    async def test_filters_may_overlap(self, bus: Bus, filters: list[str]) -> None:
        """A node agent reads its own prefix and some facts of all nodes."""
        subjects = [f"sublet.fact.node.{node}.{fact}" for node in ("n1", "n2") for fact in ("granted", "freed", "a.5")]
        batch = [entry(subject, subject=subject) for subject in subjects]
        await bus.append("sublet.fact.node.>", batch, last_seq=0)

        found, end = await read_to_end(bus, Stream.HISTORY, filters)

        assert ids(found) == [s for s in subjects if any(subject_matches(pattern, s) for pattern in filters)]
        assert end.last_seq == len(subjects)

    async def test_a_long_read_neither_skips_nor_repeats(self, bus: Bus, other: Bus) -> None:
        """Longer than any window that a read keeps open."""
        last_seq = 0
        for first in range(0, 5000, 1000):
            batch = entries(*(str(number) for number in range(first, first + 1000)))
            last_seq = (await bus.append(PREFIX, batch, last_seq=last_seq)).last_seq

        found, end = await read_to_end(other, Stream.HISTORY, ALL_FACTS)

        assert [int(stored.id) for stored in found] == list(range(5000))
        assert end.last_seq == 5000

    async def test_a_cursor_beyond_the_end_is_gone(self, bus: Bus) -> None:
        await bus.append(PREFIX, entries("a"), last_seq=0)

        with pytest.raises(HistoryGone):
            await read_to_end(bus, Stream.HISTORY, ALL_FACTS, after_seq=2)

    async def test_another_stream_of_the_same_name_is_gone(self, bus: Bus) -> None:
        _, end = await read_to_end(bus, Stream.HISTORY, ALL_FACTS)
        assert end.stream_id

        await read_to_end(bus, Stream.HISTORY, ALL_FACTS, stream_id=end.stream_id)
        with pytest.raises(HistoryGone):
            await read_to_end(bus, Stream.HISTORY, ALL_FACTS, stream_id="another")

    async def test_a_closed_reading_ends(self, bus: Bus) -> None:
        reading = bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)
        await taken(reading, 1)
        await reading.aclose()

        assert [item async for item in reading] == []

    async def test_waiting_for_the_next_message_can_be_cancelled(self, bus: Bus) -> None:
        """And the reading goes on where it was."""
        async with aclosing(bus.read(Stream.HISTORY, ALL_FACTS, after_seq=0)) as reading:
            await taken(reading, 1)
            with anyio.move_on_after(0.05) as scope:
                await reading.__anext__()
            await bus.append(PREFIX, entries("a"), last_seq=0)

            assert scope.cancelled_caught
            assert ids(await taken(reading, 1)) == ["a"]

    # ---- other stored messages ---------------------------------------------------------------------------------

    async def test_a_command_is_stored_once_however_often_it_is_sent(self, bus: Bus, other: Bus) -> None:
        first = await bus.publish_stored("sublet.in.acme.deploy", b"1", id="c-1", traceparent="00-a-b-01")
        again = await other.publish_stored("sublet.in.acme.deploy", b"1", id="c-1")
        second = await bus.publish_stored("sublet.in.acme.deploy", b"2", id="c-2")

        found, _ = await read_to_end(bus, Stream.INBOX, ["sublet.in.>"])

        assert first == again
        assert [(s.seq, s.id, s.body, s.traceparent) for s in found] == [
            (first, "c-1", b"1", "00-a-b-01"),
            (second, "c-2", b"2", ""),
        ]

    @pytest.mark.parametrize(
        ("subject", "stream"),
        [
            ("sublet.record.load", Stream.RECORD),
            ("sublet.dead.placement", Stream.DEAD),
            ("sublet.snapshot.placement.manifest.0", Stream.SNAPSHOTS),
        ],
    )
    async def test_the_subject_chooses_the_stream(self, bus: Bus, subject: str, stream: Stream) -> None:
        await bus.publish_stored(subject, b"x", id="1")

        assert ids((await read_to_end(bus, stream, [subject]))[0]) == ["1"]

    # ---- fleeting ----------------------------------------------------------------------------------------------

    async def test_a_message_reaches_every_subscriber(self, bus: Bus, other: Bus) -> None:
        mine, theirs = Inbox(), Inbox()
        async with bus.subscribe("sublet.signal.*", mine), other.subscribe("sublet.signal.wanted", theirs):
            await other.publish("sublet.signal.wanted", b"m", traceparent="00-a-b-01")
            expected = [Received(subject="sublet.signal.wanted", body=b"m", traceparent="00-a-b-01")]

            assert await mine.until(1) == expected
            assert await theirs.until(1) == expected

    async def test_messages_of_one_publisher_keep_their_order(self, bus: Bus, other: Bus) -> None:
        inbox = Inbox()
        async with bus.subscribe("sublet.signal.>", inbox):
            for number in range(500):
                await other.publish("sublet.signal.wanted", str(number).encode())

            assert [int(received.body) for received in await inbox.until(500)] == list(range(500))

    async def test_a_subscription_is_effective_on_entry(self, bus: Bus, other: Bus) -> None:
        """Fifty times: a client that let a flush overtake a subscription failed one time in six."""
        for number in range(50):
            inbox = Inbox()
            async with bus.subscribe(f"sublet.signal.{number}", inbox):
                await other.publish(f"sublet.signal.{number}", b"")
                await inbox.until(1)

    async def test_nothing_is_received_after_leaving(self, bus: Bus, other: Bus) -> None:
        left, staying = Inbox(), Inbox()
        async with bus.subscribe("sublet.signal.a", staying):
            async with bus.subscribe("sublet.signal.a", left):
                pass
            await other.publish("sublet.signal.a", b"")
            await staying.until(1)

        assert left.received == []

    async def test_a_queue_gives_each_message_to_one_member(self, bus: Bus, other: Bus) -> None:
        first, second, watching = Inbox(), Inbox(), Inbox()
        async with (
            bus.subscribe("sublet.signal.a", first, queue="q"),
            other.subscribe("sublet.signal.a", second, queue="q"),
            other.subscribe("sublet.signal.a", watching),
        ):
            for number in range(100):
                await bus.publish("sublet.signal.a", str(number).encode())
            await watching.until(100)
            with anyio.fail_after(PATIENCE_S):
                while len(first.received) + len(second.received) < 100:
                    await anyio.sleep(0.01)

        assert sorted(int(r.body) for r in [*first.received, *second.received]) == list(range(100))
        assert first.received
        assert second.received

    async def test_a_request_is_answered(self, bus: Bus, other: Bus) -> None:
        asked = Inbox()

        async def answer() -> None:
            [question] = await asked.until(1)
            await other.publish(question.reply_subject, question.body + b" pong")

        async with other.subscribe("sublet.query.acme.*", asked), anyio.create_task_group() as tg:
            tg.start_soon(answer)
            assert await bus.request("sublet.query.acme.ps", b"ping", timeout_s=PATIENCE_S) == b"ping pong"

    async def test_a_request_that_nobody_hears_fails_at_once(self, bus: Bus) -> None:
        with anyio.fail_after(PATIENCE_S), pytest.raises(NoAnswer):
            await bus.request("sublet.query.acme.ps", b"", timeout_s=10 * PATIENCE_S)

    async def test_a_request_that_is_not_answered_fails_in_time(self, bus: Bus, other: Bus) -> None:
        async with other.subscribe("sublet.query.acme.ps", Inbox()):
            with anyio.fail_after(PATIENCE_S), pytest.raises(NoAnswer):
                await bus.request("sublet.query.acme.ps", b"", timeout_s=0.05)

    # ---- lease -------------------------------------------------------------------------------------------------

    async def test_a_lease_has_one_holder(self, bus: Bus, other: Bus) -> None:
        assert await bus.acquire_lease("placement", "a", term_s=60)
        assert not await other.acquire_lease("placement", "b", term_s=60)
        assert await bus.acquire_lease("placement", "a", term_s=60)
        assert await other.acquire_lease("swapper", "b", term_s=60)

    async def test_a_lease_that_ran_out_is_taken_over(self, bus: Bus, other: Bus) -> None:
        assert await bus.acquire_lease("placement", "a", term_s=0.1)
        with anyio.fail_after(PATIENCE_S):
            while not await other.acquire_lease("placement", "b", term_s=60):
                await anyio.sleep(0.02)

        assert not await bus.acquire_lease("placement", "a", term_s=60)

    async def test_of_many_contenders_one_gets_the_lease(self, connect: Connect) -> None:
        got = []

        async def contend(name: str) -> None:
            bus = await connect(name)
            if await bus.acquire_lease("placement", name, term_s=60):
                got.append(name)

        async with anyio.create_task_group() as tg:
            for number in range(8):
                tg.start_soon(contend, f"contender-{number}")

        assert len(got) == 1

"""Appending with certainty, over a bus that answers badly."""

from collections.abc import Sequence
from typing import Any

import pytest

from kit.bus import Acknowledged, AppendConflict, AppendFull, AppendUnknown, BusError, Entry, Stored
from kit.errors import Superseded
from kit.history import append_surely

pytestmark = pytest.mark.anyio
PREFIX = "sublet.fact.placement.>"


class BadBus:
    """Answers from a script; knows the prefix's last message."""

    def __init__(self, answers: Sequence[Exception | int], last_id: str = "") -> None:
        self._answers = list(answers)
        self._last_id = last_id
        self.attempts: list[Sequence[Entry]] = []
        self.expected: list[int] = []

    async def append(self, prefix: str, entries: Sequence[Entry], *, last_seq: int) -> Acknowledged:
        self.attempts.append(entries)
        self.expected.append(last_seq)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Acknowledged(last_seq=answer)

    async def last(self, prefix: str) -> Stored | None:
        return Stored(seq=7, time_s=0.0, subject="s", body=b"", id=self._last_id)


def entry(entry_id: str) -> Entry:
    return Entry(subject="s", body=b"", id=entry_id, cause_seq=0, cursor_seq=0, previous_hash="0")


async def append(bus: Any) -> int:
    return await append_surely(bus, PREFIX, [entry("a"), entry("b")], last_seq=5)


async def test_the_same_bytes_are_sent_again_until_there_is_an_answer() -> None:
    bus = BadBus([AppendUnknown("time-out"), AppendUnknown("503"), 7])

    assert 7 == await append(bus)
    assert bus.attempts[0] is bus.attempts[2]


async def test_a_conflict_with_the_own_last_id_is_an_acknowledgement_that_was_lost() -> None:
    bus = BadBus([AppendUnknown("time-out"), AppendConflict("10071")], last_id="b")

    assert 7 == await append(bus)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.history.FULL_RETRY_S", 0.01)


@pytest.mark.usefixtures("short_pauses")
async def test_of_a_batch_that_was_stored_in_part_the_rest_is_sent() -> None:
    bus = BadBus([AppendUnknown("full within it"), AppendFull("full"), AppendConflict("10071"), 8], last_id="a")

    assert 8 == await append(bus)
    assert ["b"] == [one.id for one in bus.attempts[-1]]
    assert 7 == bus.expected[-1]


@pytest.mark.usefixtures("short_pauses")
async def test_no_room_is_told_until_there_is_some() -> None:
    told: list[str] = []
    bus: Any = BadBus([AppendFull("the store is full"), AppendFull("the store is full"), 7])

    assert 7 == await append_surely(bus, PREFIX, [entry("a")], last_seq=5, hold=lambda _, why: told.append(why))
    assert ["the store is full", "the store is full", ""] == told


async def test_a_conflict_with_another_id_means_that_another_instance_writes() -> None:
    with pytest.raises(Superseded):
        await append(BadBus([AppendConflict("10071")], last_id="ghost"))


async def test_a_refusal_passes_through() -> None:
    """A full stream is no matter of patience."""

    class Full(BusError):
        pass

    with pytest.raises(Full):
        await append(BadBus([Full("no space")]))

"""The comparison after the kills finds each kind of damage."""

from benchmarks.bus_kills import Follower, Ledger, verdict
from kit.bus import Stored, Stream


def stored(seq: int, id: str) -> Stored:
    return Stored(seq=seq, time_s=0.0, subject="sublet.fact.node.w0.x_v1", body=b"", id=id)


def counts(*, acknowledged: dict[str, int], history: list[Stored], seen: list[int]) -> tuple[object, ...]:
    ledger = Ledger(acknowledged=acknowledged, followers=[Follower(Stream.HISTORY, seqs=seen)])
    found = verdict(ledger, {Stream.HISTORY: history, Stream.INBOX: []}, unresolved_count=0)
    return tuple(found[f"kill_{name}_count"] for name in ("lost", "stored_twice", "reader_faults"))


HISTORY = [stored(1, "a"), stored(2, "b"), stored(3, "c")]


def test_all_is_well() -> None:
    assert counts(acknowledged={"a": 1, "c": 3}, history=HISTORY, seen=[1, 2, 3]) == (0, 0, 0)


def test_what_was_acknowledged_and_is_not_stored_is_lost() -> None:
    assert counts(acknowledged={"a": 1, "d": 4}, history=HISTORY, seen=[1, 2, 3]) == (1, 0, 0)


def test_what_is_stored_under_another_sequence_than_was_told_is_lost() -> None:
    assert counts(acknowledged={"a": 2}, history=HISTORY, seen=[1, 2, 3]) == (1, 0, 0)


def test_an_id_that_is_stored_twice_is_found() -> None:
    assert counts(acknowledged={}, history=[*HISTORY, stored(4, "b")], seen=[1, 2, 3, 4]) == (0, 1, 0)


def test_a_reader_that_skips_or_repeats_is_found() -> None:
    assert counts(acknowledged={}, history=HISTORY, seen=[1, 3])[2] == 2
    assert counts(acknowledged={}, history=HISTORY, seen=[1, 2, 2, 3])[2] == 2

"""The local journal: what was written before a crash is there after it; damage is not mistaken for a torn write."""

import threading
from pathlib import Path

import pytest

from kit.bus import Entry
from kit.journal import Journal, JournalDamaged


def entry(number: int) -> Entry:
    return Entry(
        subject="sublet.fact.node.a.x",
        body=b"{}",
        id=f"node.a:i:{number}",
        cause_seq=0,
        cursor_seq=number,
        previous_hash="0",
    )


def read(path: Path) -> list[Entry]:
    journal = Journal(path)
    journal.close()
    return list(journal.entries)


def test_entries_survive_a_reopening(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write([entry(1), entry(2)])
    journal.close()

    assert [entry(1), entry(2)] == read(tmp_path / "journal")


@pytest.mark.parametrize("lost_count", [1, 5, 9, 40])
def test_a_torn_last_record_is_cut_off_and_everything_before_it_kept(tmp_path: Path, lost_count: int) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.write([entry(1)])
    journal.write([entry(2)])
    journal.close()
    path.write_bytes(path.read_bytes()[:-lost_count])

    reopened = Journal(path)
    reopened.write([entry(3)])
    reopened.close()

    assert [entry(1), entry(3)] == read(path)


@pytest.mark.parametrize(
    "tail", [bytes(3), bytes(8), bytes(5000), bytes(4096) + b"[end of a record]", b"\0\0\1\0" + bytes(900)]
)
def test_a_tail_that_a_power_cut_left_half_written_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    """A file may have grown without its bytes: those read as zeros."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.write([entry(1)])
    journal.close()
    path.write_bytes(path.read_bytes() + tail)

    reopened = Journal(path)
    reopened.write([entry(2)])
    reopened.close()

    assert [entry(1), entry(2)] == read(path)


def test_what_was_decided_together_is_there_together_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.write([entry(1)])
    journal.write([entry(2), entry(3), entry(4)])
    journal.close()
    path.write_bytes(path.read_bytes()[:-3])

    assert [entry(1)] == read(path)


def test_a_damaged_record_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.write([entry(1)])
    journal.write([entry(2)])
    journal.close()
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)

    with pytest.raises(JournalDamaged, match="move the file away"):
        Journal(path)


def test_trimming_keeps_what_the_stream_does_not_hold(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write([entry(1), entry(2), entry(3)])
    journal.trim([entry(1).id, entry(2).id])
    journal.write([entry(4)])
    journal.close()

    assert [entry(3), entry(4)] == read(tmp_path / "journal")


def test_a_trim_beside_writes_loses_nothing(tmp_path: Path) -> None:
    """The uploader trims on the loop's thread while the next batch is written in a worker thread."""
    journal = Journal(tmp_path / "journal")

    def write_all() -> None:
        for number in range(200):
            journal.write([entry(number)])

    written = threading.Thread(target=write_all)
    written.start()
    while written.is_alive():
        journal.trim([entry(number).id for number in range(0, 200, 2)])
    written.join()
    journal.trim([entry(number).id for number in range(0, 200, 2)])
    journal.close()

    assert [entry(number) for number in range(1, 200, 2)] == read(tmp_path / "journal")

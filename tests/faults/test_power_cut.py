"""The power goes at a random moment: what was acknowledged is there afterwards, in the stream and in the journal."""

import random
from pathlib import Path

import pytest

from benchmarks.lazy_mount import LazyMount, why_not
from benchmarks.power_cut import control, cut_often, report
from kit.bus import Entry
from kit.journal import Journal

needs_mount = pytest.mark.skipif(why_not() is not None, reason=f"the disk that forgets {why_not()}")


@needs_mount
@pytest.mark.nats
@pytest.mark.anyio
async def test_nothing_acknowledged_is_lost_and_a_server_that_syncs_late_is_found_out(tmp_path: Path) -> None:
    outcome = await cut_often(tmp_path / "runs", cut_count=3, names="ordered", seed=random.randrange(1 << 32))
    careless = await control(tmp_path / "control", names="ordered", seed=1)

    told = report(outcome, careless)
    assert [] == told.missed, told.table()


def entry(number: int) -> Entry:
    return Entry(
        subject="sublet.fact.node.a.x",
        body=b"x" * 3000,
        id=f"node.a:i:{number}",
        cause_seq=0,
        cursor_seq=number,
        previous_hash="0",
    )


def ids(journal: Journal) -> list[str]:
    return [one.id for one in journal.entries]


@needs_mount
@pytest.mark.parametrize("seed", range(6))
def test_a_journal_survives_every_cut_even_where_names_need_their_folder_synced(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    written: list[str] = []
    with LazyMount(tmp_path / "disk", names="strict") as disk:
        path = disk.path / "state" / "agent" / "journal"
        for life in range(4):
            journal = Journal(path)
            assert written == ids(journal)[: len(written)]
            written = ids(journal)
            for number in range(chance.randint(0, 5)):
                if written and chance.random() < 0.4:
                    gone = written[: chance.randint(1, len(written))]
                    journal.trim(gone)
                    written = written[len(gone) :]
                journal.write([entry(10 * life + number)])
                written.append(entry(10 * life + number).id)
            disk.cut(torn_seed=chance.getrandbits(32) if chance.random() < 0.5 else None)
            with pytest.raises(OSError, match=r"endpoint is not connected|Input/output|aborted"):
                journal.close()
        journal = Journal(path)
        assert written == ids(journal)
        journal.close()


@needs_mount
def test_a_journal_on_a_full_disk_takes_nothing_and_then_goes_on(tmp_path: Path) -> None:
    with LazyMount(tmp_path / "disk") as disk:
        journal = Journal(disk.path / "journal")
        journal.write([entry(1)])
        disk.limit(disk.used_bytes() + 1000)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                journal.write([entry(2)])
        assert [entry(1).id] == ids(journal)
        disk.limit(None)
        journal.write([entry(3)])
        journal.close()

        reopened = Journal(disk.path / "journal")
        assert [entry(1).id, entry(3).id] == ids(reopened)
        reopened.close()

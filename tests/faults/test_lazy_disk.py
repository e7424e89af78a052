"""The disk that forgets, tested first: what it drops must be what a power cut may drop, and nothing else."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.lazy_disk import LazyDisk
from benchmarks.lazy_mount import LazyMount, why_not

pytestmark = pytest.mark.processes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LazyMount]:
    if reason := why_not():
        pytest.skip(reason)
    with LazyMount(tmp_path / "disk") as mount:
        yield mount


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
    sync(path.parent)


def test_what_was_not_synced_is_gone_and_what_was_stays(disk: LazyMount) -> None:
    write_durably(disk.path / "kept", b"one")
    with (disk.path / "kept").open("ab") as file:
        file.write(b" two")
    (disk.path / "new").write_bytes(b"new")
    assert b"one two" == (disk.path / "kept").read_bytes()

    disk.cut()

    assert ["kept"] == listed(disk.path)
    assert b"one" == (disk.path / "kept").read_bytes()


@pytest.mark.parametrize(("names", "found"), [("strict", []), ("ordered", ["file"])])
def test_a_new_files_name_needs_its_folder_synced_unless_names_are_ordered(
    tmp_path: Path, names: str, found: list[str]
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with LazyMount(tmp_path / "disk", names="strict" if names == "strict" else "ordered") as disk:
        (disk.path / "file").write_bytes(b"bytes")
        sync(disk.path / "file")
        disk.cut()
        assert found == listed(disk.path)


def test_a_file_opened_with_o_sync_needs_no_other_sync(disk: LazyMount) -> None:
    write_durably(disk.path / "log", b"")
    fd = os.open(disk.path / "log", os.O_WRONLY | os.O_APPEND | os.O_SYNC)
    os.write(fd, b"one")
    os.write(fd, b"two")
    os.close(fd)

    disk.cut()

    assert b"onetwo" == (disk.path / "log").read_bytes()


@pytest.mark.parametrize("is_synced", [False, True])
def test_a_rename_happens_as_a_whole_or_not_at_all(disk: LazyMount, is_synced: bool) -> None:
    write_durably(disk.path / "state", b"old")
    (disk.path / "state.new").write_bytes(b"new")
    sync(disk.path / "state.new")
    (disk.path / "state.new").replace(disk.path / "state")
    if is_synced:
        sync(disk.path)

    disk.cut()

    assert ["state"] == listed(disk.path)
    assert (b"new" if is_synced else b"old") == (disk.path / "state").read_bytes()


def test_a_file_made_anew_inherits_nothing_from_the_removed_one(disk: LazyMount) -> None:
    write_durably(disk.path / "file", b"the old file's bytes")
    (disk.path / "file").unlink()
    (disk.path / "file").write_bytes(b"new")
    sync(disk.path)

    disk.cut()

    assert b"" == (disk.path / "file").read_bytes(), "its name was kept, its bytes were not"


def test_a_removal_that_was_not_synced_did_not_happen(disk: LazyMount) -> None:
    write_durably(disk.path / "file", b"here")
    (disk.path / "file").unlink()

    disk.cut()

    assert b"here" == (disk.path / "file").read_bytes()


def test_overwritten_and_truncated_bytes_come_back(disk: LazyMount) -> None:
    write_durably(disk.path / "file", b"0123456789")
    with (disk.path / "file").open("r+b") as file:
        file.write(b"xx")
        file.truncate(4)
    assert b"xx23" == (disk.path / "file").read_bytes()

    disk.cut()
    assert b"0123456789" == (disk.path / "file").read_bytes()

    with (disk.path / "file").open("r+b") as file:
        file.truncate(4)
        file.truncate(8)
        os.fsync(file.fileno())
    disk.cut()
    assert b"0123\0\0\0\0" == (disk.path / "file").read_bytes()


def test_folders_need_to_be_synced_too(disk: LazyMount) -> None:
    (disk.path / "a" / "b").mkdir(parents=True)
    write_durably(disk.path / "a" / "b" / "file", b"deep")
    sync(disk.path)
    disk.cut()
    assert [] == listed(disk.path / "a")

    (disk.path / "a" / "b").mkdir()
    write_durably(disk.path / "a" / "b" / "file", b"deep")
    sync(disk.path / "a")
    disk.cut()
    assert b"deep" == (disk.path / "a" / "b" / "file").read_bytes()


def test_whoever_had_a_file_open_at_the_cut_cannot_write_on(disk: LazyMount) -> None:
    write_durably(disk.path / "file", b"before")
    fd = os.open(disk.path / "file", os.O_WRONLY | os.O_APPEND)
    disk.cut()
    with pytest.raises(OSError, match=r"endpoint is not connected|Input/output|aborted"):
        os.write(fd, b"after")
    with pytest.raises(OSError, match=r"endpoint is not connected|Input/output|aborted"):
        os.close(fd)

    assert b"before" == (disk.path / "file").read_bytes()


def test_a_full_disk_says_so_and_takes_more_once_there_is_room(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with LazyMount(tmp_path / "disk", capacity_bytes=10_000) as disk:
        (disk.path / "a").write_bytes(bytes(9_000))
        with pytest.raises(OSError, match="No space left"):
            (disk.path / "b").write_bytes(bytes(9_000))
        (disk.path / "a").unlink()
        ends_at = time.monotonic() + 5
        while disk.used_bytes() > 0 and time.monotonic() < ends_at:
            time.sleep(0.01)  # The kernel tells a little later that nobody has it open.
        (disk.path / "b").write_bytes(bytes(9_000))


def test_a_torn_cut_keeps_a_part_of_what_was_not_synced() -> None:
    lengths = set()
    for seed in range(20):
        disk = LazyDisk()
        number = disk.make(1, "file", 0o100644).number
        disk.sync_folder(1)
        disk.write(number, 0, b"s" * 4096)
        disk.sync_file(number)
        disk.write(number, 4096, b"u" * 8192)
        disk.cut(random.Random(seed))
        content = disk.read(number, 0, 20_000)
        assert b"s" * 4096 == content[:4096], "synced bytes are never touched"
        assert {*content[4096:]} <= {*b"u\0"}
        lengths.add(len(content))
    assert {4096, 8192, 12_288} == lengths

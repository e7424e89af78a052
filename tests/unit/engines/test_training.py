"""Steps that leave a trace, and checkpoints that survive what happens to files."""

from pathlib import Path

import pytest

from engines.training.checkpoints import KEPT_COUNT, Checkpoints
from engines.training.progress import PAGE_BYTES, Progress, beginning, page_of, progress_in


def after(step_count: int, *, model: str = "job", seed: int = 1) -> Progress:
    progress = beginning(model, seed=seed)
    for _ in range(step_count):
        progress = progress.next()
    return progress


def test_the_value_after_so_many_steps_is_the_same_however_they_were_made() -> None:
    resumed = after(3)
    for _ in range(4):
        resumed = resumed.next()

    assert resumed == after(7)


def test_a_lost_step_and_a_repeated_step_both_show() -> None:
    assert len({after(6).digest, after(7).digest, after(8).digest, after(7, seed=2).digest}) == 4


def test_a_page_says_what_was_written() -> None:
    assert len(page_of(after(5))) == PAGE_BYTES
    assert progress_in(page_of(after(5))) == after(5)


@pytest.mark.parametrize("offset", [0, 8, 20, 50, 2000, PAGE_BYTES - 1])
def test_a_page_with_any_byte_changed_says_nothing(offset: int) -> None:
    page = bytearray(page_of(after(5)))
    page[offset] ^= 1

    assert progress_in(bytes(page)) is None


def test_a_page_of_zeros_says_nothing() -> None:
    assert progress_in(bytes(PAGE_BYTES)) is None


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "made" / "if-missing", model="job", seed=1)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "made" / "if-missing").iterdir())


def test_the_newest_checkpoint_is_found(checkpoints: Checkpoints) -> None:
    for step_count in (5, 10, 15):
        checkpoints.write(after(step_count))

    assert checkpoints.newest().progress == after(15)


def test_no_directory_means_no_checkpoint(checkpoints: Checkpoints) -> None:
    found = checkpoints.newest()

    assert (found.progress, found.passed_over) == (None, ())


def test_old_checkpoints_go(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step_count in range(1, 8):
        checkpoints.write(after(step_count))

    assert len(files(tmp_path)) == KEPT_COUNT


@pytest.mark.parametrize("content", [b"", b"{}", b"{cut off", b"\x00" * 100])
def test_a_broken_file_is_passed_over_for_the_one_before(
    checkpoints: Checkpoints, tmp_path: Path, content: bytes
) -> None:
    for step_count in (5, 10):
        checkpoints.write(after(step_count))
    newest = files(tmp_path)[-1]
    newest.write_bytes(content)
    found = checkpoints.newest()

    assert (found.progress, found.passed_over) == (after(5), (newest.name,))


def test_a_changed_step_count_is_noticed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.write(after(5))
    file = files(tmp_path)[0]
    file.write_bytes(file.read_bytes().replace(b'"step_count":5', b'"step_count":6'))

    assert checkpoints.newest().progress is None


def test_a_checkpoint_of_another_job_is_passed_over(checkpoints: Checkpoints, tmp_path: Path) -> None:
    Checkpoints(tmp_path / "made" / "if-missing", model="other", seed=1).write(after(9, model="other"))

    assert checkpoints.newest().progress is None


def test_what_a_crash_left_half_written_is_removed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.write(after(5))
    (tmp_path / "made" / "if-missing" / "step-000000000006.tmp").write_bytes(b"{")

    assert checkpoints.newest().progress == after(5)
    assert len(files(tmp_path)) == 1

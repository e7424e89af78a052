"""The net under tests of real processes: runs of pytest of its own, with tests that fail as often as they are told."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.second_tries import FILES_THAT_DRAW, FOLDERS_OF_PROCESSES, FOLDERS_THAT_ARE_PURE

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
from tests.second_tries import pytest_collection_modifyitems, pytest_configure, pytest_terminal_summary
"""
SETTINGS = """
[pytest]
markers =
    processes: as in pyproject.toml
    nats: as in pyproject.toml
"""
# Fails so many times, counted in a file, since a second try begins with nothing of the first.
TEST = """
import pathlib, pytest
{marks}
def test_it():
    tries = pathlib.Path(__file__).with_suffix(".tries")
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    assert len(tries.read_text()) > {failures_count}, "the reason of the failure"
"""


@dataclass
class Run:
    status: int
    output: str
    tries: dict[str, int]

    @property
    def last_line(self) -> str:
        return self.output.splitlines()[-1]


def run(folder: Path, tests: dict[str, int], *, marks: str = "", tries_max: str | None = "3") -> Run:
    """A pytest run over tests that fail so many times, by their paths."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text(SETTINGS)
    for name, failures_count in tests.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEST.format(marks=marks, failures_count=failures_count))
    given = {name: value for name, value in os.environ.items() if not name.startswith(("SUBLET_", "PYTEST"))}
    given |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # Others only make the start slow.
    given |= {"SUBLET_TESTS_SECOND_TRIES": tries_max} if tries_max is not None else {}
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-p", "pytest_rerunfailures"]
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    tries = {name: len((folder / f"{name}.tries").read_text()) for name in tests if (folder / f"{name}.tries").exists()}
    return Run(done.returncode, done.stdout + done.stderr, tries)


@pytest.mark.parametrize(("name", "marks"), [("e2e/test_a", ""), ("unit/test_a", "@pytest.mark.processes")])
def test_a_test_of_processes_that_fails_once_passes_and_is_named(tmp_path: Path, name: str, marks: str) -> None:
    there = run(tmp_path, {name: 1}, marks=marks)

    assert (0, {name: 2}) == (there.status, there.tries), there.output
    assert "second tries: 1 of at most 3" in there.output
    assert f"failed once: {name}.py::test_it" in there.output
    assert "the reason of the failure" in there.output
    assert re.fullmatch(r"1 passed, 1 rerun in .*s", there.last_line)


def test_one_that_fails_twice_fails(tmp_path: Path) -> None:
    there = run(tmp_path, {"integration/test_a": 2})

    assert (1, {"integration/test_a": 2}) == (there.status, there.tries), there.output
    assert re.fullmatch(r"1 failed, 1 rerun in .*s", there.last_line)


@pytest.mark.parametrize(("name", "marks"), [
    ("unit/test_a", ""),
    ("faults/test_rivals", "@pytest.mark.nats"),
    ("properties/test_a", "@pytest.mark.processes"),
    ("simulation/test_a", "@pytest.mark.nats"),
])  # fmt: skip
def test_a_test_that_is_pure_or_draws_and_fails_once_fails_whatever_its_marks(
    tmp_path: Path, name: str, marks: str
) -> None:
    there = run(tmp_path, {name: 1}, marks=marks)

    assert (1, {name: 1}) == (there.status, there.tries), there.output
    assert "second tries: 0 of at most 3" in there.output


def test_three_may_fail_once_and_the_fourth_fails_the_run(tmp_path: Path) -> None:
    there = run(tmp_path, {f"e2e/test_{number}": 1 for number in range(4)})

    assert (1, [1, 2, 2, 2]) == (there.status, sorted(there.tries.values())), there.output
    assert "none is left: every other failure counts" in there.output
    assert re.fullmatch(r"1 failed, 3 passed, 3 rerun in .*s", there.last_line)


def test_where_nobody_asks_there_is_none_and_nothing_is_said(tmp_path: Path) -> None:
    there = run(tmp_path, {"e2e/test_a": 1}, tries_max=None)

    assert (1, {"e2e/test_a": 1}) == (there.status, there.tries), there.output
    assert "second tries" not in there.output


@pytest.mark.parametrize(("marks", "tries_max", "sentence"), [
    ("@pytest.mark.flaky(reruns=5)", None, "which tests may have a second try is said in tests.second_tries alone"),
    ("", "many", "SUBLET_TESTS_SECOND_TRIES is how many tests may have a second try, not 'many'"),
])  # fmt: skip
def test_nobody_else_gives_tries(tmp_path: Path, marks: str, tries_max: str | None, sentence: str) -> None:
    there = run(tmp_path, {"e2e/test_a": 0}, marks=marks, tries_max=tries_max)

    assert (4, {}) == (there.status, there.tries), there.output
    assert sentence in there.output


def test_ci_asks_for_three_and_what_is_named_exists() -> None:
    assert "SUBLET_TESTS_SECOND_TRIES=3 make test" in (ROOT / ".ci/run").read_text()
    assert not [name for name in FOLDERS_OF_PROCESSES | FOLDERS_THAT_ARE_PURE if not (ROOT / "tests" / name).is_dir()]
    assert not [name for name in FILES_THAT_DRAW if not list((ROOT / "tests").rglob(name))]

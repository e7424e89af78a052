"""A second try for tests of real processes, in CI alone, counted and shown. docs/testing.md says why.

``SUBLET_TESTS_SECOND_TRIES=3`` allows that many in one run; without it there is none. tests/conftest.py has the hooks.
"""

import os

import pytest

VARIABLE = "SUBLET_TESTS_SECOND_TRIES"
# Whatever is in these starts processes.
FOLDERS_OF_PROCESSES = frozenset({"e2e", "integration"})
MARKS_OF_PROCESSES = ("nats", "docker", "processes")
# One input gives one result here: a failure is a fault, whatever else the machine does, and whatever its marks say.
FOLDERS_THAT_ARE_PURE = frozenset({"architecture", "contract", "properties", "simulation"})
# What these find by chance they may not find a second time.
FILES_THAT_DRAW = frozenset({"test_fuzz.py", "test_power_cut.py", "test_rivals.py"})


def tries_max() -> int:
    """How many second tries one run may need; none where nobody asks for them."""
    said = os.environ.get(VARIABLE, "0")
    if not said.isdigit():
        raise pytest.UsageError(f"{VARIABLE} is how many tests may have a second try, not {said!r}")
    return int(said)


def pytest_configure(config: pytest.Config) -> None:
    if tries_max():
        config.option.max_suite_reruns = tries_max()
        config.option.rerun_show_tracebacks = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_hand = [item.nodeid for item in items if item.get_closest_marker("flaky")]
    if by_hand:
        raise pytest.UsageError(f"which tests may have a second try is said in {__name__} alone: {by_hand}")
    if tries_max():
        for item in items:
            if is_of_processes(item):
                item.add_marker(pytest.mark.flaky(reruns=1))


def is_of_processes(item: pytest.Item) -> bool:
    folders = set(item.path.relative_to(item.config.rootpath).parts[:-1])
    if folders & FOLDERS_THAT_ARE_PURE or item.path.name in FILES_THAT_DRAW:
        return False
    return bool(folders & FOLDERS_OF_PROCESSES) or any(item.get_closest_marker(mark) for mark in MARKS_OF_PROCESSES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Above pytest's own last line."""
    if not tries_max():
        return
    tried = list(dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("rerun", [])))
    terminalreporter.write_line(f"second tries: {len(tried)} of at most {tries_max()}")
    for nodeid in tried:
        terminalreporter.write_line(f"  failed once: {nodeid}")
    if len(tried) >= tries_max():
        terminalreporter.write_line("  none is left: every other failure counts")

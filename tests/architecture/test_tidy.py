"""Style that a program can check. Each message says what to do instead."""

import ast
import re
import warnings
from pathlib import Path

from tests.architecture.sources import (
    code_files,
    is_test,
    listing,
    python_files,
    read,
    text_files,
    tracked_files,
    tree_of,
)

BANNED_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "misc"})
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
CORE_LINES_GOAL = 300
CORE_LINES_MAX = 330
# Split, so that this file does not find itself.
FIX_MARK = "FIX" + "ME"
TODO_WITHOUT_ISSUE = re.compile(r"\bTO" + r"DO\b(?!\(#\d+\))")
# A folder of one developer's machine. Another folder of that name, inside a longer path or an address, is not meant.
DEVELOPER_PATH = re.compile(r"(?<![\w.~*}-])/(?:root|work)/")


def test_no_file_is_named_after_nothing() -> None:
    found = [str(path) for path in tracked_files() if BANNED_NAMES & {part.split(".")[0] for part in path.parts}]

    assert not found, (
        "these names say nothing about what is inside; name the module after the idea that it holds, or move each "
        "function beside its only caller:" + listing(found)
    )


def test_modules_hold_one_concept() -> None:
    lines_of = {path: read(path).count("\n") for path in python_files()}
    found = [f"{path}: {lines} lines" for path, lines in lines_of.items() if lines > MODULE_LINES_MAX]

    assert not found, f"longer than {MODULE_LINES_MAX} lines; give the second concept its own module:" + listing(found)


def test_cores_stay_readable_in_one_sitting() -> None:
    cores = {path: read(path).count("\n") for path in python_files() if path.name == "core.py" and not is_test(path)}
    long = [f"{path}: {lines} lines" for path, lines in cores.items() if lines > CORE_LINES_GOAL]
    too_long = [f"{path}: {lines} lines" for path, lines in cores.items() if lines > CORE_LINES_MAX]

    assert not too_long, (
        f"longer than {CORE_LINES_MAX} lines; move a family of pure functions (scoring, windows, victims) into a "
        "module beside core.py:" + listing(too_long)
    )
    if long:
        warnings.warn(f"tidy: over the goal of {CORE_LINES_GOAL} lines:" + listing(long), stacklevel=1)


def test_functions_fit_on_a_screen() -> None:
    found = [
        f"{path}:{node.lineno} {node.name}: {lines} lines"
        for path in python_files()
        if not is_test(path)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]

    assert not found, (
        f"longer than {FUNCTION_LINES_MAX} lines; keep the decisions in the parent and move each step into a pure "
        "leaf function:" + listing(found)
    )


def test_assertions_name_one_condition() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path in python_files()
        if not is_test(path)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
    ]

    assert not found, "`assert a and b` does not say which one failed; write two assertions:" + listing(found)


def test_nothing_is_left_to_be_fixed() -> None:
    found = lines_with(re.compile(rf"\b{FIX_MARK}\b"), code_files())

    assert not found, f"mend it now, or open an issue and write TODO(#1); {FIX_MARK} may not be merged:" + listing(
        found
    )


def test_todos_have_an_issue() -> None:
    found = lines_with(TODO_WITHOUT_ISSUE, code_files())

    assert not found, "write TODO(#123) with the number of an issue, or do it:" + listing(found)


def test_no_path_of_one_machine() -> None:
    found = lines_with(DEVELOPER_PATH, text_files())

    assert not found, "a path of one machine works nowhere else; make it relative, or a setting:" + listing(found)


def lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate(read(path).splitlines(), start=1)
        if pattern.search(line)
    ]

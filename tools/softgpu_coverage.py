"""How much of the software GPU's C code its tests and a short run of its fuzzer execute: `make coverage`.

Builds the libraries anew with the compiler's counters, runs both, and reads the counters with gcov. What a killed
process executed is not counted, so the figures are lower bounds.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "softgpu-coverage"
TESTS = "tests/unit/softgpu"
NOT_WITH_COUNTERS = "test_speed.py"  # the counters cost time
FUZZ_RUNS = (["--seed", "1", "--operations", "60000"], ["--steps", "quick", "--stride", "5"], ["--races"])


@dataclass
class Counters:
    """Of one source file: {line: times}, {(line, index of the branch): times}, {function: times}."""

    lines: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    branches: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    functions: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def run_everything() -> bool:
    """Whether all passed. What ran is counted in either case."""
    shutil.rmtree(BUILD, ignore_errors=True)
    environment = {**os.environ, "SOFTGPU_BUILD": str(BUILD), "CFLAGS": "-O0 -g --coverage"}
    tests = [sys.executable, "-m", "pytest", "-q", TESTS, "--ignore", f"{TESTS}/{NOT_WITH_COUNTERS}"]
    is_passed = subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode == 0
    for arguments in FUZZ_RUNS:
        command = [sys.executable, "-m", "softgpu", "fuzz", "--instrument", "coverage", *arguments]
        finished = subprocess.run(command, cwd=ROOT, env=environment, check=False, stderr=subprocess.DEVNULL)
        is_passed = is_passed and finished.returncode == 0
    return is_passed


def reports() -> Iterator[dict[str, Any]]:
    """What gcov says of each object file."""
    for counters in sorted(BUILD.rglob("*.gcda")):
        with tempfile.TemporaryDirectory() as folder:
            command = ["gcov", "--json-format", "--branch-probabilities", str(counters)]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            for path in Path(folder).glob("*.gcov.json.gz"):
                yield json.loads(gzip.decompress(path.read_bytes()))


def collect() -> dict[str, Counters]:
    """{file: counters} of the libraries' sources; objects of the same source are added up."""
    found: dict[str, Counters] = defaultdict(Counters)
    for report in reports():
        for file in report["files"]:
            path = Path(file["file"])
            if path.parent.name != "src" or path.suffix != ".c":
                continue
            counters = found[path.name]
            for function in file["functions"]:
                counters.functions[function["name"]] += function["execution_count"]
            for line in file["lines"]:
                counters.lines[line["line_number"]] += line["count"]
                for index, branch in enumerate(line["branches"]):
                    counters.branches[line["line_number"], index] += branch["count"]
    return found


def percent(counts: "list[int]") -> float:
    return 100 * sum(1 for count in counts if count) / len(counts) if counts else 100.0


def table(found: dict[str, Counters]) -> list[tuple[str, int, float, float]]:
    """(file, lines, percent of the lines, percent of the branches), and the total last."""
    rows = [
        (name, len(counters.lines), percent([*counters.lines.values()]), percent([*counters.branches.values()]))
        for name, counters in sorted(found.items())
    ]
    lines = [count for counters in found.values() for count in counters.lines.values()]
    branches = [count for counters in found.values() for count in counters.branches.values()]
    return [*rows, ("total", len(lines), percent(lines), percent(branches))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--missing", metavar="FILE", help="list the lines of a file that nothing executed")
    parser.add_argument("--no-run", action="store_true", help="read the counters of the last run")
    parser.add_argument("--lines-percent", type=float, default=0.0, help="fail when fewer lines are executed")
    options = parser.parse_args()
    if shutil.which("gcov") is None:
        print("coverage needs gcov, which comes with gcc", file=sys.stderr)
        return 2
    is_passed = options.no_run or run_everything()
    found = collect()
    rows = table(found)
    for name, lines, lines_percent, branches_percent in rows:
        print(f"{name:<22} {lines:>6} lines  {lines_percent:6.1f} %   branches {branches_percent:6.1f} %")
    never = sorted(
        name
        for counters in found.values()
        for name, count in counters.functions.items()
        if not count and name.startswith(("cu", "nvml"))
    )
    if never:
        print("never called:", ", ".join(never))
    if options.missing:
        source = (ROOT / "softgpu" / "src" / options.missing).read_text(encoding="utf-8").splitlines()
        for number, count in sorted(found[options.missing].lines.items()):
            if not count:
                print(f"{number:>5} {source[number - 1]}")
    if options.json:
        names = ("lines", "lines_percent", "branches_percent")
        figures = {name: dict(zip(names, values, strict=True)) for name, *values in rows}
        options.json.write_text(json.dumps({"label": "software GPU", "files": figures}, indent=2) + "\n")
    return 0 if is_passed and rows[-1][2] >= options.lines_percent else 1


if __name__ == "__main__":
    sys.exit(main())

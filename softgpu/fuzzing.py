"""The fuzzer of the software GPU: random operations with kills, and kills at every step of chosen operations.

The work is done by a C program (`softgpu/fuzz`); this module builds it, gives it a host of its own, shows progress and
reads the result. What it proves, and what not, stands in docs/softgpu.md.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softgpu.errors import BuildError, HostError
from softgpu.host import Host
from softgpu.library import library_directory

INSTRUMENTS = {
    "none": "-O2 -g",
    "address": "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-O1 -g -fsanitize=thread",
    "coverage": "-O0 -g --coverage",
}
"""{how to build: the compiler's flags}"""
_SOURCES = Path(__file__).resolve().parent
_BUILD_TIMEOUT_S = 300.0
_MIB = 1 << 20


@dataclass(frozen=True)
class FuzzResult:
    """What one run of the program said."""

    is_clean: bool
    findings: list[str]
    figures: dict[str, Any]


def build_fuzzer(instrument: str = "none") -> Path:
    """The program, up to date, with libraries of its own beside it. Raises `BuildError`."""
    directory = library_directory() / ("fuzz" if instrument == "none" else f"fuzz-{instrument}")
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["make", "-C", str(_SOURCES), f"OUT={directory}", f"CFLAGS={INSTRUMENTS[instrument]}"]
        command += [f"CC={os.environ.get('CC', 'cc')}", f"-j{os.cpu_count() or 1}", "all", "fuzz"]
        try:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        except FileNotFoundError as error:
            raise BuildError("the fuzzer needs a C compiler and make, and make is not installed") from error
    if finished.returncode != 0:
        last_lines = "\n".join((finished.stderr or finished.stdout).strip().splitlines()[-20:])
        raise BuildError(f"the fuzzer could not be built; the compiler said:\n{last_lines}")
    return directory / "softgpu-fuzz"


def in_silence(_text: str) -> None:
    """Progress that nobody wants to see."""


@contextmanager
def fuzz_host() -> Iterator[Host]:
    """Two small GPUs whose calls cost nothing. It stays for a look when something was found."""
    directory = Path("/dev/shm") / f"softgpu-fuzz-{uuid.uuid4().hex[:12]}"  # noqa: S108  (where hosts belong)
    host = Host(directory, gpus=2, profile="test-1", total_bytes=512 * _MIB, context_bytes=4 * _MIB).create()
    yield host
    host.remove()


def run_program(host: Host, *arguments: str, instrument: str, progress: Callable[[str], None]) -> FuzzResult:
    """Runs the program on a host. Lines it says about its progress go to `progress`. Raises `HostError`."""
    environment = {**os.environ, "SOFTGPU_DIR": str(host.state_dir), "ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("SOFTGPU_GROUP", None)
    command = [str(build_fuzzer(instrument)), *arguments]
    findings: list[str] = []
    figures: dict[str, Any] = {}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, rest = line.rstrip("\n").partition(" ")
            if kind == "RESULT":
                figures = json.loads(rest)
            elif kind == "FOUND":
                findings.append(rest)
            else:
                progress(rest)
    if process.returncode not in (0, 1) or not figures:
        raise HostError(f"{' '.join(command)} ended with {process.returncode}")
    if failure := figures.pop("failure", ""):
        findings.append(failure)
    return FuzzResult(process.returncode == 0 and not findings, findings, figures)


@dataclass(frozen=True)
class Harshness:
    """After how many operations of all workers together something befalls them: the first two on average."""

    kill_every: int = 600
    break_every: int = 3000
    check_every: int = 50_000
    failing: tuple[str, ...] = ()
    """Only these functions fail, and no device is lost; empty: any that the fuzzer knows, and devices get lost."""

    def arguments(self) -> list[str]:
        return [str(self.kill_every), str(self.break_every), str(self.check_every), ",".join(self.failing)]

    def flags(self) -> str:
        """As on the command line; empty for the usual harshness."""
        text = ""
        for name in ("kill_every", "break_every", "check_every"):
            if getattr(self, name) != getattr(USUAL, name):
                text += f" --{name.replace('_', '-')} {getattr(self, name)}"
        return text + (f" --failing {','.join(self.failing)}" if self.failing else "")


USUAL = Harshness()


def fuzz(
    seed: int,
    operations: int,
    workers: int,
    *,
    harshness: Harshness = USUAL,
    instrument: str = "none",
    progress: Callable[[str], None] = in_silence,
) -> FuzzResult:
    """So many random operations by so many processes, with kills; the shared state is checked between and after."""
    arguments = ("run", str(seed), str(operations), str(workers), *harshness.arguments())
    with fuzz_host() as host:
        result = run_program(host, *arguments, instrument=instrument, progress=progress)
        if not result.is_clean:
            raise_findings(host, result)
    return result


def kill_at_steps(
    only: str = "all",
    *,
    is_every_instruction: bool = False,
    stride: int = 1,
    instrument: str = "none",
    progress: Callable[[str], None] = in_silence,
) -> FuzzResult:
    """Kills a process behind each step of chosen operations (behind each `stride`-th, to be quicker)."""
    arguments = ("steps", only, str(int(is_every_instruction)), str(stride))
    with fuzz_host() as host:
        result = run_program(host, *arguments, instrument=instrument, progress=progress)
        if not result.is_clean:
            raise_findings(host, result)
    return result


def race(*, instrument: str = "none", progress: Callable[[str], None] = in_silence) -> FuzzResult:
    """The target of a checkpoint to storage dies at each step of it, and a new process takes its rows."""
    with fuzz_host() as host:
        result = run_program(host, "races", instrument=instrument, progress=progress)
        if not result.is_clean:
            raise_findings(host, result)
    return result


class FuzzFinding(HostError):
    """The software GPU broke a rule; `result` has the figures."""

    def __init__(self, message: str, result: FuzzResult) -> None:
        super().__init__(message)
        self.result = result


def raise_findings(host: Host, result: FuzzResult) -> None:
    raise FuzzFinding("\n".join([*result.findings, f"the host is left at {host.state_dir}"]), result)


def add_fuzz(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "fuzz", help="prove the software GPU: random operations with kills, on a host of its own"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=8, help="processes, 1 to 64")
    parser.add_argument("--kill-every", type=int, default=USUAL.kill_every, help="operations from kill to kill")
    parser.add_argument("--break-every", type=int, default=USUAL.break_every, help="from failure to failure")
    parser.add_argument("--check-every", type=int, default=USUAL.check_every, help="from check to check")
    parser.add_argument("--failing", default="", metavar="FUNCTIONS", help="only these fail, apart by commas")
    parser.add_argument(
        "--steps", nargs="?", const="all", metavar="OPERATION", help="kill at each step: of one, quick or all"
    )
    parser.add_argument("--races", action="store_true", help="targets of checkpoints die, others take their rows")
    parser.add_argument("--every-instruction", action="store_true", help="with --steps: at each instruction")
    parser.add_argument("--stride", type=int, default=1, help="with --steps: only at each so many-th")
    parser.add_argument("--instrument", choices=sorted(INSTRUMENTS), default="none")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.set_defaults(run=run_fuzz)


def harshness_of(options: argparse.Namespace) -> Harshness:
    failing = tuple(name for name in options.failing.split(",") if name)
    return Harshness(options.kill_every, options.break_every, options.check_every, failing)


def replay_line(options: argparse.Namespace) -> str:
    line = f"python -m softgpu fuzz --seed {options.seed} --operations {options.operations} --workers {options.workers}"
    line += harshness_of(options).flags()
    if options.steps:
        line = f"python -m softgpu fuzz --steps '{options.steps}'" + " --every-instruction" * options.every_instruction
    if options.races:
        line = "python -m softgpu fuzz --races"
    return line + (f" --instrument {options.instrument}" if options.instrument != "none" else "")


def show_progress(options: argparse.Namespace) -> Callable[[str], None]:
    def show(text: str) -> None:
        if text.isdigit():
            text = f"{int(text):,} of {options.operations:,} operations"
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    return show


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps({"label": "software GPU", **figures}, indent=2) + "\n", encoding="utf-8")


def run_fuzz(options: argparse.Namespace) -> None:
    counts = (options.operations, options.stride, options.kill_every, options.break_every, options.check_every)
    if not 1 <= options.workers <= 64 or min(counts) < 1:
        raise HostError("there are 1 to 64 workers, and all else that is counted is at least one")
    progress = show_progress(options)
    try:
        if options.races:
            result = race(instrument=options.instrument, progress=progress)
        elif options.steps:
            result = kill_at_steps(
                options.steps,
                is_every_instruction=options.every_instruction,
                stride=options.stride,
                instrument=options.instrument,
                progress=progress,
            )
        else:
            result = fuzz(
                options.seed,
                options.operations,
                options.workers,
                harshness=harshness_of(options),
                instrument=options.instrument,
                progress=progress,
            )
    except FuzzFinding as finding:
        write_figures(options.json, finding.result.figures)
        raise HostError(
            f"{finding}\nthe same choices again (processes may interleave otherwise): {replay_line(options)}"
        ) from finding
    write_figures(options.json, result.figures)
    for name, value in result.figures.items():
        if not isinstance(value, dict):
            sys.stdout.write(f"{name:<15} {value}\n")

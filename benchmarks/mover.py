"""``python -m benchmarks mover``: how fast models leave a GPU and come back, by every swap driver.

A real holder, memory broker and engine, and the node agent's own hands; on a software H100, or on a real GPU where
there is one.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

import softgpu
from benchmarks.mover_cases import PLAIN, SIZES_GB, WAYS, Case, Outcome, Setting, cases, figures
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit
from kit.process import free_port

ROOT: Final = Path(__file__).resolve().parents[1]
LINK_FRACTION_MIN: Final = 0.95
OUTSIDE_COPY_S_MAX: Final = 0.060
PARK_S_MAX: Final = 0.150
HOST_BUDGET_BYTES: Final = 200_000_000_000
"""Of phantom memory: nothing of it is ever touched."""
END_S: Final = 30.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks mover", description="Parks and wakes by every swap driver, by phase."
    )
    add = parser.add_argument
    add("--gpu", choices=("auto", "software", "real"), default="auto", help="auto: a real one where there is one")
    add("--sizes", type=float, nargs="+", default=list(SIZES_GB), metavar="GB", help="weights (default: the four)")
    add("--gpus", type=int, nargs="+", default=[1, 2], help="GPUs of a replica (default: 1 and 2)")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="swap drivers (default: all)")
    add("--repeat", type=int, default=5, help="parks and wakes of each (default: %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def _has_real_gpu() -> bool:
    """Asked in a process of its own: this one must not load a driver."""
    code = "from devices.nvml import NvmlInventory as I; print(sum(not g.is_software for g in I().gpus()))"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.returncode == 0 and int(asked.stdout or 0) > 0


@contextlib.contextmanager
def _driver(state_dir: Path, *, is_software: bool, gpu_count: int) -> Iterator[Mapping[str, str]]:
    """What makes a process use the GPUs that are meant."""
    if not is_software:
        yield {}
        return
    host = softgpu.Host(state_dir / "host", gpus=gpu_count, profile="h100-80", phantom=True).create()
    try:
        yield {**host.environment(), "SUBLET_BROKER_HOST_BUDGET_BYTES": str(HOST_BUDGET_BYTES)}
    finally:
        host.remove()


@contextlib.contextmanager
def _holder(state_dir: Path, driver: Mapping[str, str]) -> Iterator[Path]:
    environment = {**os.environ, **driver}
    environment |= {"SUBLET_HOLDER_STATE_DIR": str(state_dir / "h"), "SUBLET_HOLDER_PORT": str(free_port())}
    with (state_dir / "holder.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services", "holder"], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    try:
        yield state_dir / "h" / "holder.sock"
    finally:
        process.terminate()
        process.wait(END_S)


@contextlib.contextmanager
def _run(state_dir: Path, socket: Path, driver: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.mover_run", str(socket), str(state_dir)],
        cwd=ROOT, env={**os.environ, **driver}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(END_S)


def _ask(process: "subprocess.Popen[str]", case: Case | None) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if case is not None:
        print(msgspec.json.encode(case).decode(), file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the measured process ended; what it wrote is above")
    return line


def bars(found: Mapping[str, Value]) -> list[Bar]:
    """Over all sizes and numbers of GPUs: the worst of each."""

    def values(end: str) -> list[float]:
        return [
            value
            for name, value in found.items()
            if name.startswith("store_") and name.endswith(end) and value is not None
        ]

    return [
        Bar(
            name="store_link_fraction_min",
            value=min(values("_link_fraction"), default=None),
            op=">=",
            bar=LINK_FRACTION_MIN,
        ),
        Bar(
            name="store_outside_copy_s_max",
            value=max(values("_outside_copy_s"), default=None),
            op="<=",
            bar=OUTSIDE_COPY_S_MAX,
        ),
        Bar(name="store_park_copied_bytes_max", value=max(values("_park_copied_bytes"), default=None), op="==", bar=0),
        Bar(name="store_park_s_max", value=max(values("_park_s"), default=None), op="<=", bar=PARK_S_MAX),
    ]


def report(setting: Setting, outcomes: Sequence[Outcome]) -> Report:
    found: dict[str, Value] = {"link_gb_per_s": round(setting.link_bytes_per_s / 1e9, 2)}
    for outcome in outcomes:
        found |= figures(outcome, setting)
    problems = [f"{outcome.case.name}: {outcome.problem}." for outcome in outcomes if outcome.problem]
    names = (
        f"{setting.gpu_name}. Names are driver_GPUsxGB; medians of the cycles, `{PLAIN}` of one. floor_s is the copied "
        "bytes over the link as measured with one large copy; map_s overlaps copy_s; reserve_s is the rest of the "
        "restore. A checkpoint moves the whole process, its cache too."
    )
    notes = [names, *problems]
    return Report(benchmark="mover", label=setting.label, commit=commit(), figures=found, bars=bars(found), notes=notes)


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    is_software = options.gpu == "software" or (options.gpu == "auto" and not _has_real_gpu())
    progress = Progress()
    wanted = cases(options.ways, options.sizes, options.gpus, repeat_count=options.repeat)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    state_dir = Path(tempfile.mkdtemp(prefix="sublet-mover-", dir=base))
    try:
        with (
            _driver(state_dir, is_software=is_software, gpu_count=max(options.gpus)) as driver,
            _holder(state_dir, driver) as socket,
            _run(state_dir, socket, driver) as process,
        ):
            setting = msgspec.json.decode(_ask(process, None), type=Setting)
            outcomes = []
            for number, case in enumerate(wanted, start=1):
                progress.say(f"{number} of {len(wanted)}: {case.name}, {case.repeat_count} cycles")
                outcomes.append(msgspec.json.decode(_ask(process, case), type=Outcome))
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)
    told = report(setting, outcomes)
    print(told.table())
    if options.json is not None:
        told.write(options.json)
    return 1 if options.check and told.missed else 0

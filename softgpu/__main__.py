"""`python -m softgpu`: create a host, look at it, work its switches. The host is `--dir` or `SOFTGPU_DIR`.

A switch prints the status as it is then, with `--json` as JSON; without, one line says what was done.
"""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from softgpu.errors import HostError, SoftgpuError
from softgpu.fuzzing import add_fuzz
from softgpu.host import DEFAULT_DIRECTORY, NO_LIMIT, Host
from softgpu.library import build
from softgpu.profiles import profiles
from softgpu.view import gib, status_text

_UNITS = {"": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[_letter] = 1024**_power


FAULT_TEXTS = {
    "hang": "they wait until the faults are cleared",
    "corrupt": "copies: one bit arrives flipped",
    "lie": "limits: not set, or read as none; memory: half of what is used",
    "stale": "memory: as it was when the fault was set",
    "empty": "memory, processes: nothing in the answer",
    "unknown": "processes: without their bytes",
}


def size(text: str) -> int:
    """Bytes: `80GiB`, `53GB`, `512M` (binary, as CUDA tools read it), or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 80GiB, 53GB or a number of bytes")
    return int(float(match[1]) * unit)


def limit(text: str) -> int:
    return NO_LIMIT if text == "max" else size(text)


def delay(text: str) -> float:
    """Seconds: `250ms`, `60s`, or a plain number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 250ms, 60s or a number of seconds")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def mig(text: str) -> tuple[int, tuple[str, ...]]:
    """A GPU and the profiles of its instances: `0=1g.10gb,2g.20gb`."""
    gpu, _, names = text.partition("=")
    if not gpu.isdigit() or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is no GPU with MIG profiles; write 0=1g.10gb,2g.20gb")
    return int(gpu), tuple(names.split(","))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and where the help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> Parser:
    top = Parser(prog="python -m softgpu", description="Software GPUs for hosts without one.")
    top.add_argument("--dir", type=Path, default=Path(os.environ.get("SOFTGPU_DIR", DEFAULT_DIRECTORY)))
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    create = commands.add_parser("create", help="create a host")
    create.add_argument("--gpus", type=int, default=1)
    create.add_argument("--profile", choices=sorted(profiles()), default="h100-80")
    create.add_argument("--phantom", action="store_true", help="time and account big copies, move no bytes")
    create.add_argument("--mps", action="store_true", help="one MPS server behind all clients: it evicts")
    create.add_argument("--clean", action="store_true", help="new device memory reads as zero")
    create.add_argument(
        "--mig", type=mig, action="append", default=[], metavar="GPU=PROFILE,...",
        help="cut a GPU into MIG instances: 0=1g.10gb,2g.20gb",
    )  # fmt: skip
    create.set_defaults(run=run_create)

    commands.add_parser("status", help="devices, processes, limits, faults").set_defaults(run=run_status)
    add_settings(commands)
    add_failures(commands)
    add_health(commands)
    add_fuzz(commands)
    check = commands.add_parser("check", help="count all records again: is the shared state true? Exit status 1 if not")
    check.add_argument(
        "--quiet-host", action="store_true", help="no process is inside a call: also look for lost memory"
    )
    check.set_defaults(run=run_check)
    commands.add_parser("build", help="build the libraries and print where they are").set_defaults(run=run_build)
    commands.add_parser("env", help="print what a shell must export to use the host").set_defaults(run=run_env)
    commands.add_parser("remove", help="delete the host").set_defaults(run=run_remove)
    for name, command in commands.choices.items():
        if name not in {"build", "env", "remove", "fuzz"}:
            command.add_argument("--json", action="store_true", help="print the host's whole status as JSON")
    return top


def add_settings(commands: "argparse._SubParsersAction[Parser]") -> None:
    limits = commands.add_parser("limit", help="set a group's soft and hard limit")
    limits.add_argument("group", help="a name declared in SOFTGPU_GROUP, or a cgroup directory")
    limits.add_argument("device", type=int)
    limits.add_argument("--soft", type=size, default=0, help="guaranteed, and above it evictable under MPS; default 0")
    limits.add_argument("--hard", type=limit, default=NO_LIMIT, help="the ceiling: a size, or max (default)")
    limits.set_defaults(run=run_limit)

    mps = commands.add_parser("mps", help="put an MPS server behind all clients, or take it away")
    mps.add_argument("state", choices=("on", "off"))
    mps.set_defaults(run=run_mps)

    bandwidth = commands.add_parser("bandwidth", help="set the link's speed, per second; 0 is unlimited")
    bandwidth.add_argument("device", type=int)
    bandwidth.add_argument("h2d", type=size)
    bandwidth.add_argument("d2h", type=size)
    bandwidth.add_argument("pageable", type=size, nargs="?", default=0)
    bandwidth.set_defaults(run=run_bandwidth)

    utilization = commands.add_parser("utilization", help="set what NVML reports as utilisation")
    utilization.add_argument("device", type=int)
    utilization.add_argument("gpu_percent", type=int)
    utilization.add_argument("memory_percent", type=int)
    utilization.set_defaults(run=run_utilization)


def add_health(commands: "argparse._SubParsersAction[Parser]") -> None:
    health = commands.add_parser("health", help="set a GPU's temperature, thermal slowdown and memory errors")
    health.add_argument("device", type=int)
    health.add_argument("--temperature", type=int, metavar="C", help="degrees Celsius")
    heat = health.add_mutually_exclusive_group()
    heat.add_argument("--hot", dest="is_hot", action="store_const", const=True, help="the driver slows it down")
    heat.add_argument("--cool", dest="is_hot", action="store_const", const=False, help="no slowdown any more")
    health.add_argument("--ecc", type=int, metavar="N", help="errors so far that could not be corrected")
    health.set_defaults(run=run_health)


def add_failures(commands: "argparse._SubParsersAction[Parser]") -> None:
    fault = commands.add_parser("fault", help="let calls of a function go wrong")
    fault.add_argument("function", nargs="?", help="cuMemCreate, nvmlDeviceGetMemoryInfo, ...")
    fault.add_argument("--after", type=int, default=0, metavar="N", help="so many calls go well first; default 0")
    fault.add_argument("--times", type=int, default=1, metavar="N", help="then so many go wrong; -1: all; default 1")
    how = fault.add_mutually_exclusive_group()
    how.add_argument("--code", help="they return this: a CUDA result's name, or a number")
    how.add_argument("--delay", type=delay, metavar="TIME", help="they take so much longer: 250ms, 60s")
    for kind, text in FAULT_TEXTS.items():
        how.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=text)
    how.add_argument("--clear", action="store_true", help="remove all faults")
    fault.set_defaults(run=run_fault)

    xid = commands.add_parser("xid", help="raise an XID event")
    xid.add_argument("device", type=int)
    xid.add_argument("number", type=int)
    xid.add_argument("--strike", action="store_true", help="with what it does to everybody's contexts there")
    xid.add_argument("--pid", type=int, help="with what it does to the contexts of this process")
    xid.set_defaults(run=run_xid)

    lose = commands.add_parser("lose", help="let a GPU fall off the bus")
    lose.add_argument("device", type=int)
    lose.add_argument("--back", action="store_true", help="bring it back")
    lose.set_defaults(run=run_lose)

    fail = commands.add_parser("fail", help="let the driver give a process's checkpoint up: state FAILED")
    fail.add_argument("pid", type=int)
    fail.set_defaults(run=run_fail)


def switches(options: argparse.Namespace) -> Host:
    """A way to the switches of the host at `--dir`; the settings of this object do not matter for them."""
    return Host(options.dir, gpus=0)


def tell(options: argparse.Namespace, done: str) -> None:
    """What a switch did, or with `--json` the status after it."""
    if options.json:
        print(json.dumps(switches(options).status(), indent=2))
    else:
        print(done)


def run_create(options: argparse.Namespace) -> None:
    host = Host(
        options.dir,
        gpus=options.gpus,
        profile=options.profile,
        phantom=options.phantom,
        mps=options.mps,
        clean=options.clean,
        mig=dict(options.mig),
    ).create()
    tell(options, status_text(host.status()))


def run_status(options: argparse.Namespace) -> None:
    tell(options, status_text(switches(options).status()))


def run_limit(options: argparse.Namespace) -> None:
    if options.soft > options.hard:
        raise HostError(f"the soft limit ({gib(options.soft)}) is above the hard one ({gib(options.hard)})")
    switches(options).set_limit(options.group, device=options.device, soft_bytes=options.soft, hard_bytes=options.hard)
    hard = "max" if options.hard == NO_LIMIT else gib(options.hard)
    tell(options, f"{options.group} on GPU {options.device}: soft {gib(options.soft)}, hard {hard}")


def run_mps(options: argparse.Namespace) -> None:
    switches(options).set_mps(is_on=options.state == "on")
    tell(options, f"MPS is {options.state}")


def run_fault(options: argparse.Namespace) -> None:
    host = switches(options)
    if options.clear:
        host.clear_faults()
        tell(options, "no faults")
        return
    if not options.function:
        raise HostError("name the function that is to go wrong, or say --clear")
    kind = "delay" if options.delay is not None else options.kind or "code"
    code = (options.code or "CUDA_ERROR_UNKNOWN") if kind == "code" else None
    host.set_fault(
        options.function, after=options.after, times=options.times, code=code, kind=kind, delay_s=options.delay or 0.0
    )
    times = "all calls" if options.times < 0 else f"{options.times} of the calls"
    tell(options, f"{options.function}: {code or kind} for {times} after {options.after} good ones")


def run_xid(options: argparse.Namespace) -> None:
    host = switches(options)
    if options.strike or options.pid is not None:
        host.strike(options.device, options.number, pid=options.pid)
    else:
        host.send_xid(options.device, options.number)
    tell(options, f"XID {options.number} on GPU {options.device}")


def run_lose(options: argparse.Namespace) -> None:
    switches(options).set_lost(options.device, is_lost=not options.back)
    tell(options, f"GPU {options.device} is {'back' if options.back else 'lost'}")


def run_fail(options: argparse.Namespace) -> None:
    switches(options).fail_checkpoint(options.pid)
    tell(options, f"process {options.pid} is in the state failed")


def run_check(options: argparse.Namespace) -> None:
    findings = switches(options).check(is_quiet=options.quiet_host)
    if options.json:
        print(json.dumps({"is_clean": not findings, "findings": findings}))
    else:
        print("\n".join(findings) or "the shared state is true")
    if findings:
        sys.exit(1)


def run_bandwidth(options: argparse.Namespace) -> None:
    switches(options).set_bandwidth(options.device, h2d=options.h2d, d2h=options.d2h, pageable=options.pageable)
    tell(options, f"GPU {options.device}: {options.h2d / 1e9:g} GB/s in, {options.d2h / 1e9:g} GB/s out (0: unlimited)")


def run_utilization(options: argparse.Namespace) -> None:
    switches(options).set_utilization(
        options.device, gpu_percent=options.gpu_percent, memory_percent=options.memory_percent
    )
    tell(options, f"GPU {options.device}: NVML reports {options.gpu_percent} % and {options.memory_percent} %")


def run_health(options: argparse.Namespace) -> None:
    host = switches(options)
    host.set_health(
        options.device, temperature_c=options.temperature, is_hot=options.is_hot, ecc_error_count=options.ecc
    )
    now = host.status()["devices"][options.device]
    heat = "slowed down by heat" if now["is_hot"] else "not slowed down"
    told = f"{now['temperature_c']} degrees, {heat}, {now['ecc_error_count']} memory errors"
    tell(options, f"GPU {options.device}: {told}")


def run_build(_options: argparse.Namespace) -> None:
    print(build())


def run_env(options: argparse.Namespace) -> None:
    host = switches(options)
    host.status()  # says so when there is no host
    for name, value in host.environment().items():
        print(f"export {name}={shlex.quote(value)}")


def run_remove(options: argparse.Namespace) -> None:
    switches(options).remove()


def main() -> int:
    options = parser().parse_args()
    try:
        options.run(options)
    except SoftgpuError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

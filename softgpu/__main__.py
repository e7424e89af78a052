"""`python -m softgpu`: create a host, look at it, work its switches. The host is `--dir` or `SOFTGPU_DIR`."""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

from softgpu.errors import HostError, SoftgpuError
from softgpu.fuzzing import add_fuzz
from softgpu.host import DEFAULT_DIRECTORY, NO_LIMIT, DeviceStatus, Host, HostStatus
from softgpu.library import build
from softgpu.profiles import profiles

_UNITS = {"": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[_letter] = 1024**_power


def size(text: str) -> int:
    """Bytes: `80GiB`, `53GB`, `512M` (binary, as CUDA tools read it), or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 80GiB, 53GB or a number of bytes")
    return int(float(match[1]) * unit)


def limit(text: str) -> int:
    return NO_LIMIT if text == "max" else size(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m softgpu", description="Software GPUs for hosts without one.")
    top.add_argument("--dir", type=Path, default=Path(os.environ.get("SOFTGPU_DIR", DEFAULT_DIRECTORY)))
    commands = top.add_subparsers(required=True)

    create = commands.add_parser("create", help="create a host")
    create.add_argument("--gpus", type=int, default=1)
    create.add_argument("--profile", choices=sorted(profiles()), default="h100-80")
    create.add_argument("--phantom", action="store_true", help="time and account big copies, move no bytes")
    create.add_argument("--clean", action="store_true", help="new device memory reads as zero")
    create.set_defaults(run=run_create)

    status = commands.add_parser("status", help="devices, processes, limits, faults")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=run_status)

    check = commands.add_parser("check", help="count all records again: is the shared state true? Exit status 1 if not")
    check.add_argument(
        "--quiet-host", action="store_true", help="no process is inside a call: also look for lost memory"
    )
    check.add_argument("--json", action="store_true")
    check.set_defaults(run=run_check)

    limits = commands.add_parser("limit", help="set a group's soft and hard limit")
    limits.add_argument("group", help="a name declared in SOFTGPU_GROUP, or a cgroup directory")
    limits.add_argument("device", type=int)
    limits.add_argument("soft", type=size)
    limits.add_argument("hard", type=limit, help="a size, or max")
    limits.set_defaults(run=run_limit)

    add_failures(commands)
    add_fuzz(commands)

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

    commands.add_parser("build", help="build the libraries and print where they are").set_defaults(run=run_build)
    commands.add_parser("env", help="print what a shell must export to use the host").set_defaults(run=run_env)
    commands.add_parser("remove", help="delete the host").set_defaults(run=run_remove)
    return top


def add_failures(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fault = commands.add_parser("fault", help="let calls of a function fail")
    fault.add_argument("function", nargs="?", help="cuMemCreate, nvmlDeviceGetMemoryInfo, ...")
    fault.add_argument("after", nargs="?", type=int, default=0, help="so many calls succeed first")
    fault.add_argument("times", nargs="?", type=int, default=1, help="then so many fail; -1: all")
    fault.add_argument("code", nargs="?", default="CUDA_ERROR_UNKNOWN", help="a CUDA result's name, or a number")
    fault.add_argument("--clear", action="store_true", help="remove all faults")
    fault.set_defaults(run=run_fault)

    xid = commands.add_parser("xid", help="raise an XID event")
    xid.add_argument("device", type=int)
    xid.add_argument("number", type=int)
    xid.set_defaults(run=run_xid)

    lose = commands.add_parser("lose", help="let a GPU fall off the bus")
    lose.add_argument("device", type=int)
    lose.add_argument("--back", action="store_true", help="bring it back")
    lose.set_defaults(run=run_lose)


def gib(count: int) -> str:
    return f"{count / 1024**3:.2f} GiB"


def device_lines(device: DeviceStatus) -> list[str]:
    used = device["used_bytes"] + device["reserved_bytes"]
    memory = f"{gib(used)} / {gib(device['total_bytes'])}" + ("  LOST" if device["is_lost"] else "")
    lines = [f"GPU {device['index']}  {device['name']}  {device['uuid']}  {memory}"]
    for process in device["processes"]:
        group = f"  group {process['group']}" if process["group"] else ""
        lines.append(f"  pid {process['pid']}  {process['command']}  {gib(process['used_bytes'])}{group}")
    return lines


def status_text(status: HostStatus) -> str:
    mode = "phantom" if status["is_phantom"] else "real bytes"
    lines = [f"{status['directory']}  software GPU, {mode}, {status['chunk_count']} chunks"]
    for device in status["devices"]:
        lines += device_lines(device)
    for group in status["groups"]:
        for entry in group["limits"]:
            hard = "max" if entry["hard_bytes"] is None else gib(entry["hard_bytes"])
            lines.append(
                f"limit {group['name']}  GPU {entry['device']}  soft {gib(entry['soft_bytes'])}  hard {hard}"
                f"  used {gib(entry['used_bytes'])}"
            )
    for fault in status["faults"]:
        lines.append(f"fault {fault['function']}  after {fault['after']}  times {fault['times']}  code {fault['code']}")
    return "\n".join(lines)


def switches(options: argparse.Namespace) -> Host:
    """A way to the switches of the host at `--dir`; the settings of this object do not matter for them."""
    return Host(options.dir, gpus=0)


def run_create(options: argparse.Namespace) -> None:
    host = Host(
        options.dir, gpus=options.gpus, profile=options.profile, phantom=options.phantom, clean=options.clean
    ).create()
    print(status_text(host.status()))


def run_status(options: argparse.Namespace) -> None:
    status = switches(options).status()
    print(json.dumps(status, indent=2) if options.json else status_text(status))


def run_limit(options: argparse.Namespace) -> None:
    switches(options).set_limit(options.group, device=options.device, soft_bytes=options.soft, hard_bytes=options.hard)


def run_fault(options: argparse.Namespace) -> None:
    if options.clear:
        switches(options).clear_faults()
    elif options.function:
        switches(options).set_fault(options.function, after=options.after, times=options.times, code=options.code)
    else:
        raise HostError("name the function that is to fail, or say --clear")


def run_xid(options: argparse.Namespace) -> None:
    switches(options).send_xid(options.device, options.number)


def run_lose(options: argparse.Namespace) -> None:
    switches(options).set_lost(options.device, is_lost=not options.back)


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


def run_utilization(options: argparse.Namespace) -> None:
    switches(options).set_utilization(
        options.device, gpu_percent=options.gpu_percent, memory_percent=options.memory_percent
    )


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

"""A software GPU host: one state directory that any number of processes share."""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

from softgpu.errors import HostError
from softgpu.library import build
from softgpu.profiles import CallCost, Profile, profile_named

GPUS_MAX = 16  # DEVICE_MAX in src/host.h
NO_LIMIT = 2**64 - 1  # NVML_DEVICE_MEMORY_LIMIT_MAX
DRIVER_VERSION = 13041  # CUDA 13.4.1, as cuDriverGetVersion counts
DRIVER_TEXT = "615.00.00-softgpu"
DEFAULT_DIRECTORY = Path("/dev/shm/softgpu")  # noqa: S108  (not a temporary file: every process must find it)
CHECK_FAILED = 3  # exit status of `softgpu-control check` that found something
_CONTROL_TIMEOUT_S = 30.0
MIG_SLICES = 7  # of the processors
MIG_EIGHTHS = 8  # of the memory

# What a faulty call does besides returning a code, and on which functions softgpu knows how.
_COPIES = tuple(f"cuMemcpy{way}{form}" for way in ("", "HtoD", "DtoH", "DtoD") for form in ("", "Async"))
_LIMITS = ("nvmlDeviceSetMemoryLimits_v1", "nvmlDeviceGetMemoryLimits_v1")
_MEMORY = ("nvmlDeviceGetMemoryInfo",)
_PROCESSES = ("nvmlDeviceGetComputeRunningProcesses",)
FAULT_KINDS: Mapping[str, tuple[str, ...]] = {  # none named: all
    "code": (),
    "delay": (),
    "hang": (),
    "corrupt": _COPIES,
    "lie": _LIMITS + _MEMORY,
    "stale": _MEMORY,
    "empty": _MEMORY + _PROCESSES,
    "unknown": _PROCESSES,
}


class ProcessStatus(TypedDict):
    pid: int
    command: str
    group: str
    state: str  # running, locked, checkpointed, failed, checkpointing, restoring
    is_evicted: bool  # the MPS server ended it; its calls return CUDA_ERROR_MPS_CLIENT_TERMINATED
    poison_code: int  # what its calls on this device return since an error struck it; 0: nothing did
    context_bytes: int
    away_bytes: int  # what it will take here again when it is restored
    used_bytes: int


class DeviceStatus(TypedDict):
    index: int
    uuid: str
    name: str
    total_bytes: int
    reserved_bytes: int
    used_bytes: int
    context_bytes: int
    h2d_bytes_per_s: int
    d2h_bytes_per_s: int
    pageable_bytes_per_s: int
    h2d_moved_bytes: int
    d2h_moved_bytes: int
    eviction_count: int  # clients that the MPS server ended here
    utilization_gpu_percent: int
    temperature_c: int
    ecc_error_count: int  # that could not be corrected
    is_hot: bool  # slowed down because of its temperature
    is_mig: bool  # cut into instances, which follow as devices of their own
    mig_parent: int | None  # of an instance: the index of its GPU
    is_lost: bool
    processes: list[ProcessStatus]


class LimitStatus(TypedDict):
    device: int
    soft_bytes: int
    hard_bytes: int | None
    used_bytes: int


class GroupStatus(TypedDict):
    name: str
    limits: list[LimitStatus]


class FaultStatus(TypedDict):
    function: str
    after: int
    times: int
    kind: str  # of FAULT_KINDS
    value: int  # a code, or nanoseconds of delay
    hit_count: int  # calls that it struck
    struck_pid: int  # whose call was the last of them; 0: none yet


class HostStatus(TypedDict):
    directory: str
    driver_version: int
    is_phantom: bool
    is_mps: bool
    is_clean: bool
    recovery_count: int  # how often a process died while it changed the tables, and they were recounted
    chunk_count: int
    devices: list[DeviceStatus]
    groups: list[GroupStatus]
    faults: list[FaultStatus]


def run_control(state_dir: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs one command of `softgpu-control` on a host."""
    return subprocess.run(
        [str(build() / "softgpu-control"), *arguments],
        env={**os.environ, "SOFTGPU_DIR": str(state_dir)},
        capture_output=True,
        text=True,
        timeout=_CONTROL_TIMEOUT_S,
        check=False,
    )


def control(state_dir: Path, *arguments: str) -> str:
    """Like `run_control`; returns what it printed. Raises `HostError` with what it said when it failed."""
    finished = run_control(state_dir, *arguments)
    if finished.returncode != 0:
        raise HostError(finished.stderr.strip() or f"softgpu-control {' '.join(arguments)} failed")
    return finished.stdout


@dataclass(frozen=True)
class Host:
    """The settings of a host. Overrides that are None come from the profile.

    `state_dir` should lie on /dev/shm or another fast local file system; its path is limited to 200 characters.
    In a phantom host, copies above 64 KiB take their time and are accounted, but move no bytes; memory that is only
    copied to and from in bulk then costs no RAM.
    """

    state_dir: Path
    gpus: int
    profile: str = "h100-80"
    phantom: bool = False
    mps: bool = False  # all clients go through one MPS server: it evicts, and they share their fatal errors
    clean: bool = False  # new device memory reads as zero, not as somebody's leavings
    seed: str | None = None  # of the UUIDs; None: the name of the state directory
    name: str | None = None
    total_bytes: int | None = None
    reserved_bytes: int | None = None
    context_bytes: int | None = None
    h2d_bytes_per_s: int | None = None
    d2h_bytes_per_s: int | None = None
    pageable_bytes_per_s: int | None = None
    costs: Mapping[str, CallCost] | None = None  # replaces the profile's table; {}: calls take no longer than they do
    temperature_c: int = 40
    power_mw: int = 120_000
    utilization_gpu_percent: int = 0
    utilization_memory_percent: int = 0
    driver_version: int = field(default=DRIVER_VERSION)
    mig: Mapping[int, Sequence[str]] | None = None  # {GPU: profiles of its instances}, "1g.10gb"

    def __post_init__(self) -> None:
        instances = [(gpu, name) for gpu, names in (self.mig or {}).items() for name in names]
        if self.gpus + len(instances) > GPUS_MAX:
            raise HostError(f"a host has at most {GPUS_MAX} GPUs and MIG instances together")
        for gpu, names in (self.mig or {}).items():
            parts = [mig_parts(name) for name in names]
            if gpu >= self.gpus or sum(s for s, _ in parts) > MIG_SLICES or sum(m for _, m in parts) > MIG_EIGHTHS:
                raise HostError(f"GPU {gpu} cannot be cut into {', '.join(names)}")
        if not 0 <= self.gpus <= GPUS_MAX:
            raise HostError(f"a host has 0 to {GPUS_MAX} GPUs, not {self.gpus}")
        if len(str(self.state_dir.absolute())) > 200:
            raise HostError(f"the path of a host is limited to 200 characters: {self.state_dir}")
        profile_named(self.profile)

    def uuids(self) -> tuple[str, ...]:
        """The UUIDs of the GPUs: the same for the same seed and index, whatever the profile."""
        return tuple(_dashed(self._uuid_hex(index)) for index in range(self.gpus))

    def mig_uuids(self) -> tuple[str, ...]:
        """The UUIDs of the MIG instances, in the order of their GPUs and profiles."""
        return tuple(
            _dashed(self._uuid_hex(index)).replace("GPU-", "MIG-")
            for index in range(self.gpus, self.gpus + len(self._mig_lines(profile_named(self.profile))))
        )

    def _mig_lines(self, profile: Profile) -> list[str]:
        """For each instance its GPU, its number, its sevenths, its bytes, its UUID in hexadecimal and its name."""
        lines: list[str] = []
        usable_bytes = _either(self.total_bytes, profile.total_bytes) - _either(
            self.reserved_bytes, profile.reserved_bytes
        )
        title = profile.name if self.name is None else self.name
        for gpu, names in sorted((self.mig or {}).items()):
            for number, name in enumerate(names):
                slices, eighths = mig_parts(name)
                size_bytes = usable_bytes * eighths // MIG_EIGHTHS >> 20 << 20
                uuid = self._uuid_hex(self.gpus + len(lines))
                lines.append(f"{gpu} {number + 1} {slices} {size_bytes} {uuid} {title} MIG {name}")
        return lines

    def environment(self, *, group: str | None = None) -> dict[str, str]:
        """What a process needs to use this host; add it to the environment. `group` declares its group of limits."""
        directory = str(build())
        inherited = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path and path != directory]
        variables = {
            "LD_LIBRARY_PATH": ":".join([directory, *inherited]),
            "SOFTGPU_DIR": str(self.state_dir.absolute()),
        }
        if group is not None:
            variables["SOFTGPU_GROUP"] = group
        return variables

    def load(self) -> None:
        """Makes this very process use the host: call it before the first use of CUDA or NVML. One host a process."""
        os.environ["SOFTGPU_DIR"] = str(self.state_dir.absolute())
        for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
            ctypes.CDLL(str(build() / name), mode=ctypes.RTLD_GLOBAL)

    def create(self) -> "Host":
        """Creates the host, or adopts it as it runs when it was created with the same settings. Returns itself."""
        build()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        with (self.state_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            settings, wanted = self.state_dir / "settings", self._settings_text()
            if (self.state_dir / "state").exists():
                if settings.read_text(encoding="utf-8") != wanted:
                    raise HostError(f"{self.state_dir} holds a host with other settings: remove it first")
                return self
            settings.write_text(wanted, encoding="utf-8")
            control(self.state_dir.absolute(), "create")
        return self

    def remove(self) -> None:
        """Deletes the host. Processes that still use it keep what they have mapped and can start nothing new."""
        if (self.state_dir / "settings").exists():
            shutil.rmtree(self.state_dir, ignore_errors=True)

    def status(self) -> HostStatus:
        """The host as it is now, dead processes already tidied away."""
        return cast(HostStatus, json.loads(self._control("status")))

    def check(self, *, is_quiet: bool = False) -> list[str]:
        """What is wrong with the shared state, in sentences; empty when all rules hold.

        Counts the records again, compares them with the sums and with the files; callable at any time. `is_quiet` says
        that no process is inside a call: then every piece of memory must also be held by somebody.
        """
        finished = run_control(self.state_dir.absolute(), "check", str(int(is_quiet)))
        if finished.returncode not in (0, CHECK_FAILED):
            raise HostError(finished.stderr.strip() or "softgpu-control check failed")
        return finished.stdout.splitlines()

    def set_limit(self, group: str, *, device: int, soft_bytes: int, hard_bytes: int | None) -> None:
        """Sets a group's limits as `nvmlDeviceSetMemoryLimits_v1` does. `group` is a declared name or a cgroup path."""
        hard = NO_LIMIT if hard_bytes is None else hard_bytes
        self._control("limit", group, str(device), str(soft_bytes), str(hard))

    def set_fault(
        self,
        function: str,
        *,
        after: int = 0,
        times: int = 1,
        code: int | str | None = None,
        kind: str = "code",
        delay_s: float = 0.0,
    ) -> None:
        """The calls of a function go wrong: the first `after` do not, then `times` do (-1: all).

        By `kind`: `code` returns `code` (a CUDA result's name, or a number; NVML's own for NVML), `delay` takes
        `delay_s` longer, `hang` waits until faults are cleared, `corrupt` flips one bit of what is copied, `lie` does
        not set a limit, reads none or halves the used memory, `stale` answers as of now, `empty` with nothing,
        `unknown` lists processes without their bytes.

        Version suffixes do not matter: `cuMemAlloc` also means `cuMemAlloc_v2`. Raises `HostError` for a function that
        softgpu does not model, or not in this way.
        """
        known = FAULT_KINDS.get(kind)
        if known is None:
            raise HostError(f"there is no kind of fault {kind!r}; known: {', '.join(FAULT_KINDS)}")
        if not is_modelled(function):
            raise HostError(f"softgpu does not model {function}, so a fault of it would never come")
        if known and function not in known:
            raise HostError(f"a fault of the kind {kind} can be set for {', '.join(known)}; not for {function}")
        if (code is None) == (kind == "code"):
            raise HostError("a fault returns a code, or is of another kind: say one of them")
        value = code if code is not None else round(delay_s * 1e9)
        self._control("fault", function, str(after), str(times), kind, str(value))

    def clear_faults(self) -> None:
        self._control("clear-faults")

    def send_xid(self, device: int, number: int) -> None:
        """Raises an XID event, as the driver does for a hardware or driver error. Nothing else happens."""
        self._control("xid", str(device), str(number))

    def strike(self, device: int, xid: int, *, pid: int | None = None) -> None:
        """An error strikes: the XID event, and what it does to the contexts of `pid`, or of all on that device.

        Under MPS all of a device's clients suffer in either case.
        """
        self._control("strike", str(device), str(xid), str(pid or 0))

    def fail_checkpoint(self, pid: int) -> None:
        """The driver gives a process up: its checkpoint state is FAILED, and only a restart helps."""
        self._control("fail", str(pid))

    def end_client(self, pid: int) -> None:
        """The MPS server ends a process's use of the GPUs for good, as ``terminate_client`` tells it to."""
        self._control("end", str(pid))

    def set_mps(self, *, is_on: bool) -> None:
        """Whether an MPS server stands behind all clients from now on."""
        self._control("mps", str(int(is_on)))

    def set_lost(self, device: int, *, is_lost: bool = True) -> None:
        """The GPU falls off the bus (XID 79), or comes back. Contexts that were on it stay broken."""
        self._control("lose", str(device), "1" if is_lost else "0")

    def set_bandwidth(self, device: int, *, h2d: int, d2h: int, pageable: int) -> None:
        """Link speed from now on, in bytes per second; 0 is as fast as this machine copies."""
        self._control("bandwidth", str(device), str(h2d), str(d2h), str(pageable))

    def set_utilization(self, device: int, *, gpu_percent: int, memory_percent: int) -> None:
        """What NVML reports as utilisation; softgpu runs no kernels, so somebody has to say it."""
        self._control("utilization", str(device), str(gpu_percent), str(memory_percent))

    def set_health(
        self,
        device: int,
        *,
        temperature_c: int | None = None,
        is_hot: bool | None = None,
        ecc_error_count: int | None = None,
    ) -> None:
        """What NVML tells of a GPU's temperature, its thermal slowdown and its memory errors; None: as it is."""
        now = self.status()["devices"][device]
        numbers = (
            now["temperature_c"] if temperature_c is None else temperature_c,
            int(now["is_hot"] if is_hot is None else is_hot),
            now["ecc_error_count"] if ecc_error_count is None else ecc_error_count,
        )
        self._control("health", str(device), *map(str, numbers))

    def _control(self, *arguments: str) -> str:
        return control(self.state_dir.absolute(), *arguments)

    def _uuid_hex(self, index: int) -> str:
        seed = self.state_dir.name if self.seed is None else self.seed
        return hashlib.sha256(f"softgpu:{seed}:{index}".encode()).hexdigest()[:32]

    def _settings_text(self) -> str:
        profile = profile_named(self.profile)
        costs = profile.costs if self.costs is None else self.costs
        lines = [f"{key} {value}" for key, value in self._values(profile).items()]
        lines += [f"cost {call} {cost.call_ns} {cost.gib_ns}" for call, cost in sorted(costs.items())]
        lines += [f"uuid {index} {self._uuid_hex(index)}" for index in range(self.gpus)]
        lines += [f"mig {line}" for line in self._mig_lines(profile)]
        return "\n".join(lines) + "\n"

    def _values(self, profile: Profile) -> dict[str, int | str]:
        return {
            "device_count": self.gpus,
            "driver_version": self.driver_version,
            "driver_text": DRIVER_TEXT,
            "is_phantom": int(self.phantom),
            "is_mps": int(self.mps),
            "is_clean": int(self.clean or os.environ.get("SOFTGPU_CLEAN") == "1"),
            "name": profile.name if self.name is None else self.name,
            "compute_major": profile.compute_major,
            "compute_minor": profile.compute_minor,
            "multiprocessor_count": profile.multiprocessor_count,
            "architecture": profile.architecture,
            "pci_device_id": profile.pci_device_id,
            "pcie_generation": profile.pcie_generation,
            "pcie_width": profile.pcie_width,
            "temperature_c": self.temperature_c,
            "power_mw": self.power_mw,
            "power_limit_mw": profile.power_limit_mw,
            "utilization_gpu_percent": self.utilization_gpu_percent,
            "utilization_memory_percent": self.utilization_memory_percent,
            "total_bytes": _either(self.total_bytes, profile.total_bytes),
            "reserved_bytes": _either(self.reserved_bytes, profile.reserved_bytes),
            "context_bytes": _either(self.context_bytes, profile.context_bytes),
            "h2d_bytes_per_s": _either(self.h2d_bytes_per_s, profile.h2d_bytes_per_s),
            "d2h_bytes_per_s": _either(self.d2h_bytes_per_s, profile.d2h_bytes_per_s),
            "pageable_bytes_per_s": _either(self.pageable_bytes_per_s, profile.pageable_bytes_per_s),
        }


def mig_parts(name: str) -> tuple[int, int]:
    """(sevenths of the processors, eighths of the memory) of a MIG profile, by NVIDIA's names for A100 and H100."""
    slices = re.fullmatch(r"([12347])g\.\d+gb", name)
    if slices is None:
        raise HostError(f"there is no MIG profile {name!r}; write for example 1g.10gb, 2g.20gb, 3g.40gb, 7g.80gb")
    count = int(slices[1])
    return count, {1: 1, 2: 2, 3: 4, 4: 4, 7: 8}[count]


def is_modelled(function: str) -> bool:
    """Whether one of the two libraries exports a function of that name, in some version.

    Loading a library starts nothing.
    """
    library = ctypes.CDLL(str(build() / ("libnvidia-ml.so.1" if function.startswith("nvml") else "libcuda.so.1")))
    return any(hasattr(library, function + suffix) for suffix in ("", "_v2", "_v3", "_v4"))


def _either(override: int | None, default: int) -> int:
    return default if override is None else override


def _dashed(digits: str) -> str:
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

"""Calls every function that libnvidia-ml exports, by its exported name, and checks each answer; see exported.py."""

import ctypes as c
import json
import os
import subprocess
import sys
from typing import Any

from tests.unit.softgpu.exported import LIBRARIES, MIB, ask, call, called, text

NVML_NOT_SUPPORTED, NVML_INVALID, NVML_NOT_FOUND, NVML_TIMEOUT = 3, 2, 6, 10


def nvml() -> None:
    call("nvmlShutdown", gives=1)
    call("nvmlInit")
    call("nvmlInit_v2")
    call("nvmlInitWithFlags", 0)
    LIBRARIES["nv"].nvmlErrorString.restype = c.c_char_p
    called.add("nvmlErrorString")
    assert LIBRARIES["nv"].nvmlErrorString(15) == b"GPU is lost"
    assert text("nvmlSystemGetDriverVersion") == "615.00.00-softgpu"
    assert text("nvmlSystemGetNVMLVersion") == "13.615.00.00-softgpu"
    assert {ask(name, c.c_int) for name in ("nvmlSystemGetCudaDriverVersion", "nvmlSystemGetCudaDriverVersion_v2")} == {
        13041
    }
    name = c.create_string_buffer(64)
    call("nvmlSystemGetProcessName", os.getpid(), name, 64)
    assert name.value
    call("nvmlSystemGetProcessName", 2**22 + 5, name, 64, gives=NVML_NOT_FOUND)
    assert {ask(name, c.c_uint) for name in ("nvmlDeviceGetCount", "nvmlDeviceGetCount_v2")} == {2}
    gpu = find_gpu()
    plain_questions(gpu)
    usage(gpu)
    limits(gpu)
    events(gpu)
    for _ in range(3):
        call("nvmlShutdown")
    call("nvmlDeviceGetCount_v2", c.byref(c.c_uint()), gives=1)


def find_gpu() -> int:
    gpu = c.c_void_p()
    call("nvmlDeviceGetHandleByIndex", 1, c.byref(gpu))
    other = ask_by(gpu, "nvmlDeviceGetHandleByIndex_v2", 1)
    uuid = text("nvmlDeviceGetUUID", gpu)
    assert uuid.startswith("GPU-")
    pci = c.create_string_buffer(128)
    call("nvmlDeviceGetPciInfo", gpu, pci)
    call("nvmlDeviceGetPciInfo_v3", gpu, pci)
    bus = pci.raw[:16].rstrip(b"\0")
    found = [
        other,
        ask_by(gpu, "nvmlDeviceGetHandleByUUID", uuid.encode()),
        ask_by(gpu, "nvmlDeviceGetHandleByPciBusId", bus),
        ask_by(gpu, "nvmlDeviceGetHandleByPciBusId_v2", bus),
    ]
    assert found == [gpu.value] * 4
    call("nvmlDeviceGetHandleByUUID", b"GPU-none", c.byref(gpu), gives=NVML_NOT_FOUND)
    call("nvmlDeviceGetHandleByIndex_v2", 2, c.byref(gpu), gives=NVML_INVALID)
    assert found[0]
    return found[0]


def ask_by(_gpu: Any, name: str, argument: Any) -> int:
    found = c.c_void_p()
    call(name, argument, c.byref(found))
    return found.value or 0


def plain_questions(gpu: int) -> None:
    answers = {
        "nvmlDeviceGetIndex": 1,
        "nvmlDeviceGetMinorNumber": 1,
        "nvmlDeviceGetArchitecture": 9,
        "nvmlDeviceGetPersistenceMode": 1,
        "nvmlDeviceGetComputeMode": 0,
        "nvmlDeviceGetPowerUsage": 120_000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetPowerManagementLimit": 700_000,
        "nvmlDeviceGetMaxPcieLinkGeneration": 5,
        "nvmlDeviceGetCurrPcieLinkGeneration": 5,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
    }
    for name, expected in answers.items():
        assert ask(name, c.c_uint, gpu, first=False) == expected, name
    assert text("nvmlDeviceGetName", gpu) == "Softgpu Test 1GiB"
    major, minor = c.c_int(), c.c_int()
    call("nvmlDeviceGetCudaComputeCapability", gpu, c.byref(major), c.byref(minor))
    assert (major.value, minor.value) == (9, 0)
    assert ask("nvmlDeviceGetTemperature", c.c_uint, gpu, 0, first=False) == 40
    call("nvmlDeviceGetTemperature", gpu, 1, c.byref(c.c_uint()), gives=NVML_INVALID)
    rates = (c.c_uint * 2)(1, 1)
    call("nvmlDeviceGetUtilizationRates", gpu, rates)
    assert list(rates) == [0, 0]
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        assert ask(name, c.c_ulonglong, gpu, first=False) == 0
    errors = c.c_ulonglong(7)
    call("nvmlDeviceGetTotalEccErrors", gpu, 1, 0, c.byref(errors))
    assert errors.value == 0
    call("nvmlDeviceGetTotalEccErrors", gpu, 2, 0, c.byref(errors), gives=NVML_INVALID)
    no_instances(gpu)


def no_instances(gpu: int) -> None:
    """Of a GPU that is not cut; one that is cut: `test_mig.py`."""
    call("nvmlDeviceGetMigMode", gpu, c.byref(c.c_uint()), c.byref(c.c_uint()), gives=NVML_NOT_SUPPORTED)
    assert ask("nvmlDeviceGetMaxMigDeviceCount", c.c_uint, gpu, first=False) == 0
    assert ask("nvmlDeviceIsMigDeviceHandle", c.c_uint, gpu, first=False) == 0
    found = c.c_void_p()
    call("nvmlDeviceGetMigDeviceHandleByIndex", gpu, 0, c.byref(found), gives=NVML_NOT_FOUND)
    call("nvmlDeviceGetMigDeviceHandleByIndex", gpu, 7, c.byref(found), gives=NVML_INVALID)
    for name in ("nvmlDeviceGetGpuInstanceId", "nvmlDeviceGetComputeInstanceId"):
        call(name, gpu, c.byref(c.c_uint()), gives=NVML_INVALID)
    call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", gpu, c.byref(found), gives=NVML_INVALID)
    call("nvmlDeviceGetAttributes_v2", gpu, (c.c_ulonglong * 8)(), gives=NVML_INVALID)


def usage(gpu: int) -> None:
    first = (c.c_ulonglong * 3)()
    call("nvmlDeviceGetMemoryInfo", gpu, first)
    assert list(first) == [256 * MIB, 256 * MIB, 0]
    second = (c.c_ulonglong * 5)(40 | 2 << 24)
    call("nvmlDeviceGetMemoryInfo_v2", gpu, second)
    assert list(second)[1:] == [256 * MIB, 0, 256 * MIB, 0]
    call("nvmlDeviceGetMemoryInfo_v2", gpu, (c.c_ulonglong * 5)(1), gives=25)
    bar = (c.c_ulonglong * 3)()
    call("nvmlDeviceGetBAR1MemoryInfo", gpu, bar)
    assert bar[0] == 256 * MIB
    used_gpu = ask_by(None, "nvmlDeviceGetHandleByIndex_v2", 0)
    for name, expected in (
        ("nvmlDeviceGetComputeRunningProcesses_v2", 1),
        ("nvmlDeviceGetComputeRunningProcesses_v3", 1),
        ("nvmlDeviceGetGraphicsRunningProcesses_v3", 0),
        ("nvmlDeviceGetMPSComputeRunningProcesses_v3", 0),
    ):
        count, rows = c.c_uint(8), (c.c_ulonglong * 24)()
        call(name, used_gpu, c.byref(count), rows)
        assert count.value == expected, name
        assert rows[0] & 0xFFFFFFFF == (os.getpid() if expected else 0)


def limits(gpu: int) -> None:
    name = c.c_char_p(b"team")

    class Set(c.Structure):
        _fields_ = (("name", c.c_char_p), ("soft", c.c_ulonglong), ("hard", c.c_ulonglong))

    class Get(c.Structure):
        _fields_ = (*Set._fields_, ("used", c.c_ulonglong))

    call("nvmlDeviceSetMemoryLimits_v1", gpu, c.byref(Set(name.value, 2, 1)), gives=NVML_INVALID)
    call("nvmlDeviceSetMemoryLimits_v1", gpu, c.byref(Set(name.value, MIB, 2 * MIB)))
    found = Get(name.value)
    call("nvmlDeviceGetMemoryLimits_v1", gpu, c.byref(found))
    assert (found.soft, found.hard, found.used) == (MIB, 2 * MIB, 0)
    call("nvmlDeviceSetMemoryLimits_v1", gpu, c.byref(Set(name.value, 0, 2**64 - 1)))


def events(gpu: int) -> None:
    watched = ask("nvmlEventSetCreate", c.c_void_p)
    assert ask("nvmlDeviceGetSupportedEventTypes", c.c_ulonglong, gpu, first=False) & 8
    call("nvmlDeviceRegisterEvents", gpu, 8, watched)
    data = (c.c_ulonglong * 4)()
    call("nvmlEventSetWait", watched, data, 0, gives=NVML_TIMEOUT)
    control = os.environ["SOFTGPU_CONTROL"]
    subprocess.run([control, "xid", "1", "79"], check=True)
    call("nvmlEventSetWait_v2", watched, data, 2000)
    assert (data[0], data[1], data[2]) == (gpu, 8, 79)
    call("nvmlEventSetFree", watched)


def main() -> None:
    call("cuInit", 0)
    call("cuCtxSetCurrent", ask("cuDevicePrimaryCtxRetain", c.c_void_p, 0))
    ask("cuMemAlloc_v2", c.c_uint64, 4 * MIB)
    nvml()
    sys.stdout.write(json.dumps(sorted(called)) + "\n")


if __name__ == "__main__":
    main()

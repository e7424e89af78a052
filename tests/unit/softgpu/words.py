"""Short words over the unmodified cuda.bindings and pynvml, for the child programs of these tests."""

import ctypes
import json
import os
import socket
import sys
import time
from typing import Any

import pynvml as nv
from cuda.bindings import driver as cu

__all__ = [
    "FD",
    "GiB",
    "MiB",
    "access",
    "connect",
    "context",
    "create",
    "ctypes",
    "cu",
    "error",
    "free_and_total",
    "gpu",
    "json",
    "limits",
    "map_memory",
    "nv",
    "ok",
    "os",
    "peek",
    "poke",
    "say",
    "set_limits",
    "socket",
    "sys",
    "time",
    "wait",
]  # fmt: skip

MiB, GiB = 1 << 20, 1 << 30
FD = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def ok(answer: tuple[Any, ...]) -> Any:
    if answer[0] != cu.CUresult.CUDA_SUCCESS:
        raise RuntimeError(answer[0].name)
    return answer[1] if len(answer) == 2 else answer[1:] or None


def error(answer: tuple[Any, ...]) -> str:
    return str(answer[0].name)


def context(index: int = 0) -> None:
    ok(cu.cuInit(0))
    ok(cu.cuCtxSetCurrent(ok(cu.cuDevicePrimaryCtxRetain(ok(cu.cuDeviceGet(index))))))


def free_and_total() -> tuple[int, int]:
    free, total = ok(cu.cuMemGetInfo())
    return free // MiB, total // MiB


def properties(index: int = 0) -> Any:
    wanted = cu.CUmemAllocationProp()
    wanted.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = index
    wanted.requestedHandleTypes = FD
    return wanted


def create(size: int, index: int = 0) -> Any:
    """The raw answer of cuMemCreate."""
    return cu.cuMemCreate(size, properties(index), 0)


def access(index: int = 0, *, is_writable: bool = True) -> Any:
    flags = cu.CUmemAccess_flags
    right = cu.CUmemAccessDesc()
    right.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    right.location.id = index
    right.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if is_writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    return right


def map_memory(handle: Any, size: int, *, is_writable: bool = True) -> int:
    address = ok(cu.cuMemAddressReserve(size, 0, 0, 0))
    ok(cu.cuMemMap(address, size, 0, handle, 0))
    ok(cu.cuMemSetAccess(address, size, [access(is_writable=is_writable)], 1))
    return int(address)


def poke(address: Any, text: bytes, offset: int = 0) -> None:
    ok(cu.cuMemcpyHtoD(int(address) + offset, text, len(text)))


def peek(address: Any, size: int, offset: int = 0) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    ok(cu.cuMemcpyDtoH(buffer, int(address) + offset, size))
    return buffer.raw


def gpu(index: int = 0) -> Any:
    nv.nvmlInit()
    return nv.nvmlDeviceGetHandleByIndex(index)


def set_limits(group: str, soft: int, hard: int | None) -> None:
    wanted = nv.c_nvmlSetMemoryLimits_v1_t()
    wanted.nameSpace = group.encode()
    wanted.softLimit = soft
    wanted.hardLimit = nv.NVML_DEVICE_MEMORY_LIMIT_MAX if hard is None else hard
    nv.nvmlDeviceSetMemoryLimits_v1(gpu(), wanted)


def limits(group: str) -> tuple[int, int, int]:
    found = nv.c_nvmlGetMemoryLimits_v1_t()
    found.nameSpace = group.encode()
    nv.nvmlDeviceGetMemoryLimits_v1(gpu(), found)
    return found.softLimit, found.hardLimit, found.currentUsed


def say(*values: Any) -> None:
    """One line of JSON to the test."""
    sys.stdout.write(json.dumps(values[0] if len(values) == 1 else values) + "\n")
    sys.stdout.flush()


def wait() -> str:
    """Until the test says go on; what it said."""
    return sys.stdin.readline().strip()


def connect() -> socket.socket:
    """The connection to the test, which passes file descriptors."""
    return socket.socket(fileno=int(os.environ["TEST_SOCKET"]))

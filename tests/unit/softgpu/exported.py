"""Calls every function that libcuda exports, by its exported name, and checks each answer.

Run as a program on a host with two GPUs. It ends with a line of JSON: the names that it called.
"""

import ctypes as c
import json
import os
import subprocess
import sys
from typing import Any

MIB = 1 << 20
OK, INVALID, OUT_OF_MEMORY, NOT_FOUND = 0, 1, 2, 500
INVALID_CONTEXT, INVALID_HANDLE = 201, 400
FILE_DESCRIPTOR = 1

called: set[str] = set()
LIBRARIES = {"cu": c.CDLL("libcuda.so.1"), "nv": c.CDLL("libnvidia-ml.so.1")}


def call(name: str, *arguments: Any, gives: int = OK) -> None:
    """Calls an export, which must answer `gives`. Plain integers go as 64 bits, which fits narrower ones too."""
    called.add(name)
    function = getattr(LIBRARIES[name[:2]], name)
    function.restype = c.c_int
    answer = function(*(c.c_uint64(one & 2**64 - 1) if isinstance(one, int) else one for one in arguments))
    assert answer == gives, f"{name} answered {answer} instead of {gives}"


def ask(name: str, kind: Any, *arguments: Any, first: bool = True) -> Any:
    """The value that an export writes through a pointer, its first argument or its last."""
    value = kind()
    place = c.byref(value)
    call(name, *((place, *arguments) if first else (*arguments, place)))
    return value.value if hasattr(value, "value") else value


def text(name: str, *before: Any, after: tuple[Any, ...] = ()) -> str:
    buffer = c.create_string_buffer(96)
    call(name, *before, buffer, 96, *after)
    return buffer.value.decode()


class Location(c.Structure):
    _fields_ = (("type", c.c_int), ("id", c.c_int))


class Access(c.Structure):
    _fields_ = (("location", Location), ("flags", c.c_int))


class Properties(c.Structure):
    _fields_ = (
        ("type", c.c_int),
        ("handle_types", c.c_int),
        ("location", Location),
        ("security", c.c_void_p),
        ("flags", c.c_ubyte * 8),
    )


class PoolProperties(c.Structure):
    _fields_ = (
        ("type", c.c_int),
        ("handle_types", c.c_int),
        ("location", Location),
        ("security", c.c_void_p),
        ("max_size", c.c_size_t),
        ("rest", c.c_ubyte * 56),
    )


Uuid = c.c_ubyte * 16
Token = c.c_ubyte * 64


class IpcToken(c.Structure):  # by value
    _fields_ = (("bytes", Token),)


class PerDevice(c.Structure):
    _fields_ = (("address", c.c_uint64), ("size", c.c_size_t), ("stream", c.c_void_p))


class StorageInfo(c.Structure):
    _fields_ = (("handle", c.c_void_p), ("devices", c.POINTER(PerDevice)), ("count", c.c_uint))


class CheckpointArguments(c.Structure):
    _fields_ = (("info", c.POINTER(c.POINTER(StorageInfo))), ("rest", c.c_ubyte * 56))


class RestoreArguments(c.Structure):
    _fields_ = (
        ("pairs", c.c_void_p),
        ("count", c.c_uint),
        ("padding", c.c_uint),
        ("info", c.POINTER(c.POINTER(StorageInfo))),
        ("rest", c.c_ubyte * 40),
    )


def start() -> None:
    call("cuDeviceGetCount", c.byref(c.c_int()), gives=3)
    call("cuInit", 1, gives=INVALID)
    call("cuInit", 0)
    assert ask("cuDriverGetVersion", c.c_int) == 13041
    name = c.c_char_p()
    call("cuGetErrorName", 2, c.byref(name))
    assert name.value == b"CUDA_ERROR_OUT_OF_MEMORY"
    call("cuGetErrorString", 2, c.byref(name))
    assert name.value == b"out of memory"
    call("cuGetErrorName", 31337, c.byref(name), gives=INVALID)
    function = c.c_void_p()
    status = c.c_int()
    call("cuGetProcAddress_v2", b"cuMemAlloc", c.byref(function), 12000, 0, c.byref(status))
    assert function.value == c.cast(LIBRARIES["cu"].cuMemAlloc_v2, c.c_void_p).value
    call("cuGetProcAddress", b"cuCtxCreate", c.byref(function), 3020, 0)
    assert function.value == c.cast(LIBRARIES["cu"].cuCtxCreate_v2, c.c_void_p).value
    call("cuGetProcAddress", b"cuCtxCreate", c.byref(function), 1000, 0, gives=NOT_FOUND)
    call("cuGetExportTable", c.byref(function), Uuid(), gives=NOT_FOUND)
    assert function.value is None


def devices() -> None:
    assert ask("cuDeviceGetCount", c.c_int) == 2
    assert ask("cuDeviceGet", c.c_int, 1) == 1
    call("cuDeviceGet", c.byref(c.c_int()), 2, gives=101)
    assert text("cuDeviceGetName", after=(1,)) == "Softgpu Test 1GiB"
    assert ask("cuDeviceTotalMem_v2", c.c_size_t, 0) == 256 * MIB
    assert ask("cuDeviceGetAttribute", c.c_int, 75, 0) == 9
    bus = text("cuDeviceGetPCIBusId", after=(1,))
    assert ask("cuDeviceGetByPCIBusId", c.c_int, bus.encode()) == 1
    call("cuDeviceGetByPCIBusId", c.byref(c.c_int()), b"0000:ff:00.0", gives=101)
    uuid = Uuid()
    call("cuDeviceGetUuid_v2", uuid, 0)
    assert any(uuid)
    minor = c.c_int()
    assert ask("cuDeviceComputeCapability", c.c_int, c.byref(minor), 0) == 9
    assert ask("cuDeviceCanAccessPeer", c.c_int, 0, 1) == 0


def contexts() -> int:
    call("cuCtxGetDevice", c.byref(c.c_int()), gives=INVALID_CONTEXT)
    call("cuDevicePrimaryCtxSetFlags_v2", 1, 4)
    second = ask("cuDevicePrimaryCtxRetain", c.c_void_p, 1)
    flags, active = c.c_uint(), c.c_int()
    call("cuDevicePrimaryCtxGetState", 1, c.byref(flags), c.byref(active))
    assert (flags.value, active.value) == (4, 1)
    call("cuDevicePrimaryCtxReset_v2", 1)
    call("cuDevicePrimaryCtxGetState", 1, None, c.byref(active))
    assert active.value == 0
    call("cuDevicePrimaryCtxRelease_v2", 1, gives=INVALID_CONTEXT)
    primary = ask("cuDevicePrimaryCtxRetain", c.c_void_p, 0)
    assert primary != second
    call("cuCtxSetCurrent", primary)
    for name, extra in (("cuCtxCreate_v2", ()), ("cuCtxCreate_v3", (None, 0)), ("cuCtxCreate_v4", (None,))):
        made = ask(name, c.c_void_p, *extra, 0, 1)
        assert ask("cuCtxGetCurrent", c.c_void_p) == made
        assert ask("cuCtxGetDevice", c.c_int) == 1
        assert ask("cuCtxGetDevice_v2", c.c_int, primary) == 0
        assert ask("cuCtxPopCurrent_v2", c.c_void_p) == made
        call("cuCtxPushCurrent_v2", made)
        call("cuCtxDestroy_v2", made)
        assert ask("cuCtxGetCurrent", c.c_void_p) == primary
    call("cuCtxDestroy_v2", primary, gives=INVALID_CONTEXT)
    assert ask("cuCtxGetFlags", c.c_uint) == 0
    identity = c.c_ulonglong()
    call("cuCtxGetId", None, c.byref(identity))
    assert identity.value
    assert ask("cuCtxGetApiVersion", c.c_uint, None, first=False) == 3020
    least, greatest = c.c_int(), c.c_int()
    call("cuCtxGetStreamPriorityRange", c.byref(least), c.byref(greatest))
    assert (least.value, greatest.value) == (0, -5)
    call("cuCtxSynchronize")
    call("cuCtxSynchronize_v2", None)
    return int(primary)


def memory() -> int:
    address = ask("cuMemAlloc_v2", c.c_uint64, 4 * MIB)
    free = c.c_size_t()
    total = c.c_size_t()
    call("cuMemGetInfo_v2", c.byref(free), c.byref(total))
    assert (free.value, total.value) == (252 * MIB, 256 * MIB)
    base, size = c.c_uint64(), c.c_size_t()
    call("cuMemGetAddressRange_v2", c.byref(base), c.byref(size), address + 5)
    assert (base.value, size.value) == (address, 4 * MIB)
    pitch = c.c_size_t()
    pitched = ask("cuMemAllocPitch_v2", c.c_uint64, c.byref(pitch), 1000, 4, 4)
    assert pitch.value == 1024
    call("cuMemFree_v2", pitched)
    call("cuMemFree_v2", pitched, gives=INVALID)
    call("cuMemAlloc_v2", c.byref(base), 2**64 - 1, gives=OUT_OF_MEMORY)
    assert ask("cuPointerGetAttribute", c.c_int, 9, address) == 0
    token = IpcToken()
    call("cuIpcGetMemHandle", c.byref(token), address)
    assert any(token.bytes)
    call("cuIpcOpenMemHandle_v2", c.byref(base), token, 1, gives=INVALID)  # a process's own
    kinds = (c.c_int * 2)(2, 11)
    kind, start_of = c.c_uint(), c.c_uint64()
    places = (c.c_void_p * 2)(c.addressof(kind), c.addressof(start_of))
    call("cuPointerGetAttributes", 2, kinds, places, address + 9)
    assert (kind.value, start_of.value) == (2, address)
    return int(address)


def read(address: int, size: int) -> bytes:
    buffer = c.create_string_buffer(size)
    call("cuMemcpyDtoH_v2", buffer, address, size)
    return buffer.raw


def copies(address: int) -> None:
    source = c.create_string_buffer(b"0123456789", 10)
    call("cuMemcpyHtoD_v2", address, source, 10)
    call("cuMemcpyDtoD_v2", address + 100, address, 10)
    call("cuMemcpy", address + 200, address + 100, 10)
    call("cuMemcpyHtoDAsync_v2", address + 300, source, 10, None)
    call("cuMemcpyDtoDAsync_v2", address + 400, address + 300, 10, None)
    call("cuMemcpyAsync", address + 500, address + 400, 10, None)
    target = c.create_string_buffer(10)
    call("cuMemcpyDtoHAsync_v2", target, address + 500, 10, None)
    call("cuCtxSynchronize")
    assert [read(address + 100 * step, 10) for step in range(6)] == [b"0123456789"] * 6
    assert target.raw == b"0123456789"
    for width, name in ((1, "cuMemsetD8"), (2, "cuMemsetD16"), (4, "cuMemsetD32")):
        value = int.from_bytes(b"wxyz"[:width], "little")
        call(f"{name}_v2", address + 600, value, 3)
        call(f"{name}Async", address + 700, value, 3, None)
        call("cuCtxSynchronize")
        assert read(address + 600, 3 * width) == read(address + 700, 3 * width) == b"wxyz"[:width] * 3


def pinned() -> None:
    one = ask("cuMemHostAlloc", c.c_void_p, 8192, 2)
    assert ask("cuMemHostGetFlags", c.c_uint, one) == 2
    assert ask("cuMemHostGetDevicePointer_v2", c.c_uint64, one, 0) == one
    call("cuMemFreeHost", one)
    call("cuMemFreeHost", one, gives=INVALID)
    other = ask("cuMemAllocHost_v2", c.c_void_p, 4096)
    call("cuMemFreeHost", other)
    own = c.create_string_buffer(8192)
    call("cuMemHostRegister_v2", own, 8192, 0)
    call("cuMemHostRegister_v2", own, 8192, 0, gives=712)
    call("cuMemHostUnregister", own)
    call("cuMemHostUnregister", own, gives=713)


def virtual_memory() -> None:
    wanted = Properties(type=1, handle_types=FILE_DESCRIPTOR, location=Location(1, 0))
    assert ask("cuMemGetAllocationGranularity", c.c_size_t, c.byref(wanted), 0) == 2 * MIB
    handle = ask("cuMemCreate", c.c_uint64, 2 * MIB, c.byref(wanted), 0)
    found = Properties()
    call("cuMemGetAllocationPropertiesFromHandle", c.byref(found), handle)
    assert (found.type, found.location.id) == (1, 0)
    address = ask("cuMemAddressReserve", c.c_uint64, 4 * MIB, 0, 0, 0)
    call("cuMemMap", address, 2 * MIB, 0, handle, 0)
    right = Access(Location(1, 0), 3)
    call("cuMemSetAccess", address, 2 * MIB, c.byref(right), 1)
    assert ask("cuMemGetAccess", c.c_ulonglong, c.byref(right.location), address) == 3
    call("cuMemsetD8_v2", address, 7, 100)
    descriptor = ask("cuMemExportToShareableHandle", c.c_int, handle, FILE_DESCRIPTOR, 0)
    imported = ask("cuMemImportFromShareableHandle", c.c_uint64, descriptor, FILE_DESCRIPTOR)
    os.close(descriptor)
    again = ask("cuMemRetainAllocationHandle", c.c_uint64, address)
    assert again == handle
    call("cuMemMap", address + 2 * MIB, 2 * MIB, 0, imported, 0)
    call("cuMemSetAccess", address + 2 * MIB, 2 * MIB, c.byref(right), 1)
    assert read(address + 2 * MIB, 100) == bytes([7] * 100)
    call("cuMemAddressFree", address, 4 * MIB, gives=INVALID)
    call("cuMemUnmap", address, 4 * MIB)
    for one in (handle, again, imported):
        call("cuMemRelease", one)
    call("cuMemRelease", handle, gives=INVALID)
    call("cuMemAddressFree", address, 4 * MIB)


def pools() -> None:
    default = ask("cuDeviceGetDefaultMemPool", c.c_void_p, 0)
    assert ask("cuDeviceGetMemPool", c.c_void_p, 0) == default
    made = ask("cuMemPoolCreate", c.c_void_p, c.byref(PoolProperties(type=1, location=Location(1, 0))))
    call("cuDeviceSetMemPool", 0, made)
    assert ask("cuDeviceGetMemPool", c.c_void_p, 0) == made
    call("cuDeviceSetMemPool", 0, default)
    call("cuMemPoolSetAttribute", made, 4, c.byref(c.c_uint64(12345)))
    assert ask("cuMemPoolGetAttribute", c.c_uint64, made, 4, first=False) == 12345
    call("cuMemPoolSetAccess", made, c.byref(Access(Location(1, 0), 3)), 1)
    assert ask("cuMemPoolGetAccess", c.c_int, made, c.byref(Location(1, 0))) == 3
    call("cuMemPoolTrimTo", made, 0)
    one = ask("cuMemAllocFromPoolAsync", c.c_uint64, 1000, made, None)
    other = ask("cuMemAllocAsync", c.c_uint64, 1000, None)
    call("cuMemFreeAsync", one, None)
    call("cuMemFreeAsync", other, None)
    call("cuMemFreeAsync", other, None, gives=INVALID)
    call("cuMemPoolDestroy", made)


def streams(primary: int) -> None:
    plain = ask("cuStreamCreate", c.c_void_p, 0)
    other = ask("cuStreamCreateWithPriority", c.c_void_p, 1, -3)
    questions = [
        ("cuStreamGetFlags", c.c_uint, 1),
        ("cuStreamGetPriority", c.c_int, -3),
        ("cuStreamGetCtx", c.c_void_p, primary),
        ("cuStreamGetDevice", c.c_int, 0),
        ("cuStreamIsCapturing", c.c_int, 0),
    ]
    for name, kind, expected in questions:
        assert ask(name, kind, other, first=False) == expected, name
    identities = {ask("cuStreamGetId", c.c_ulonglong, one, first=False) for one in (plain, other)}
    assert len(identities) == 2
    context, green = c.c_void_p(), c.c_void_p(1)
    call("cuStreamGetCtx_v2", other, c.byref(context), c.byref(green))
    assert (context.value, green.value) == (primary, None)
    first, second = (ask("cuEventCreate", c.c_void_p, 0) for _ in range(2))
    heard: list[int] = []
    listener = c.CFUNCTYPE(None, c.c_void_p)(lambda _: heard.append(1))
    call("cuEventRecord", first, plain)
    call("cuStreamWaitEvent", other, first, 0)
    call("cuLaunchHostFunc", other, listener, None)
    call("cuLaunchHostFunc_v2", other, listener, None, 0)
    call("cuEventRecordWithFlags", second, other, 0)
    call("cuEventSynchronize", second)
    assert heard == [1, 1]
    call("cuStreamSynchronize", other)
    call("cuStreamQuery", other)
    call("cuEventQuery", second)
    assert ask("cuEventElapsedTime_v2", c.c_float, first, second) >= 0
    shared, token = ask("cuEventCreate", c.c_void_p, 6), IpcToken()
    call("cuIpcGetEventHandle", c.byref(token), first, gives=INVALID_HANDLE)  # not made to be shared
    call("cuIpcGetEventHandle", c.byref(token), shared)
    opened = ask("cuIpcOpenEventHandle", c.c_void_p, token)
    call("cuEventRecord", opened, plain)
    call("cuEventSynchronize", shared)
    for event in (first, second, shared, opened):
        call("cuEventDestroy_v2", event)
    for stream in (plain, other):
        call("cuStreamDestroy_v2", stream)
    call("cuStreamDestroy_v2", None, gives=INVALID_HANDLE)


HOLDER = """
import exported as e, ctypes as c
e.call("cuInit", 0); e.call("cuCtxSetCurrent", e.ask("cuDevicePrimaryCtxRetain", c.c_void_p, 0))
address = e.ask("cuMemAlloc_v2", c.c_uint64, 2 << 20); e.call("cuMemsetD8_v2", address, 99, 4096)
token = e.Token(); e.call("cuIpcGetMemHandle", token, address); print(bytes(token).hex(), flush=True)
input(); print(set(e.read(address, 4096)) == {99}, flush=True); input()
"""


def holder() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def with_another_process() -> None:
    with holder() as other:
        assert other.stdout is not None
        assert other.stdin is not None
        token = IpcToken(Token(*bytes.fromhex(other.stdout.readline())))
        address = c.c_uint64()
        call("cuIpcOpenMemHandle_v2", c.byref(address), token, 1)
        assert set(read(address.value, 4096)) == {99}
        call("cuIpcCloseMemHandle", address.value)
        call("cuIpcCloseMemHandle", address.value, gives=INVALID)
        checkpoint(other.pid)
        other.stdin.write("\n")
        assert other.stdout.readline() == "True\n"
        other.kill()


def checkpoint(pid: int) -> None:
    assert ask("cuCheckpointProcessGetState", c.c_int, pid, first=False) == 0
    assert ask("cuCheckpointProcessGetRestoreThreadId", c.c_int, pid, first=False) == pid
    call("cuCheckpointProcessLock", pid, None)
    call("cuCheckpointProcessCheckpoint", pid, None)
    assert ask("cuCheckpointProcessGetState", c.c_int, pid, first=False) == 2
    call("cuCheckpointProcessRestore", pid, None)
    info = c.POINTER(StorageInfo)()
    call("cuCheckpointProcessCheckpoint", pid, c.byref(CheckpointArguments(info=c.pointer(info))))
    assert info.contents.count == 1
    kept = read(info.contents.devices[0].address, 4096)
    call("cuCheckpointOperationComplete", info.contents.handle)
    call("cuCheckpointProcessRestore", pid, c.byref(RestoreArguments(info=c.pointer(info))))
    call("cuMemcpyHtoD_v2", info.contents.devices[0].address, c.create_string_buffer(kept, 4096), 4096)
    call("cuCheckpointOperationComplete", info.contents.handle)
    call("cuCheckpointProcessUnlock", pid, None)


def main() -> None:
    start()
    devices()
    primary = contexts()
    address = memory()
    copies(address)
    pinned()
    virtual_memory()
    pools()
    streams(primary)
    with_another_process()
    call("cuMemFree_v2", address)
    call("cuDevicePrimaryCtxRelease_v2", 0)
    sys.stdout.write(json.dumps(sorted(called)) + "\n")


if __name__ == "__main__":
    main()

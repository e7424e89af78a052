"""What one process sees of the driver: devices, contexts, memory, streams, events."""

import pytest

from tests.unit.softgpu.machines import MakeMachine

pytestmark = pytest.mark.processes

MiB = 1 << 20


def test_every_entry_point_that_cuda_python_asks_for_resolves(machine: MakeMachine) -> None:
    """cuda-python looks up everything at its first call; what is not modelled is there and says so."""
    asked, resolved, unmodelled = machine().run("""
from cuda.bindings._internal import driver
ok(cu.cuInit(0)); pointers = driver._inspect_function_pointers()
say(len(pointers), sum(1 for pointer in pointers.values() if pointer),
    [error(cu.cuModuleLoad(b'x')), error(cu.cuModuleUnload(0))])""")

    assert asked > 500
    assert resolved == asked
    assert unmodelled == ["CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_SUPPORTED"]


def test_a_signature_newer_than_asked_for_is_not_handed_out(machine: MakeMachine) -> None:
    assert machine().run("""
driver = ctypes.CDLL('libcuda.so.1')
def resolve(name, version):
    found = ctypes.c_void_p(); driver.cuGetProcAddress_v2(name, ctypes.byref(found), version, ctypes.c_uint64(0), None)
    return found.value
versions = [resolve(b'cuCtxCreate', version) for version in (1000, 3020, 11040, 12050, 13041)]
say(versions[0], len(set(versions[1:])), versions[3] == versions[4])""") == [None, 3, True]


def test_devices_describe_themselves_as_the_profile_says(machine: MakeMachine) -> None:
    one = machine(gpus=2, profile="h100-80", total_bytes=None)
    name, total, major, bus, version, beyond = one.run("""
ok(cu.cuInit(0)); device = ok(cu.cuDeviceGet(1)); attribute = cu.CUdevice_attribute
text = lambda answer: ok(answer).split(b'\\0')[0].decode()
say(text(cu.cuDeviceGetName(64, device)), ok(cu.cuDeviceTotalMem(device)),
    ok(cu.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)),
    text(cu.cuDeviceGetPCIBusId(32, device)), ok(cu.cuDriverGetVersion()), error(cu.cuDeviceGet(2)))""")

    assert (name, total) == ("NVIDIA H100 80GB HBM3", 81008 * MiB)
    assert (major, bus, version) == (9, "0000:11:00.0", 13041)
    assert beyond == "CUDA_ERROR_INVALID_DEVICE"


def test_cuda_and_nvml_agree_on_uuid_and_bus(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    cuda_uuid, nvml_uuid, index = one.run("""
ok(cu.cuInit(0)); device = ok(cu.cuDeviceGet(1)); nv.nvmlInit()
handle = nv.nvmlDeviceGetHandleByPciBusId(ok(cu.cuDeviceGetPCIBusId(32, device)).split(b'\\0')[0].decode())
say(ok(cu.cuDeviceGetUuid(device)).bytes.hex(), nv.nvmlDeviceGetUUID(handle), nv.nvmlDeviceGetIndex(handle))""")

    assert nvml_uuid == one.host.uuids()[1]
    assert nvml_uuid.removeprefix("GPU-").replace("-", "") == cuda_uuid
    assert index == 1


def test_without_a_host_there_is_no_device(machine: MakeMachine) -> None:
    one = machine()
    one.host.remove()

    assert one.run("say(error(cu.cuInit(0)))") == "CUDA_ERROR_NO_DEVICE"


def test_a_context_costs_device_memory_once_for_each_process(machine: MakeMachine) -> None:
    one = machine(context_bytes=16 * MiB)
    assert one.run("""
context(); context(); before = free_and_total()
address = ok(cu.cuMemAlloc(100 * MiB)); during = free_and_total()
ok(cu.cuDevicePrimaryCtxRelease(0)); ok(cu.cuDevicePrimaryCtxRelease(0)); context(); after = free_and_total()
say(before, during, after)""") == [[240, 256], [140, 256], [240, 256]]


def test_a_full_device_refuses_a_context(machine: MakeMachine) -> None:
    one = machine(context_bytes=16 * MiB)
    owner = one.start("context(); address = ok(cu.cuMemAlloc(232 * MiB)); say('up'); wait()")
    owner.hear()

    assert one.run("ok(cu.cuInit(0)); say(error(cu.cuDevicePrimaryCtxRetain(0)))") == "CUDA_ERROR_OUT_OF_MEMORY"


def test_a_refused_allocation_takes_nothing_and_a_free_gives_all_back(machine: MakeMachine) -> None:
    assert machine().run("""
context(); first = ok(cu.cuMemAlloc(200 * MiB)); refused = error(cu.cuMemAlloc(100 * MiB)); left = free_and_total()[0]
ok(cu.cuMemFree(first)); say(refused, left, error(cu.cuMemAlloc(256 * MiB)), error(cu.cuMemFree(first)))""") == [
        "CUDA_ERROR_OUT_OF_MEMORY",
        56,
        "CUDA_SUCCESS",
        "CUDA_ERROR_INVALID_VALUE",
    ]


def test_the_cpu_cannot_touch_device_memory(machine: MakeMachine) -> None:
    child = machine().start("context(); say('up'); ctypes.string_at(int(ok(cu.cuMemAlloc(2 * MiB))), 1)")
    child.hear()

    assert child.process.wait(timeout=20) == -11


def test_mapping_follows_the_rules_of_the_driver(machine: MakeMachine) -> None:
    """Offset 0 only, whole granules, inside one reservation, no overlap; no access before it is given."""
    assert machine().run("""
context(); size = 4 * MiB; handle = ok(create(size)); base = ok(cu.cuMemAddressReserve(2 * size, 0, 0, 0))
small = error(create(MiB)); offset = error(cu.cuMemMap(base, size, 2 * MiB, handle, 0))
beyond = error(cu.cuMemMap(int(base) + 6 * MiB, size, 0, handle, 0))
mapped = error(cu.cuMemMap(base, size, 0, handle, 0))
overlap = error(cu.cuMemMap(int(base) + 2 * MiB, size, 0, handle, 0))
unset = error(cu.cuMemcpyHtoD(base, b'x', 1)); ok(cu.cuMemSetAccess(base, size, [access(is_writable=False)], 1))
read_only = error(cu.cuMemcpyHtoD(base, b'x', 1)); peek(base, 1); busy = error(cu.cuMemAddressFree(base, 2 * size))
ok(cu.cuMemRelease(handle)); stale = error(cu.cuMemRelease(handle)); held = free_and_total()[0]
partial = error(cu.cuMemUnmap(base, 2 * MiB)); ok(cu.cuMemUnmap(base, size)); ok(cu.cuMemAddressFree(base, 2 * size))
refused = [small, offset, beyond, overlap, unset, read_only, busy, stale, partial]
say(refused, mapped, held, free_and_total()[0])""") == [
        ["CUDA_ERROR_INVALID_VALUE"] * 9,
        "CUDA_SUCCESS",
        252,
        256,
    ]


def test_a_retained_handle_keeps_memory_after_its_unmapping(machine: MakeMachine) -> None:
    assert machine().run("""
context(); handle = ok(create(4 * MiB)); address = map_memory(handle, 4 * MiB); ok(cu.cuMemRelease(handle))
again = ok(cu.cuMemRetainAllocationHandle(address)); poke(address, b'kept'); ok(cu.cuMemUnmap(address, 4 * MiB))
other = map_memory(again, 4 * MiB); text = peek(other, 4).decode(); ok(cu.cuMemUnmap(other, 4 * MiB))
held = free_and_total()[0]; ok(cu.cuMemRelease(again)); say(text, held, free_and_total()[0])""") == ["kept", 252, 256]


def test_a_copy_crosses_chunks_that_are_mapped_side_by_side(machine: MakeMachine) -> None:
    assert machine().run("""
context(); size = 2 * MiB; base = ok(cu.cuMemAddressReserve(4 * size, 0, 0, 0))
for i in range(4): ok(cu.cuMemMap(int(base) + i * size, size, 0, ok(create(size)), 0))
ok(cu.cuMemSetAccess(base, 4 * size, [access()], 1)); pattern = os.urandom(3 * size)
poke(base, pattern, 12345); say(peek(base, 3 * size, 12345) == pattern)""")


def test_streams_run_in_order_and_events_time_them(machine: MakeMachine) -> None:
    one = machine(h2d_bytes_per_s=1 << 30, d2h_bytes_per_s=1 << 30)
    pending, copied_ms, same, waited = one.run("""
context(); size = 64 * MiB; device = ok(cu.cuMemAlloc(size)); host = int(ok(cu.cuMemHostAlloc(size, 0)))
ctypes.memset(host, 7, size); first, second = (ok(cu.cuStreamCreate(1)) for _ in range(2))
start, end, done = (ok(cu.cuEventCreate(0)) for _ in range(3))
ok(cu.cuEventRecord(start, first)); ok(cu.cuMemcpyHtoDAsync(device, host, size, first))
ok(cu.cuEventRecord(end, first))
ok(cu.cuStreamWaitEvent(second, end, 0)); ok(cu.cuMemsetD8Async(device, 9, 10, second))
ok(cu.cuEventRecord(done, second))
pending = error(cu.cuEventQuery(end)); ok(cu.cuEventSynchronize(done)); waited = error(cu.cuEventQuery(end))
say(pending, ok(cu.cuEventElapsedTime(start, end)), peek(device, 12).hex(), waited)""")

    assert (pending, waited) == ("CUDA_ERROR_NOT_READY", "CUDA_SUCCESS")
    assert same == "09" * 10 + "0707"
    assert 30 < copied_ms < 600  # 62.5 modelled; a busy host takes the first mark late, and the last one later


def test_a_stream_calls_a_host_function_in_its_turn(machine: MakeMachine) -> None:
    assert machine().run("""
context(); stream = ok(cu.cuStreamCreate(1)); seen = []
callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda argument: seen.append(argument))
ok(cu.cuLaunchHostFunc(stream, cu.CUhostFn(ctypes.cast(callback, ctypes.c_void_p).value), 42))
ok(cu.cuStreamSynchronize(stream)); say(seen)""") == [42]


def test_registered_memory_is_pinned_until_it_is_unregistered(machine: MakeMachine) -> None:
    assert machine().run("""
import mmap; context(); memory = mmap.mmap(-1, 4 * MiB); base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
first = error(cu.cuMemHostRegister(base, 4 * MiB, 0)); again = error(cu.cuMemHostRegister(base + MiB, MiB, 0))
ok(cu.cuMemHostUnregister(base)); say(first, again, error(cu.cuMemHostUnregister(base)))""") == [
        "CUDA_SUCCESS",
        "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
    ]


def test_pointers_tell_what_they_are(machine: MakeMachine) -> None:
    assert machine().run("""
context(); kind = cu.CUpointer_attribute
device = ok(cu.cuMemAlloc(4 * MiB)); host = int(ok(cu.cuMemHostAlloc(MiB, 0)))
ask = lambda what, address: ok(cu.cuPointerGetAttribute(what, address))
say(int(ask(kind.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, device)), int(ask(kind.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, host)),
    ask(kind.CU_POINTER_ATTRIBUTE_RANGE_SIZE, int(device) + 100) // MiB)""") == [2, 1, 4]


@pytest.mark.parametrize("clean", [False, True])
def test_new_memory_is_dirty_unless_the_host_is_clean(machine: MakeMachine, clean: bool) -> None:
    """Otherwise no test could fail that is to prove that memory is scrubbed between tenants."""
    fresh, around = machine(clean=clean).run("""
context(); address = ok(cu.cuMemAlloc(2 * MiB)); fresh = peek(address, 4, MiB).hex()
poke(address, b'me', 5000); say(fresh, peek(address, 6, 4998).hex())""")

    before = "00" if clean else "db"
    assert fresh == before * 4
    assert around == before * 2 + b"me".hex() + before * 2


@pytest.mark.parametrize("phantom", [False, True])
def test_scrubbed_memory_reads_as_zero_in_every_mode(machine: MakeMachine, phantom: bool) -> None:
    assert machine(phantom=phantom).run("""
context(); size = 8 * MiB; address = ok(cu.cuMemAlloc(size)); ok(cu.cuMemsetD8(int(address) + 100, 0, size - 200))
say(peek(address, 102)[98:].hex(), peek(address, 4, 5 * MiB).hex(), peek(address, 4, size - 102).hex())""") == [
        "dbdb0000",
        "00000000",
        "0000dbdb",
    ]


def test_freed_bytes_do_not_come_back(machine: MakeMachine) -> None:
    assert machine().run("""
context(); address = ok(cu.cuMemAlloc(200 * MiB)); poke(address, b'secret'); ok(cu.cuMemFree(address))
again = ok(cu.cuMemAlloc(200 * MiB)); say(peek(again, 6) != b'secret')""")


def test_cuda_core_runs_on_it(machine: MakeMachine) -> None:
    assert machine().run("""
import cuda.core as core; device = core.Device(0); device.set_current(); stream = device.create_stream()
buffer = device.allocate(8 * MiB, stream=stream)
pinned = core.LegacyPinnedMemoryResource().allocate(8 * MiB, stream=stream)
ctypes.memset(int(pinned.handle), 7, 8 * MiB); pinned.copy_to(buffer, stream=stream); stream.sync()
ctypes.memset(int(pinned.handle), 0, 8 * MiB); buffer.copy_to(pinned, stream=stream); stream.sync()
say(ctypes.string_at(int(pinned.handle), 4).hex(), device.name)""") == ["07070707", "Softgpu Test 1GiB"]


def test_a_destroyed_context_is_told_wherever_it_was_current(machine: MakeMachine) -> None:
    """Popped back to from a stack, destroyed twice, or made current again."""
    assert (
        machine().run("""
context(); made = ok(cu.cuCtxCreate(None, 0, 0)); ok(cu.cuCtxPushCurrent(ok(cu.cuDevicePrimaryCtxRetain(0))))
ok(cu.cuCtxDestroy(made)); ok(cu.cuCtxPopCurrent())
say(error(cu.cuMemAlloc(MiB)), error(cu.cuCtxDestroy(made)), error(cu.cuCtxSetCurrent(made)))
""")
        == ["CUDA_ERROR_CONTEXT_IS_DESTROYED"] * 3
    )


def test_sizes_that_no_address_space_holds_are_out_of_memory(machine: MakeMachine) -> None:
    """They must not wrap around to small ones."""
    assert (
        machine().run("""
context(); say(error(cu.cuMemAlloc(2**64 - 1)), error(cu.cuMemAllocPitch(2**40, 2**40, 4)),
    error(cu.cuMemHostAlloc(2**64 - 1, 0)), error(cu.cuMemAddressReserve(2**64 - 2 * MiB, 4 * MiB, 0, 0)))
""")
        == ["CUDA_ERROR_OUT_OF_MEMORY"] * 4
    )

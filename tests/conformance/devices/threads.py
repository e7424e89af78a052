"""Run in a process of its own by test_threads.py: several threads use one device at once. Exits 0 if all went well."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from devices.api import DeviceSettings, MiB
from devices.cuda import CudaDevice
from devices.nvml import NvmlInventory

THREADS = 4
ROUNDS = 6


def main() -> None:
    device = CudaDevice(NvmlInventory().gpus()[0].uuid, settings=DeviceSettings(chunk_bytes=4 * MiB))
    before = device.memory()
    shared = device.reserve(8 * MiB)
    shared_arena = device.host_arena(8 * MiB)
    shared_arena.fill(99)
    start = threading.Barrier(THREADS)

    def swap(number: int) -> None:
        region, arena = device.reserve(24 * MiB), device.host_arena(24 * MiB)
        arena.fill(number)
        start.wait(timeout=30)
        for _ in range(ROUNDS):
            device.restore(region, arena)
            assert device.read(region, offset_bytes=24 * MiB - 8, size_bytes=8) == bytes([number]) * 8
            device.copy_to_host(region, arena)
            device.unback(region)
        device.free(region)
        arena.close()

    def contend(_: int) -> int:
        """All threads want the same region: one at a time has it, and the others' calls fail cleanly or do nothing."""
        device.unback(shared)
        return device.unback(shared).released_bytes

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(swap, range(1, THREADS + 1)))
        device.restore(shared, shared_arena)
        assert sum(pool.map(contend, range(THREADS))) == 0
    device.free(shared)
    assert device.memory() == before, (device.memory(), before)
    device.close()


if __name__ == "__main__":
    main()
    sys.exit(0)

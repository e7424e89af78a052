"""A worker of a stand-in vLLM with our backend, told by lines what to do; for the test beside it.

Each line on stdin is a word with its arguments, each on stdout what came of it as JSON.
"""

import json
import sys
from typing import Any

from cuda.bindings import driver as cu
from vllm.device_allocator import cumem, get_mem_allocator_instance
from vllm.device_allocator.cumem import ok
from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

from engines.vllm_plugin import BACKEND_NAME, register

MiB = 1 << 20
SIZES = {"weights": (6 * MiB, 2 * MiB, 10 * MiB), "kv_cache": (8 * MiB,), "runtime": (2 * MiB,)}


class Worker:
    def __init__(self) -> None:
        ok(cu.cuInit(0))
        ok(cu.cuCtxSetCurrent(ok(cu.cuDevicePrimaryCtxRetain(ok(cu.cuDeviceGet(0))))))
        register()
        register()  # vLLM may do so.
        self.backend = SleepModeBackendFactory.get_backend_class(BACKEND_NAME)()
        self.allocator = get_mem_allocator_instance()
        self.addresses: dict[str, list[int]] = {}
        for tag, sizes in SIZES.items():
            self.allocator.current_tag = tag
            self.addresses[tag] = [cumem.extension.allocate(size) for size in sizes]
            for number, address in enumerate(self.addresses[tag]):
                self.fill(address, number + 1)

    def fill(self, address: int, byte: int) -> None:
        ok(cu.cuMemsetD8(address, byte, self.allocator.pointer_to_data[address].handle[1]))

    def content(self, tag: str) -> list[int]:
        """First and last byte of each allocation."""
        found = []
        for address in self.addresses[tag]:
            size_bytes = self.allocator.pointer_to_data[address].handle[1]
            for offset in (0, size_bytes - 1):
                byte = bytearray(1)
                ok(cu.cuMemcpyDtoH(byte, address + offset, 1))
                found.append(byte[0])
        return found

    def do(self, word: str, *arguments: str) -> Any:
        match word:
            case "suspend":
                self.backend.suspend(int(arguments[0]))
            case "resume":
                self.backend.resume(list(arguments) or None)
            case "change":
                number, byte = (int(argument) for argument in arguments)
                # One byte in the middle, where no sample would lie.
                ok(cu.cuMemsetD8(self.addresses["weights"][number] + 3 * MiB + 4097, byte, 1))
            case "refill":
                for number, address in enumerate(self.addresses["weights"]):
                    self.fill(address, number + 100)
            case "middle":
                byte_read = bytearray(1)
                ok(cu.cuMemcpyDtoH(byte_read, self.addresses["weights"][int(arguments[0])] + 3 * MiB + 4097, 1))
                return byte_read[0]
            case "free":
                address = self.addresses["weights"].pop(int(arguments[0]))
                cumem.extension.release(address)
            case "content":
                return self.content(arguments[0])
            case "asleep":
                return {
                    tag: [self.allocator.pointer_to_data[address].is_asleep for address in addresses]
                    for tag, addresses in self.addresses.items()
                }
            case "state":
                return self.backend.state()
        return None


def main() -> None:
    worker = Worker()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            answer = worker.do(*line.split())
        except Exception as error:  # noqa: BLE001  (the test wants to see it)
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

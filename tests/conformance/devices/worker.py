"""A process that opens inventories and devices for the tests: a process can have only one driver, and can be killed.

Started with a Unix socket as its standard input. Objects stay here; the tests name them by number.
"""

import os
import socket
from typing import Any

from devices.api import DeviceError, ExportedMemory, HostBuffer
from tests.conformance.devices import channel
from tests.conformance.devices.channel import Reference, with_descriptors


class Worker:
    def __init__(self) -> None:
        self._objects: dict[int, Any] = {0: self}

    def open_inventory(self) -> Any:
        from devices.nvml import NvmlInventory

        return self._keep(NvmlInventory())

    def open_device(self, *arguments: Any, **options: Any) -> Any:
        from devices.cuda import CudaDevice

        return self._keep(CudaDevice(*arguments, **options))

    def open_checkpoint(self) -> Any:
        from devices.cuda_checkpoint import CudaProcessCheckpoint

        return self._keep(CudaProcessCheckpoint())

    def pid(self) -> int:
        return os.getpid()

    def forget_all(self) -> None:
        """Close everything, so that the next test finds this process as new."""
        for kept in [kept for number, kept in self._objects.items() if number]:
            kept.close()
        self._objects = {0: self}

    def _keep(self, value: Any) -> Reference:
        number = max(self._objects) + 1
        self._objects[number] = value
        return Reference(number)

    def answer(self, message: Any, descriptors: list[int]) -> tuple[Any, list[int]]:
        number, name, arguments, options = message
        arguments = [self._incoming(value, descriptors) for value in arguments]
        options = {key: self._incoming(value, descriptors) for key, value in options.items()}
        member = getattr(self._objects[number], name)
        value = member(*arguments, **options) if callable(member) else member
        if isinstance(value, ExportedMemory):
            return value, [chunk.fd for chunk in value.chunks]
        if isinstance(value, HostBuffer):
            return self._keep(value), []
        return value, []

    def _incoming(self, value: Any, descriptors: list[int]) -> Any:
        if isinstance(value, dict):
            return {key: self._incoming(each, descriptors) for key, each in value.items()}
        if isinstance(value, Reference):
            return self._objects[value.number]
        return with_descriptors(value, descriptors)


def main() -> None:
    connection = socket.socket(fileno=0)
    worker = Worker()
    while True:
        try:
            message, descriptors = channel.receive(connection)
        except EOFError:
            return
        answered: list[int] = []
        try:
            value, answered = worker.answer(message, descriptors)
        except DeviceError as error:
            value = error
        channel.send(connection, value, answered)
        for descriptor in [*descriptors, *answered]:
            os.close(descriptor)
        channel.send(connection, None)  # only now is nothing of this call left here


if __name__ == "__main__":
    main()

"""What the contract needs of an implementation: a host, processes on it, and a way to end them.

`VirtualWorld` is the virtual model. `DriverWorld` runs the real implementation in worker processes, over whatever
driver their environment leads to.
"""

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import pytest

from devices.api import Device, DeviceSettings, ExportedMemory, HostBuffer, Inventory
from devices.checkpoint import ProcessCheckpoint
from devices.profiles import profile
from devices.virtual import VirtualDevice, VirtualGpu, VirtualHost, VirtualInventory
from devices.virtual_checkpoint import VirtualProcessCheckpoint
from tests.conformance.devices import channel
from tests.conformance.devices.channel import Reference, SharedDescriptor, with_descriptors

ROOT = Path(__file__).resolve().parents[3]
_ANSWER_TIMEOUT_S = 30.0  # the slowest call of the contract takes a few seconds


class ProcessUnderTest(Protocol):
    """One process with one device."""

    device: Device

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """End it as SIGKILL does; returns when it is gone."""

    def shared_arena(self, file: int, size_bytes: int) -> HostBuffer:
        """Pin a file made by `World.shared_file` in this process."""


class World(Protocol):
    inventory: Inventory

    def start(self, *, namespace: str = "", settings: DeviceSettings | None = None) -> ProcessUnderTest:
        """A process with a device on the first GPU."""

    def open_device(self, gpu_uuid: str) -> Device:
        """A device in a process of its own, to try what opening refuses."""

    def checkpoint(self) -> ProcessCheckpoint:
        """The driver's checkpoint calls. Skips the test where it has none."""

    def agent(self) -> tuple[Device, ProcessCheckpoint]:
        """A process that has a device open and drives checkpoints. Skips without custom storage."""

    def namespace(self) -> str:
        """A fresh group for limits. Skips the test where the driver has none."""

    def let_evict(self) -> None:
        """From now on the driver ends borrowers for owners. Skips the test where that cannot be had."""

    def shared_file(self, size_bytes: int) -> int: ...

    def hand_over(self, exported: ExportedMemory, *, to: ProcessUnderTest) -> ExportedMemory:
        """The export as the other process got it over a socket; the first one stays open."""


# ---- virtual ---------------------------------------------------------------------------------------------------------


class VirtualProcess:
    def __init__(self, host: VirtualHost, *, namespace: str, settings: DeviceSettings | None) -> None:
        self._host = host
        self._pid = host.start_process(namespace=namespace)
        self.device: Device = VirtualDevice(host, next(iter(host.gpus)), pid=self._pid, settings=settings)

    @property
    def pid(self) -> int:
        return self._pid

    def kill(self) -> None:
        self._host.end_process(self._pid)

    def shared_arena(self, file: int, size_bytes: int) -> HostBuffer:
        return self.device.host_arena(size_bytes, shared_fd=file)


class VirtualWorld:
    def __init__(self) -> None:
        self.host = VirtualHost(
            [VirtualGpu(uuid=f"GPU-virtual-{index}", profile=profile("h100-80")) for index in range(2)]
        )
        self.inventory: Inventory = VirtualInventory(self.host)
        self._namespace_count = 0

    def start(self, *, namespace: str = "", settings: DeviceSettings | None = None) -> ProcessUnderTest:
        return VirtualProcess(self.host, namespace=namespace, settings=settings)

    def open_device(self, gpu_uuid: str) -> Device:
        return VirtualDevice(self.host, gpu_uuid, pid=self.host.start_process())

    def checkpoint(self) -> ProcessCheckpoint:
        return VirtualProcessCheckpoint(self.host)

    def agent(self) -> tuple[Device, ProcessCheckpoint]:
        return self.start().device, self.checkpoint()

    def namespace(self) -> str:
        self._namespace_count += 1
        name = f"group-{self._namespace_count}"
        self.host.add_namespace(name)
        return name

    def let_evict(self) -> None:
        self.host.evicts = True

    def shared_file(self, size_bytes: int) -> int:
        return self.host.create_shared_file(size_bytes)

    def hand_over(self, exported: ExportedMemory, *, to: ProcessUnderTest) -> ExportedMemory:
        chunks = tuple(
            dataclasses.replace(chunk, fd=self.host.send_descriptor(chunk.fd, to_pid=to.pid))
            for chunk in exported.chunks
        )
        return dataclasses.replace(exported, chunks=chunks)


# ---- a driver --------------------------------------------------------------------------------------------------------


class Remote:
    """An object in a worker; its members are asked for over the channel."""

    def __init__(self, worker: "WorkerProcess", reference: Reference) -> None:
        self._worker = worker
        self._reference = reference

    # Those that are no functions; everything else is a call.
    _PROPERTIES = ("gpu_uuid", "granularity_bytes", "chunk_bytes", "size_bytes", "is_closed")

    def __getattr__(self, name: str) -> Any:
        if name in self._PROPERTIES:
            return self._worker.ask(self._reference, name)
        return lambda *arguments, **options: self._worker.ask(self._reference, name, *arguments, **options)

    def close_export(self, exported: ExportedMemory) -> None:
        for chunk in exported.chunks:  # these descriptors are ours: the worker closed its own when it had sent them
            os.close(chunk.fd)


class WorkerProcess:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(_ANSWER_TIMEOUT_S)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.devices.worker"],
            stdin=theirs.fileno(),
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        theirs.close()
        self.pid: int = self._child.pid

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def ask(self, reference: Reference, name: str, /, *arguments: Any, **options: Any) -> Any:
        descriptors: list[int] = []
        for value in [*arguments, *options.values()]:
            if isinstance(value, ExportedMemory):
                descriptors += [chunk.fd for chunk in value.chunks]
            if isinstance(value, SharedDescriptor):
                descriptors.append(value.fd)
        sent_arguments = [_outgoing(value) for value in arguments]
        sent_options = {key: _outgoing(value) for key, value in options.items()}
        channel.send(self._connection, (reference.number, name, sent_arguments, sent_options), descriptors)
        answer, received = channel.receive(self._connection)
        channel.receive(self._connection)  # the worker has closed its descriptors
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Reference):
            return Remote(self, answer)
        return with_descriptors(answer, received)

    def call(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        return self.ask(Reference(0), name, *arguments, **options)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        self._connection.close()


def _outgoing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _outgoing(each) for key, each in value.items()}
    return value._reference if isinstance(value, Remote) else value


class DriverProcess:
    def __init__(self, worker: WorkerProcess, gpu_uuid: str, settings: DeviceSettings | None) -> None:
        self.worker = worker
        self.device = cast(Device, worker.call("open_device", gpu_uuid, settings=settings))

    @property
    def pid(self) -> int:
        return self.worker.pid

    def kill(self) -> None:
        self.worker.kill()

    def shared_arena(self, file: int, size_bytes: int) -> HostBuffer:
        remote = cast(Any, self.device)
        return cast(HostBuffer, remote.host_arena(size_bytes, shared_fd=SharedDescriptor(file)))


class DriverWorld:
    """Worker processes are kept from test to test: starting one takes most of a second.

    `environment` leads them to the driver. `make_namespace` gives a group and the environment (softgpu) or the
    cgroup (real) that puts a process into it; None: no limits here.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        make_namespace: Callable[[], tuple[str, Mapping[str, str]]] | None,
        set_eviction: Callable[[bool], None] | None = None,
    ) -> None:
        self._set_eviction = set_eviction
        self._environment = environment
        self._make_namespace = make_namespace
        self._entry: dict[str, Mapping[str, str]] = {}  # how a process gets into each namespace
        self._idle: list[WorkerProcess] = []
        self._busy: list[WorkerProcess] = []
        self._grouped: list[WorkerProcess] = []  # in a group for good, so never used again
        self._files: list[int] = []
        self._observer = WorkerProcess(environment)
        self.inventory = cast(Inventory, self._observer.call("open_inventory"))

    def renew(self) -> None:
        """Everything as at first, for the next test."""
        if self._set_eviction is not None:
            self._set_eviction(False)
        for worker in self._busy:
            if worker.is_alive and self._is_as_new(worker):
                self._idle.append(worker)
        self._busy.clear()
        for worker in self._grouped:
            worker.kill()
        self._grouped.clear()
        for descriptor in self._files:
            os.close(descriptor)
        self._files.clear()
        self._observer.call("forget_all")
        self.inventory = cast(Inventory, self._observer.call("open_inventory"))

    @staticmethod
    def _is_as_new(worker: WorkerProcess) -> bool:
        """False, and it is gone, when it does not answer: a failed test may have left it locked."""
        try:
            worker.call("forget_all")
        except TimeoutError:
            worker.kill()
            return False
        return True

    def close(self) -> None:
        for worker in [*self._grouped, *self._busy, *self._idle, self._observer]:
            worker.kill()

    def start(self, *, namespace: str = "", settings: DeviceSettings | None = None) -> ProcessUnderTest:
        worker = self._worker(namespace)
        return DriverProcess(worker, self.inventory.gpus()[0].uuid, settings)

    def open_device(self, gpu_uuid: str) -> Device:
        return DriverProcess(self._worker(""), gpu_uuid, None).device

    def _worker(self, namespace: str) -> WorkerProcess:
        if namespace:
            worker = WorkerProcess({**self._environment, **self._entry[namespace]})
            if Path(namespace).is_dir():
                (Path(namespace) / "cgroup.procs").write_text(str(worker.pid))
            self._grouped.append(worker)
            return worker
        worker = self._idle.pop() if self._idle else WorkerProcess(self._environment)
        self._busy.append(worker)
        return worker

    def checkpoint(self) -> ProcessCheckpoint:
        calls = cast(ProcessCheckpoint, self._observer.call("open_checkpoint"))
        support = calls.support()
        if not support.is_supported:
            pytest.skip(f"no checkpoints here: {support.reason}")
        return calls

    def agent(self) -> tuple[Device, ProcessCheckpoint]:
        worker = self._worker("")
        calls = cast(ProcessCheckpoint, worker.call("open_checkpoint"))
        support = calls.support()
        if not support.has_custom_storage:
            pytest.skip(f"no custom storage here: {support.reason}")
        return DriverProcess(worker, self.inventory.gpus()[0].uuid, None).device, calls

    def namespace(self) -> str:
        support = self.inventory.limits_support(self.inventory.gpus()[0].uuid)
        if not support.is_supported or self._make_namespace is None:
            pytest.skip(f"no memory limits here: {support.reason}")
        name, self._entry[name] = self._make_namespace()
        return name

    def let_evict(self) -> None:
        if self._set_eviction is None:
            pytest.skip("needs an MPS server that the test can start")
        self._set_eviction(True)

    def shared_file(self, size_bytes: int) -> int:
        descriptor = os.memfd_create("arena")
        os.ftruncate(descriptor, size_bytes)
        self._files.append(descriptor)
        return descriptor

    def hand_over(self, exported: ExportedMemory, *, to: ProcessUnderTest) -> ExportedMemory:
        """Exports live in the test process, which hands them to each worker that imports."""
        return dataclasses.replace(
            exported, chunks=tuple(dataclasses.replace(chunk, fd=os.dup(chunk.fd)) for chunk in exported.chunks)
        )

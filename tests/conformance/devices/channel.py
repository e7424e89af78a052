"""Pickled messages with file descriptors over a Unix socket, between the tests and the processes that open devices."""

import dataclasses
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

from devices.api import ExportedMemory

FDS_MAX = 250  # the kernel passes at most 253 in one message (SCM_MAX_FD)
_HEADER = struct.Struct("!IH")  # bytes of the message, number of descriptors


@dataclasses.dataclass(frozen=True)
class Reference:
    """Stands for an object in the worker."""

    number: int


@dataclasses.dataclass(frozen=True)
class SharedDescriptor:
    """A descriptor among the arguments of a call."""

    fd: int


def send(connection: socket.socket, message: Any, descriptors: Sequence[int] = ()) -> None:
    body = pickle.dumps(message)
    connection.sendall(_HEADER.pack(len(body), len(descriptors)))
    for start in range(0, len(descriptors), FDS_MAX):
        socket.send_fds(connection, [b"f"], list(descriptors[start : start + FDS_MAX]))
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message. Raises `EOFError` when the other side is gone."""
    size, descriptor_count = _HEADER.unpack(_receive_exactly(connection, _HEADER.size))
    descriptors: list[int] = []
    while len(descriptors) < descriptor_count:
        _, received, _, _ = socket.recv_fds(connection, 1, FDS_MAX)
        if not received:
            raise EOFError
        descriptors += received
    return pickle.loads(_receive_exactly(connection, size)), descriptors


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def with_descriptors(value: Any, descriptors: list[int]) -> Any:
    """An export, or the number of a descriptor, as this process knows it: numbers differ in each process."""
    if isinstance(value, ExportedMemory):
        chunks = zip(value.chunks, descriptors, strict=True)
        return dataclasses.replace(
            value, chunks=tuple(dataclasses.replace(chunk, fd=descriptor) for chunk, descriptor in chunks)
        )
    if isinstance(value, SharedDescriptor):
        return descriptors[0]
    return value

"""Pinned host memory as bytes: what `devices.cuda` hands out as a `HostBuffer`."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Any, Protocol

from devices.api import DeviceError, InvalidUse, OutOfMemory, round_up
from devices.regions import check_range

if TYPE_CHECKING:
    from collections.abc import Callable

_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE and CU_MEMHOSTREGISTER_PORTABLE: pinned for every context


class DriverCall(Protocol):
    """A call of the CUDA driver by name; see `devices.cuda.call`."""

    def __call__(self, name: str, *arguments: Any, requested_bytes: int = 0) -> Any: ...


class PinnedBuffer:
    """A range of this process's memory that the driver has pinned; `unpin` undoes that, and is called once."""

    def __init__(self, *, address: int, size_bytes: int, unpin: Callable[[], None]) -> None:
        self._address = address
        self._size_bytes = size_bytes
        self._unpin: Callable[[], None] | None = unpin

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def is_closed(self) -> bool:
        return self._unpin is None

    def address_of(self, *, offset_bytes: int, size_bytes: int) -> int:
        """The address of a part of the buffer. Raises `InvalidUse` if it is not wholly inside, or after `close`."""
        if self.is_closed:
            raise InvalidUse(call="host buffer", code="CLOSED")
        check_range("host buffer", offset_bytes=offset_bytes, size_bytes=size_bytes, whole_bytes=self._size_bytes)
        return self._address + offset_bytes

    def write(self, content: bytes | bytearray | memoryview, *, offset_bytes: int = 0) -> None:
        size_bytes = memoryview(content).nbytes
        address = self.address_of(offset_bytes=offset_bytes, size_bytes=size_bytes)
        _bytes_at(address, size_bytes)[:] = memoryview(content).cast("B")

    def read(self, *, offset_bytes: int = 0, size_bytes: int) -> bytes:
        return ctypes.string_at(self.address_of(offset_bytes=offset_bytes, size_bytes=size_bytes), size_bytes)

    def fill(self, byte: int, *, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        length_bytes = self._size_bytes - offset_bytes if size_bytes is None else size_bytes
        ctypes.memset(self.address_of(offset_bytes=offset_bytes, size_bytes=length_bytes), byte, length_bytes)

    def close(self) -> None:
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()


def private_arena(call: DriverCall, *, size_bytes: int) -> PinnedBuffer:
    """Pinned memory of this process alone."""
    address = int(call("cuMemHostAlloc", size_bytes, _PORTABLE, requested_bytes=size_bytes))
    return PinnedBuffer(address=address, size_bytes=size_bytes, unpin=lambda: call("cuMemFreeHost", address))


def shared_arena(call: DriverCall, *, size_bytes: int, shared_fd: int) -> PinnedBuffer:
    """A mapping of a file's first `size_bytes`, pinned. Raises `InvalidUse` when the file is smaller."""
    if os.fstat(shared_fd).st_size < size_bytes:
        raise InvalidUse(call="host_arena", code="FILE_TOO_SMALL", detail=f"need {size_bytes} bytes")
    try:
        mapping = mmap.mmap(shared_fd, size_bytes)
    except OSError as error:
        code = error.strerror or "OSError"
        raise OutOfMemory(call="mmap", code=code, requested_bytes=size_bytes, free_bytes=None) from error
    address = ctypes.addressof(
        ctypes.c_char.from_buffer(mapping)
    )  # the pointer object is gone at once: close() may run
    pinned_bytes = round_up(size_bytes, granularity_bytes=mmap.PAGESIZE)
    try:
        call("cuMemHostRegister", address, pinned_bytes, _PORTABLE, requested_bytes=size_bytes)
    except DeviceError:
        mapping.close()
        raise

    def unpin() -> None:
        call("cuMemHostUnregister", address)
        mapping.close()

    return PinnedBuffer(address=address, size_bytes=size_bytes, unpin=unpin)


def _bytes_at(address: int, size_bytes: int) -> memoryview:
    """A writable view of this process's memory; it does not keep the memory alive."""
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")

"""Whether weights are still what was sealed: a checksum over every byte, on the GPU where torch is there."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from devices.api import MiB

if TYPE_CHECKING:
    from devices.borrowed import BorrowingDevice

READ_BYTES = 64 * 1024  # Also real on a software GPU in phantom mode.
# The GPU multiplies in pieces of this size: it needs as much memory again while it does.
PIECE_BYTES = 64 * MiB
WORD_BYTES = 8


def read_checksum(device: BorrowingDevice) -> Callable[[int, int], int]:
    """Over the bytes as they are read back. For tests: a real engine's weights would take seconds."""

    def checksum(address: int, size_bytes: int) -> int:
        value = 0
        for offset in range(0, size_bytes, READ_BYTES):
            value = zlib.crc32(device.read_address(address + offset, min(READ_BYTES, size_bytes - offset)), value)
        return value

    return checksum


def torch_checksum(torch: Any, ordinal: int) -> Callable[[int, int], int]:
    """Sum of all words, each times its position, modulo 2**64: on the GPU, at the speed of its memory."""
    device = f"cuda:{ordinal}"
    weights = torch.arange(1, PIECE_BYTES // WORD_BYTES + 1, dtype=torch.int64, device=device) * 2 + 1

    def checksum(address: int, size_bytes: int) -> int:
        value = 0
        for offset in range(0, size_bytes, PIECE_BYTES):
            count = min(PIECE_BYTES, size_bytes - offset) // WORD_BYTES
            words = torch.as_tensor(_Words(address + offset, count), device=device)
            value = (value * 31 + int((words * weights[:count]).sum().item())) % (1 << 64)
        return value

    return checksum


class _Words:
    """Device memory as torch takes it over, without a copy."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "<i8",
            "data": (address, True),
            "version": 3,
        }

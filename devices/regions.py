"""Arithmetic of regions, and the checks that every `Device` makes first, so that all refuse the same mistakes alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.api import InvalidUse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.api import HostBuffer, Region

# `read` and `write` are for markers and checksums. Up to this size a copy always moves real bytes, in the software
# driver's phantom mode too.
SMALL_COPY_BYTES_MAX = 64 * 1024


def check_positive(call: str, size_bytes: int) -> None:
    """Raises `InvalidUse` for a size that no memory can have."""
    if size_bytes <= 0:
        raise InvalidUse(call=call, code="NOT_POSITIVE", detail=str(size_bytes))


def check_range(what: str, *, offset_bytes: int, size_bytes: int, whole_bytes: int) -> None:
    """Raises `InvalidUse` for a part that is not wholly inside."""
    if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > whole_bytes:
        detail = f"{size_bytes} bytes at {offset_bytes} of {whole_bytes}"
        raise InvalidUse(call=what, code="OUT_OF_RANGE", detail=detail)


def check_access(*, is_backed: bool, is_writable: bool = True) -> None:
    """Raises `InvalidUse` where the hardware would fault, which on a real GPU breaks the whole context."""
    if not is_backed:
        raise InvalidUse(call="region", code="NOT_BACKED")
    if not is_writable:
        raise InvalidUse(call="region", code="READ_ONLY")


def check_small(size_bytes: int) -> None:
    """Raises `InvalidUse` for a `read` or `write` that should be a copy."""
    if not 0 <= size_bytes <= SMALL_COPY_BYTES_MAX:
        raise InvalidUse(call="region", code="NOT_SMALL", detail=f"{size_bytes} of {SMALL_COPY_BYTES_MAX} bytes")


def copy_length(
    region: Region, host: HostBuffer, region_offset_bytes: int, host_offset_bytes: int, size_bytes: int | None
) -> int:
    """What a copy moves: the size asked for, or all that both sides have after their offsets."""
    if size_bytes is not None:
        return size_bytes
    return max(0, min(region.size_bytes - region_offset_bytes, host.size_bytes - host_offset_bytes))


def chunk_spans(size_bytes: int, *, chunk_bytes: int) -> Sequence[tuple[int, int]]:
    """`(offset, size)` of the pieces that cover a range, in address order; the last one may be smaller."""
    return [(offset, min(chunk_bytes, size_bytes - offset)) for offset in range(0, size_bytes, chunk_bytes)]

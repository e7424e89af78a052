"""Bytes that are mostly the same: the content of virtual memory, in space proportional to what was written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Extent:
    """A written part. `content` is its bytes, or one value that fills it."""

    start: int
    size: int
    content: bytes | int

    @property
    def end(self) -> int:
        return self.start + self.size

    def part(self, start: int, end: int, *, moved_by: int = 0) -> _Extent:
        """The piece between two positions inside it, at a place `moved_by` further on."""
        content = self.content
        if isinstance(content, bytes):
            content = content[start - self.start : end - self.start]
        return _Extent(start + moved_by, end - start, content)


class SparseBytes:
    """A range of bytes, all zero at first. Offsets are not checked: callers have done that."""

    def __init__(self) -> None:
        self._extents: list[_Extent] = []  # ascending, never overlapping

    def write(self, offset: int, content: bytes) -> None:
        self._put(_Extent(offset, len(content), content))

    def fill(self, offset: int, size: int, byte: int) -> None:
        self._put(_Extent(offset, size, byte))

    def read(self, offset: int, size: int) -> bytes:
        result = bytearray(size)
        for extent in self._within(offset, offset + size, moved_by=-offset):
            content = extent.content
            result[extent.start : extent.end] = (
                content if isinstance(content, bytes) else bytes([content]) * extent.size
            )
        return bytes(result)

    def copy_from(self, source: SparseBytes, *, source_offset: int, offset: int, size: int) -> None:
        """Take over a part of other bytes; what the source never wrote becomes zero here."""
        copied = source._within(source_offset, source_offset + size, moved_by=offset - source_offset)
        self.fill(offset, size, 0)
        for extent in copied:
            self._put(extent)

    def clone(self, size: int) -> SparseBytes:
        """A copy of the first `size` bytes."""
        copy = SparseBytes()
        copy._extents = self._within(0, size)
        return copy

    def _within(self, start: int, end: int, *, moved_by: int = 0) -> list[_Extent]:
        return [
            extent.part(max(start, extent.start), min(end, extent.end), moved_by=moved_by)
            for extent in self._extents
            if extent.start < end and start < extent.end
        ]

    def _put(self, new: _Extent) -> None:
        if not new.size:
            return
        kept = []
        for extent in self._extents:
            if extent.end <= new.start or new.end <= extent.start:
                kept.append(extent)
                continue
            if extent.start < new.start:
                kept.append(extent.part(extent.start, new.start))
            if new.end < extent.end:
                kept.append(extent.part(new.end, extent.end))
        self._extents = sorted([*kept, new], key=lambda extent: extent.start)

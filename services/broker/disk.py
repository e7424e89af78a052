"""Slabs between a block's file and a file of their own, holes left as holes; and what names their bytes."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from services.broker.space import Extent

_STEP_BYTES: Final = 4 * 1024 * 1024


def slab_path(folder: Path, slab_id: int) -> Path:
    return folder / f"slab-{slab_id:012}"


def data_extents(descriptor: int, *, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """`(offset, size)` of what was ever written in a part of a file."""
    at = begin
    while at < end:
        try:
            first = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole to the end of the file
            return
        if first >= end:
            return
        after = min(end, os.lseek(descriptor, first, os.SEEK_HOLE))
        yield first, after - first
        at = after


def digest(descriptor: int, *, begin: int, size_bytes: int) -> str:
    """SHA-256 of the data with its places; empty where nothing was ever written, so that nothing is known.

    A software GPU that moves no bytes leaves holes. They say nothing about the content, and are never taken for equal.
    """
    found = hashlib.sha256()
    is_empty = True
    for offset, length in data_extents(descriptor, begin=begin, end=begin + size_bytes):
        is_empty = False
        found.update(f"{offset - begin}+{length};".encode())
        for at in range(offset, offset + length, _STEP_BYTES):
            found.update(os.pread(descriptor, min(_STEP_BYTES, offset + length - at), at))
    return "" if is_empty else found.hexdigest()


def write_slab(path: Path, descriptor: int, extent: Extent, *, size_bytes: int) -> str:
    """Copy a slab out of its block into a file that is complete or not there; the digest."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    target = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        begin = extent.offset_bytes
        os.ftruncate(target, size_bytes)
        _copy(descriptor, target, begin=begin, end=begin + size_bytes, shift=-begin)
        os.fsync(target)
        found = digest(target, begin=0, size_bytes=size_bytes)
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    finally:
        os.close(target)
    return found


def read_slab(path: Path, descriptor: int, extent: Extent, *, size_bytes: int) -> str:
    """Copy a slab's file into a block; the digest of what the block holds then."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = digest(source, begin=0, size_bytes=size_bytes)
        _copy(source, descriptor, begin=0, end=size_bytes, shift=extent.offset_bytes)
    finally:
        os.close(source)
    return found


def _copy(source: int, target: int, *, begin: int, end: int, shift: int) -> None:
    for offset, length in data_extents(source, begin=begin, end=end):
        for at in range(offset, offset + length, _STEP_BYTES):
            content = os.pread(source, min(_STEP_BYTES, offset + length - at), at)
            written = 0
            while written < len(content):
                written += os.pwrite(target, content[written:], at + shift + written)

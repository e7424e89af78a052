"""Marks in device memory by which an engine knows its own content again after a swap.

A probe is 4 KiB of bytes that only this model, this generation and this offset have. It stays below the size up to
which the software GPU moves real bytes in phantom mode, so that the check is real there too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

PROBE_BYTES = 4096
PROBES_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What must be found at an offset of a region."""

    offset_bytes: int
    digest: bytes


def digest_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def probe_content(label: str, *, generation: int, offset_bytes: int) -> bytes:
    """The bytes of one probe."""
    return hashlib.shake_128(f"{label}\x00{generation}\x00{offset_bytes}".encode()).digest(PROBE_BYTES)


def probe_offsets(size_bytes: int) -> tuple[int, ...]:
    """The first page of a region, its last page, and some evenly between; ascending, without repeats."""
    last = size_bytes - PROBE_BYTES
    page_count = size_bytes // PROBE_BYTES
    steps = min(PROBES_MAX, page_count) - 1
    if steps <= 0:
        return (0,)
    return tuple(sorted({last * step // steps // PROBE_BYTES * PROBE_BYTES for step in range(steps + 1)}))


def damaged(probes: tuple[Probe, ...], read: Callable[[int], bytes]) -> tuple[int, ...]:
    """Offsets at which `read` does not find what was put there."""
    return tuple(probe.offset_bytes for probe in probes if digest_of(read(probe.offset_bytes)) != probe.digest)

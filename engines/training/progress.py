"""How far a training job is: a step count, and a value that only exactly those steps can have led to.

Pure. Each step hashes the value of the one before, so a step lost, repeated or damaged shows at the next check.
The page is how this lies in device memory; a checkpoint is how it lies on disk.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

PAGE_BYTES = 4096  # below the size up to which the software GPU moves real bytes in phantom mode
_HEADER = struct.Struct("<8sQ32sI")
_MAGIC = b"SUBTRAIN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`digest` is 32 bytes, decided by model, seed and `step_count` alone."""

    step_count: int
    digest: bytes

    def next(self) -> Progress:
        """After one more step."""
        step_count = self.step_count + 1
        return Progress(
            step_count=step_count,
            digest=hashlib.blake2b(self.digest + step_count.to_bytes(8, "little"), digest_size=32).digest(),
        )


def beginning(model: str, *, seed: int) -> Progress:
    """Before the first step."""
    return Progress(step_count=0, digest=hashlib.blake2b(f"{model}\x00{seed}".encode(), digest_size=32).digest())


def page_of(progress: Progress) -> bytes:
    """The page for device memory: header with checksum, then bytes that change with each step."""
    fields = (_MAGIC, progress.step_count, progress.digest)
    checksum = zlib.crc32(_HEADER.pack(*fields, 0))
    filling = hashlib.shake_128(progress.digest).digest(PAGE_BYTES - _HEADER.size)
    return _HEADER.pack(*fields, checksum) + filling


def progress_in(page: bytes) -> Progress | None:
    """What a page says; None when any byte of it is not as it was written."""
    magic, step_count, digest, _ = _HEADER.unpack_from(page)
    if magic != _MAGIC:
        return None
    progress = Progress(step_count=step_count, digest=digest)
    return progress if page_of(progress) == page else None

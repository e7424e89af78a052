"""The end of an engine's log, in bounded pieces."""

from pathlib import Path
from typing import Final

from schemas.queries import LogChunk

CHUNK_BYTES_MAX: Final = 256 * 1024
"""Below the bus's limit of 1 MiB for a message."""


def read_tail(path: Path, *, after_bytes: int, tail_count: int) -> LogChunk:
    """Whole lines after an offset; with 0, the last `tail_count` lines.

    A log that was rotated is read from its start.
    """
    size = path.stat().st_size
    begin = after_bytes if 0 < after_bytes <= size else max(0, size - CHUNK_BYTES_MAX) if after_bytes == 0 else 0
    with path.open("rb") as file:
        file.seek(begin)
        content = file.read(CHUNK_BYTES_MAX)
    end = content.rfind(b"\n") + 1
    lines = content[:end].decode(errors="replace").splitlines()
    if after_bytes == 0:
        lines = lines[-tail_count:]
    return LogChunk(lines=tuple(lines), next_bytes=begin + end)

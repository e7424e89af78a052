"""A local write-ahead journal: a node agent commits here first, so that it can act while the stream is away.

One file; each record is a length, a CRC-32 and a JSON array of the entries that were decided together: all of them are
there after a crash, or none. A torn tail (power cut, kill) is cut off at the next start; all before it was synced
to disk before anything that follows from it was done.
"""

import os
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from kit.bus import Entry

_HEADER_BYTES: Final = 8
RECORD_BYTES_MAX: Final = 16 * 1024**2


class JournalDamaged(Exception):
    """A record before the end does not match its checksum: the file was changed by something else."""


class Journal:
    """Entries in the order in which they were decided. Blocking; call from a worker thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()  # A trim swaps the file that a write in another thread appends to.
        path.parent.mkdir(parents=True, exist_ok=True)
        self._entries = self._recover()
        self._file = path.open("ab")

    @property
    def entries(self) -> Sequence[Entry]:
        """What the file held when it was opened, and what was written since the last trim."""
        return self._entries

    def write(self, entries: Sequence[Entry]) -> None:
        """Returns when the entries are on disk, as one record."""
        with self._lock:
            self._file.write(self._record(entries))
            self._file.flush()
            os.fdatasync(self._file.fileno())
            self._entries.extend(entries)

    def trim(self, uploaded_ids: Iterable[str]) -> None:
        """Forget entries that the stream holds. Rewrites the file atomically."""
        gone = set(uploaded_ids)
        with self._lock:
            kept = [entry for entry in self._entries if entry.id not in gone]
            replacement = self._path.with_suffix(".new")
            with replacement.open("wb") as file:
                if kept:
                    file.write(self._record(kept))
                file.flush()
                os.fsync(file.fileno())
            replacement.replace(self._path)
            self._file.close()
            self._file = self._path.open("ab")
            self._entries = kept

    def close(self) -> None:
        self._file.close()

    def _record(self, entries: Sequence[Entry]) -> bytes:
        body = self._encoder.encode(list(entries))
        return len(body).to_bytes(4, "big") + zlib.crc32(body).to_bytes(4, "big") + body

    def _recover(self) -> list[Entry]:
        if not self._path.exists():
            return []
        raw = self._path.read_bytes()
        decoder = msgspec.json.Decoder(list[Entry])
        entries: list[Entry] = []
        offset = 0
        while offset + _HEADER_BYTES <= len(raw):
            size = int.from_bytes(raw[offset : offset + 4], "big")
            checksum = int.from_bytes(raw[offset + 4 : offset + 8], "big")
            body = raw[offset + _HEADER_BYTES : offset + _HEADER_BYTES + size]
            if size > RECORD_BYTES_MAX or len(body) < size or zlib.crc32(body) != checksum:
                break
            entries.extend(decoder.decode(body))
            offset += _HEADER_BYTES + size
        if offset < len(raw):
            self._cut(raw, offset)
        return entries

    def _cut(self, raw: bytes, offset: int) -> None:
        """Drop a torn tail. Refuses when whole records follow the bad one: that is damage, not a torn write."""
        size = int.from_bytes(raw[offset : offset + 4], "big")
        if size <= RECORD_BYTES_MAX and offset + _HEADER_BYTES + size < len(raw):
            raise JournalDamaged(
                f"{self._path}: record at byte {offset} is damaged and others follow; move the file away to start anew"
            )
        with self._path.open("r+b") as file:
            file.truncate(offset)
            os.fsync(file.fileno())

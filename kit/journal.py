"""A local write-ahead journal: a node agent commits here first, so that it can act while the stream is away.

One file; each record is a length, a CRC-32 and a JSON array of the entries that were decided together: all of them are
there after a crash, or none. A record is synced before the next one is begun, so a power cut or a full disk can spoil
the last one only: it is cut off, at the next start or at once. Names are synced as well, by their folder.
"""

import os
import threading
import zlib
from collections.abc import Iterable, Sequence
from io import FileIO
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
        self.path = path
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()  # A trim swaps the file that a write in another thread appends to.
        _make_folder(path.parent)
        self._entries = self._recover()
        self._open()

    @property
    def entries(self) -> Sequence[Entry]:
        """What the file held when it was opened, and what was written since the last trim."""
        return self._entries

    def write(self, entries: Sequence[Entry]) -> None:
        """Returns when the entries are on disk, as one record.

        Raises `OSError` when they are not (a full disk, say); nothing of them is left then, and it may be tried again.
        """
        with self._lock:
            record = self._record(entries)
            try:
                _write_whole(self._file, record)
                os.fdatasync(self._file.fileno())
            except OSError:
                self._file.truncate(self._size_bytes)
                raise
            self._size_bytes += len(record)
            self._entries.extend(entries)

    def trim(self, uploaded_ids: Iterable[str]) -> None:
        """Forget entries that the stream holds. Rewrites the file atomically; `OSError` leaves it as it was."""
        gone = set(uploaded_ids)
        with self._lock:
            kept = [entry for entry in self._entries if entry.id not in gone]
            replacement = self.path.with_suffix(".new")
            try:
                with replacement.open("wb") as file:
                    if kept:
                        file.write(self._record(kept))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                replacement.unlink(missing_ok=True)
                raise
            replacement.replace(self.path)
            self._file.close()
            self._open()
            self._entries = kept

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        """Nothing is written before the name is durable too: a cut would bring back the file that had it before."""
        self._file = self.path.open("ab", buffering=0)
        _sync_folder(self.path.parent)
        self._size_bytes = self.path.stat().st_size

    def _record(self, entries: Sequence[Entry]) -> bytes:
        body = self._encoder.encode(list(entries))
        return len(body).to_bytes(4, "big") + zlib.crc32(body).to_bytes(4, "big") + body

    def _recover(self) -> list[Entry]:
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        decoder = msgspec.json.Decoder(list[Entry])
        entries: list[Entry] = []
        offset = 0
        while (body := _body_at(raw, offset)) is not None:
            entries.extend(decoder.decode(body))
            offset += _HEADER_BYTES + len(body)
        if offset < len(raw):
            self._cut(raw, offset)
        return entries

    def _cut(self, raw: bytes, offset: int) -> None:
        """Drop a torn tail. Refuses when a whole record follows the bad one: that is damage, not a torn write."""
        start = offset
        while (start := raw.find(b"[", start + 1)) != -1:
            if start - _HEADER_BYTES > offset and _body_at(raw, start - _HEADER_BYTES) is not None:
                raise JournalDamaged(
                    f"{self.path}: the record at byte {offset} is damaged and others follow; "
                    "move the file away to start anew"
                )
        with self.path.open("r+b") as file:
            file.truncate(offset)
            os.fsync(file.fileno())


def _body_at(raw: bytes, offset: int) -> bytes | None:
    """The record's body, if a whole one begins there. Zeros are none: a cut may leave a tail of them."""
    size = int.from_bytes(raw[offset : offset + 4], "big")
    checksum = int.from_bytes(raw[offset + 4 : offset + 8], "big")
    body = raw[offset + _HEADER_BYTES : offset + _HEADER_BYTES + size]
    return body if 0 < size == len(body) and size <= RECORD_BYTES_MAX and zlib.crc32(body) == checksum else None


def _write_whole(file: FileIO, record: bytes) -> None:
    written = 0
    while written < len(record):
        written += file.write(record[written:])


def _make_folder(folder: Path) -> None:
    """With its parents, durably."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        _sync_folder(one.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

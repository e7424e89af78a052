"""Checkpoints on disk: written so that a crash at any instant leaves the older one whole, read newest valid first."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from engines.training.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

KEPT_COUNT = 3  # the newest, and two to fall back to
_PREFIX = "step-"
_SUFFIX = ".json"


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file. `checksum` is over the other fields."""

    model: str
    seed: int
    step_count: int
    digest_hex: str
    checksum: int

    def expected_checksum(self) -> int:
        return zlib.crc32(f"{self.model}\x00{self.seed}\x00{self.step_count}\x00{self.digest_hex}".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The newest usable checkpoint, and the names of newer files that were not usable."""

    progress: Progress | None
    passed_over: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one job in one directory, which may be shared with nothing else."""

    def __init__(self, directory: Path, *, model: str, seed: int) -> None:
        self._directory = directory
        self._model = model
        self._seed = seed

    def write(self, progress: Progress) -> None:
        """Put a checkpoint in place, durable when this returns; older ones beyond `KEPT_COUNT` go. Raises `OSError`."""
        self._directory.mkdir(parents=True, exist_ok=True)
        record = Record(
            model=self._model,
            seed=self._seed,
            step_count=progress.step_count,
            digest_hex=progress.digest.hex(),
            checksum=0,
        )
        record = msgspec.structs.replace(record, checksum=record.expected_checksum())
        path = self._directory / f"{_PREFIX}{progress.step_count:012d}{_SUFFIX}"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._sync_directory()
        for old in self._names()[KEPT_COUNT:]:
            (self._directory / old).unlink(missing_ok=True)

    def newest(self) -> Found:
        """The newest checkpoint that is whole and of this model and seed. Removes what a crash left half done."""
        if not self._directory.is_dir():
            return Found(progress=None, passed_over=())
        for half_done in self._directory.glob(f"{_PREFIX}*.tmp"):
            half_done.unlink(missing_ok=True)
        passed_over: list[str] = []
        for name in self._names():
            progress = self._read(self._directory / name)
            if progress is not None:
                return Found(progress=progress, passed_over=tuple(passed_over))
            passed_over.append(name)
        return Found(progress=None, passed_over=tuple(passed_over))

    def _names(self) -> list[str]:
        return sorted((path.name for path in self._directory.glob(f"{_PREFIX}*{_SUFFIX}")), reverse=True)

    def _read(self, path: Path) -> Progress | None:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            digest = bytes.fromhex(record.digest_hex)
        except (OSError, ValueError):  # msgspec's errors are ValueErrors
            return None
        is_ours = (record.model, record.seed) == (self._model, self._seed)
        if not is_ours or record.checksum != record.expected_checksum():
            return None
        return Progress(step_count=record.step_count, digest=digest)

    def _sync_directory(self) -> None:
        """Make the rename itself durable."""
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

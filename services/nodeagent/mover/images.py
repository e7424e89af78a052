"""Images of processes in files on a memory file system, so that they outlive whoever wrote them.

One folder for each engine, in it one for each of its processes: ``about.json`` and a file for each GPU.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from devices.api import MiB, OutOfMemory, round_up
from kit.process import ProcessIdentity, identity_of, is_alive

ABOUT: Final = "about.json"
STEP_BYTES: Final = 64 * MiB


class About(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process that was saved, or is being saved."""

    pid: int
    started_ticks: int
    is_ours: bool
    """Its bytes are in the files beside this; else the driver keeps them itself."""
    bytes_by_gpu: dict[str, int]

    @property
    def is_alive(self) -> bool:
        return is_alive(ProcessIdentity(pid=self.pid, started_ticks=self.started_ticks))


class Images:
    """The files. `should_fit`: refuse what the file system has no room for, instead of finding out page by page."""

    def __init__(self, folder: Path, *, should_fit: bool) -> None:
        self._folder = folder
        self._should_fit = should_fit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def open_file(self, image: str, pid: int, gpu_uuid: str, *, size_bytes: int) -> int:
        """A descriptor of a file of at least that size. Raises `OutOfMemory`."""
        path = self._of(image, pid) / gpu_uuid
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        wanted_bytes = round_up(size_bytes, granularity_bytes=STEP_BYTES)
        missing_bytes = wanted_bytes - os.fstat(descriptor).st_size
        room = os.statvfs(self._folder)
        if self._should_fit and missing_bytes > room.f_bavail * room.f_frsize:
            os.close(descriptor)
            raise OutOfMemory(
                call="host image",
                code="NO_ROOM",
                requested_bytes=missing_bytes,
                free_bytes=room.f_bavail * room.f_frsize,
            )
        if missing_bytes > 0:
            os.ftruncate(descriptor, wanted_bytes)
        return descriptor

    def write_about(self, image: str, pid: int, *, is_ours: bool, bytes_by_gpu: Mapping[str, int]) -> None:
        """Before the process is touched: it says where its bytes will be found."""
        identity = identity_of(pid)
        ticks = 0 if identity is None else identity.started_ticks
        about = About(pid=pid, started_ticks=ticks, is_ours=is_ours, bytes_by_gpu=dict(bytes_by_gpu))
        folder = self._of(image, pid)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = folder / f"{ABOUT}.new"
        fresh.write_bytes(msgspec.json.encode(about))
        fresh.rename(folder / ABOUT)

    def about(self, image: str, pid: int) -> About | None:
        """None when nothing was saved, or when it is another process's that had the pid before."""
        try:
            about = msgspec.json.decode((self._of(image, pid) / ABOUT).read_bytes(), type=About)
        except (OSError, msgspec.MsgspecError):
            return None
        return about if about.is_alive else None

    def drop(self, image: str) -> None:
        shutil.rmtree(self._folder / quote(image, safe=""), ignore_errors=True)

    def drop_dead(self) -> None:
        """What no process will ever come back for."""
        for folder in list(self._processes()):
            try:
                about = msgspec.json.decode((folder / ABOUT).read_bytes(), type=About)
            except (OSError, msgspec.MsgspecError):
                about = None
            if about is None or not about.is_alive:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # Another process of the same engine has one in there.
                    folder.parent.rmdir()

    def _processes(self) -> Iterator[Path]:
        for engine in self._folder.iterdir():
            if engine.is_dir():
                yield from (folder for folder in engine.iterdir() if folder.is_dir())

    def _of(self, image: str, pid: int) -> Path:
        return self._folder / quote(image, safe="") / str(pid)

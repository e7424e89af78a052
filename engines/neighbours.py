"""What other engines do on the same GPU right now: a small file of slots that all of them map.

Each engine has one slot and writes only there: what its running step needs of the GPU, and until when. Nobody has to
clean up: what a killed engine wrote runs out by itself, a few milliseconds after the step it was in, and its slot is
free for another one a while later. An engine that cannot have the file runs as if it were alone, and says so.

On the software GPU the file lies in that GPU's own directory, so that engines in several containers share it and two
software hosts do not. Elsewhere it is in a directory of the user's own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engines.model.sharing import Demand, Sharing, progress_rates

SLOT_COUNT = 64
SLOT = struct.Struct("=QQdd")  # owner's token, busy until (ns of the monotonic clock), arithmetic, bandwidth
FILE_BYTES = SLOT_COUNT * SLOT.size
# Between two steps of a busy engine; on a machine with much to do its next step is published a little late.
GRACE_NS = 5_000_000
# A slot not renewed for so long may be taken by another engine; its owner notices and takes a new one.
FORGOTTEN_NS = 10_000_000_000
# No step is published for longer: what lies further ahead is not a time (another clock, half a write).
AHEAD_NS_MAX = 5_000_000_000


def board_path(gpu_uuid: str) -> Path:
    """Where the engines of that GPU meet. Raises `OSError` when the user's own directory is not safe to use."""
    software = os.environ.get("SOFTGPU_DIR")
    if software:
        return Path(software) / f"engines-{gpu_uuid}"
    directory = Path(tempfile.gettempdir()) / f"sublet-engines-{os.getuid()}"
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not directory.is_dir() or directory.is_symlink() or status.st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to somebody else")
    return directory / gpu_uuid


class Neighbours:
    """This engine's slot on a GPU's board, and the others'. `now_ns` is the monotonic clock, which processes share."""

    def __init__(self, path: Path, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """Raises `OSError` when the file cannot be had."""
        self._now_ns = now_ns
        self._token = secrets.randbits(63) + 1
        self._slot = -1
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(self._file).st_size < FILE_BYTES:
                os.ftruncate(self._file, FILE_BYTES)
            self._board = mmap.mmap(self._file, FILE_BYTES)
        except OSError:
            os.close(self._file)
            raise

    def publish(self, demand: Demand, *, for_s: float) -> None:
        """From now on for that long this engine's kernels want the GPU."""
        if self._slot < 0 or self._read(self._slot)[0] != self._token:
            self._slot = self._taken_slot()
        if self._slot >= 0:
            until_ns = self._now_ns() + min(round(for_s * 1e9), AHEAD_NS_MAX)
            self._write(self._slot, until_ns, demand)

    def rest(self) -> None:
        """Nothing runs any more."""
        if self._slot >= 0 and self._read(self._slot)[0] == self._token:
            self._write(self._slot, self._now_ns() - GRACE_NS, Demand(compute_fraction=0.0, memory_fraction=0.0))

    def busy(self) -> list[Demand]:
        """What the others want at this moment."""
        now_ns = self._now_ns()
        demands = []
        for slot in range(SLOT_COUNT):
            token, until_ns, compute, memory = self._read(slot)
            if token in {0, self._token} or not now_ns < until_ns + GRACE_NS <= now_ns + AHEAD_NS_MAX + GRACE_NS:
                continue
            # Not `min(max())`: what is not a number must not get through.
            if 0 <= compute <= 1 and 0 <= memory <= 1:
                demands.append(Demand(compute_fraction=compute, memory_fraction=memory))
        return demands

    def close(self) -> None:
        """Leave the board. Idempotent."""
        if self._file >= 0:
            self.rest()
            self._board.close()
            os.close(self._file)
            self._file = -1

    def _taken_slot(self) -> int:
        """A slot that nobody holds, now ours; -1 when there are more engines than slots."""
        fcntl.flock(self._file, fcntl.LOCK_EX)  # held for microseconds; a killed holder's lock is gone with it
        try:
            now_ns = self._now_ns()
            for slot in range(SLOT_COUNT):
                token, until_ns, _, _ = self._read(slot)
                if token == 0 or not now_ns - FORGOTTEN_NS < until_ns < now_ns + 2 * AHEAD_NS_MAX:
                    self._write(slot, now_ns, Demand(compute_fraction=0.0, memory_fraction=0.0))
                    return slot
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return -1

    def _read(self, slot: int) -> tuple[int, int, float, float]:
        token, until_ns, compute, memory = SLOT.unpack_from(self._board, slot * SLOT.size)
        return token, until_ns, compute, memory

    def _write(self, slot: int, until_ns: int, demand: Demand) -> None:
        SLOT.pack_into(
            self._board, slot * SLOT.size, self._token, until_ns, demand.compute_fraction, demand.memory_fraction
        )


def speed(sharing: Sharing, mine: Demand, others: list[Demand]) -> float:
    """This engine's speed, 0 to 1, beside what the others want now."""
    return progress_rates(sharing, (mine, *others))[0] if others else 1.0

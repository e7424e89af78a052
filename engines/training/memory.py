"""The device memory of the training job: one range at a stable address, all of it changing, so a swap copies it all.

All calls block; the job makes them on its GPU thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.errors import DamagedError
from engines.probes import PROBE_BYTES, Probe, damaged, digest_of, probe_content, probe_offsets
from engines.training.progress import PAGE_BYTES, Progress, page_of, progress_in

if TYPE_CHECKING:
    from devices.api import CopyResult, RestoreResult
    from engines.gpu import OpenedGpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The job's memory is in host memory and off the device."""

    copied_bytes: int
    freed_bytes: int
    copy_s: float


class TrainingMemory:
    """Everything the job holds on the device. The first page has its progress; probes lie over the rest."""

    def __init__(self, gpu: OpenedGpu, *, label: str, size_bytes: int) -> None:
        self.gpu = gpu
        self._device = gpu.device
        # Pinned before it is needed, so that yielding the GPU never waits for it and never fails for want of it.
        self._region = self._device.allocate(size_bytes)
        self._host = self._device.host_arena(self._region.size_bytes)
        self._probes = self._write_probes(label)
        # On the software GPU, whether whole copies move real bytes is found out at the first restore.
        self._is_bulk_checked = not gpu.is_software
        self._has_restored = False

    @property
    def size_bytes(self) -> int:
        return self._region.size_bytes

    @property
    def is_bulk_checked(self) -> bool:
        """False in the software GPU's phantom mode, where only the page with the progress is moved and verified."""
        return self._is_bulk_checked

    def place(self, progress: Progress) -> None:
        """Put the progress on the device."""
        self._device.write(self._region, page_of(progress))

    def step(self, expected: Progress) -> Progress:
        """One step on the device. Raises `DamagedError` unless it finds exactly what the last one left."""
        self.check(expected)
        progress = expected.next()
        self.place(progress)
        return progress

    def check(self, expected: Progress) -> None:
        """Raises `DamagedError` unless the page on the device is that of `expected`."""
        if progress_in(self._device.read(self._region, size_bytes=PAGE_BYTES)) != expected:
            raise DamagedError((0,))

    def save(self) -> Saved:
        """Copy all to the host, then let the device memory go. Idempotent: off the device there is nothing to copy."""
        if not self._device.is_backed(self._region):
            return Saved(copied_bytes=0, freed_bytes=0, copy_s=0.0)
        copied: CopyResult = self._device.copy_to_host(self._region, self._host)
        # In phantom mode a large copy moves nothing; the page is small enough to be moved for real.
        self._device.copy_to_host(self._region, self._host, size_bytes=PAGE_BYTES)
        freed_bytes = self._device.unback(self._region).released_bytes
        return Saved(copied_bytes=copied.copied_bytes, freed_bytes=freed_bytes, copy_s=copied.copy_s)

    def drop(self) -> int:
        """Let the device memory go without copying: the host has what was there; the bytes freed."""
        return self._device.unback(self._region).released_bytes

    def restore(self) -> RestoreResult:
        """Bring all back to the same addresses. Raises `OutOfMemory` with nothing left behind."""
        result = self._device.restore(self._region, self._host)
        self._device.copy_to_device(self._region, self._host, size_bytes=PAGE_BYTES)
        return result

    def verify(self, expected: Progress) -> None:
        """Compare page and probes with what was there before. Raises `DamagedError`."""
        self.check(expected)
        if not self._has_restored and not self._is_bulk_checked:
            self._is_bulk_checked = bool(self._probes) and not damaged(self._probes, self._read)
        self._has_restored = True
        wrong = damaged(self._probes, self._read) if self._is_bulk_checked else ()
        if wrong:
            raise DamagedError(wrong)

    def free_bytes(self) -> int:
        """Free on the whole GPU, as the driver reports it."""
        return self._device.memory().free_bytes

    def close(self) -> None:
        """Leave the device; everything on it is freed."""
        self._device.close()

    def _write_probes(self, label: str) -> tuple[Probe, ...]:
        probes = []
        for offset in probe_offsets(self._region.size_bytes)[1:]:
            content = probe_content(label, generation=0, offset_bytes=offset)
            self._device.write(self._region, content, offset_bytes=offset)
            probes.append(Probe(offset_bytes=offset, digest=digest_of(content)))
        return tuple(probes)

    def _read(self, offset_bytes: int) -> bytes:
        return self._device.read(self._region, offset_bytes=offset_bytes, size_bytes=PROBE_BYTES)

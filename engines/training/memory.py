"""The device memory of the training job: one range at a stable address, all of it changing, so a swap copies it all.

The memory is the job's own, or the memory broker's (`engines.backing`). All calls block; the job makes them on its GPU
thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.backing import Backing, OwnBacking, Restored, moves_bulk_bytes
from engines.errors import DamagedError
from engines.probes import PROBE_BYTES, Probe, damaged, digest_of, probe_content, probe_offsets
from engines.training.progress import PAGE_BYTES, Progress, page_of, progress_in

if TYPE_CHECKING:
    from engines.gpu import OpenedGpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The job's memory is in host memory and off the device."""

    copied_bytes: int
    freed_bytes: int
    copy_s: float


class TrainingMemory:
    """Everything the job holds on the device. The first page has its progress; probes lie over the rest."""

    def __init__(
        self, gpu: OpenedGpu, *, label: str, size_bytes: int, backing: Backing | None = None, name: str = "job"
    ) -> None:
        self.gpu = gpu
        self.backing: Backing = backing or OwnBacking(gpu.device)
        self._device = gpu.device
        self._name = name
        self._save_count = 0
        self._region = self._device.reserve(size_bytes)
        self.backing.back(self._region, name)
        self.backing.prepare(self._region, name)
        # False in the software GPU's phantom mode, where only the page with the progress is moved and verified.
        self.is_bulk_checked = not gpu.is_software or moves_bulk_bytes(self._device, self._region)
        self._device.fill(self._region, 0)  # what a former owner left is no part of the job
        self._probes = self._write_probes(label)

    @property
    def size_bytes(self) -> int:
        return self._region.size_bytes

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

    def seal(self) -> int:
        """Copy all to the host; the bytes. Off the device there is nothing to copy. Raises `StoreError`."""
        if not self._device.is_backed(self._region):
            return 0
        # Counted here, so that a copy from before can never be taken for this one.
        copied_bytes = self.backing.seal(self._region, self._name, generation=self._save_count + 1, content_id="")
        self._save_count += 1
        return copied_bytes

    def save(self) -> Saved:
        """Copy all to the host, then let the device memory go. Idempotent."""
        started_s = time.perf_counter()
        copied_bytes = self.seal()
        copy_s = time.perf_counter() - started_s
        return Saved(copied_bytes=copied_bytes, freed_bytes=self.drop(), copy_s=copy_s)

    def drop(self) -> int:
        """Let the device memory go without copying: the host has what was there; the bytes freed."""
        return self.backing.unback({self._name: self._region})

    def restore(self) -> Restored:
        """Bring all back to the same addresses. Raises `OutOfMemory`, `StoreError` with nothing left behind."""
        return self.backing.restore(self._region, self._name, generation=self._save_count)

    def verify(self, expected: Progress) -> None:
        """Compare page and probes with what was there before. Raises `DamagedError`."""
        self.check(expected)
        wrong = damaged(self._probes, self._read) if self.is_bulk_checked else ()
        if wrong:
            raise DamagedError(wrong)

    def share(self) -> dict[str, object]:
        """What is held of this GPU."""
        own_bytes = self.size_bytes if self._device.is_backed(self._region) else 0
        return {
            "gpu_uuid": self._device.gpu_uuid,
            "context_bytes": self.gpu.context_bytes,
            "brokered_bytes": self.backing.brokered_bytes,
            "held_bytes": self.gpu.context_bytes + own_bytes,
        }

    def free_bytes(self) -> int:
        """Free on the whole GPU, as the driver reports it."""
        return self._device.memory().free_bytes

    def close(self) -> None:
        """Leave the device; everything on it is freed."""
        self._device.close()
        self.backing.close()

    def _write_probes(self, label: str) -> tuple[Probe, ...]:
        probes = []
        for offset in probe_offsets(self._region.size_bytes)[1:]:
            content = probe_content(label, generation=0, offset_bytes=offset)
            self._device.write(self._region, content, offset_bytes=offset)
            probes.append(Probe(offset_bytes=offset, digest=digest_of(content)))
        return tuple(probes)

    def _read(self, offset_bytes: int) -> bytes:
        return self._device.read(self._region, offset_bytes=offset_bytes, size_bytes=PROBE_BYTES)

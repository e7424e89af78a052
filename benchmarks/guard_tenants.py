"""Section ``tenants``: what a tenant finds in memory that the broker lent to another tenant before.

Every page that is looked at was marked by the first tenant. That the look would see marks is shown by looking at them
once before the memory goes back.
"""

from typing import Final

import anyio.to_thread

from benchmarks.guard_stage import PIECE_BYTES, Stage, stage
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from devices.api import DeviceSettings, MiB, Region
from devices.cuda import CudaDevice
from engines.store.connection import StoreSettings
from engines.store.memory import GpuStore
from schemas.deployments import IsolationGrade

ROUNDS: Final = 20
QUICK_ROUNDS: Final = 2
RANGE_BYTES: Final = 8 * PIECE_BYTES
STEP_BYTES: Final = 2 * MiB
MARK: Final = b"a tenant's own bytes, for nobody else to read. " * 85
BARS: Final = (
    Wanted(figure="tenants_foreign_bytes_seen", op="==", bar=0),
    Wanted(figure="tenants_own_bytes_seen", op=">", bar=0),
)


class Tenant:
    """One that has an account of its own; all of them in this process."""

    def __init__(self, made: Stage, name: str) -> None:
        assert made.guard.accounts is not None
        self._name = name
        variables = made.guard.accounts.environment(name, lease_epoch=1)
        settings = StoreSettings(
            socket_path=variables["SUBLET_BROKER_SOCKET"],
            replica_id=name,
            lease_epoch=1,
            key=variables["SUBLET_BROKER_KEY"],
        )
        self._device = CudaDevice(made.gpu_uuid, settings=DeviceSettings(chunk_bytes=PIECE_BYTES))
        self._store = GpuStore(self._device, settings)
        self._region: Region = self._device.reserve(RANGE_BYTES)

    def take(self) -> None:
        self._store.take(self._region, "range")

    def give_back(self) -> None:
        self._store.give_back(self._region, "range")

    def mark(self) -> None:
        for offset in range(0, RANGE_BYTES, STEP_BYTES):
            self._device.write(self._region, MARK, offset_bytes=offset)

    def marked_bytes(self) -> int:
        """Of the marked pages, the bytes that are as they were marked."""
        seen = 0
        for offset in range(0, RANGE_BYTES, STEP_BYTES):
            page = self._device.read(self._region, offset_bytes=offset, size_bytes=len(MARK))
            seen += sum(a == b for a, b in zip(page, MARK, strict=True))
        return seen

    def close(self) -> None:
        self._device.close()
        self._store.close()


async def measure(setting: Setting) -> Measured:
    round_count = setting.count(ROUNDS, QUICK_ROUNDS)
    async with stage(setting.folder, grade=IsolationGrade.BROKER) as made:
        assert made.guard.accounts is not None
        for name in ("tenant-a", "tenant-b"):
            await made.guard.accounts.allow(
                name, lease_epoch=1, tenant=name, deployment_id=name, granted_bytes={made.gpu_uuid: RANGE_BYTES}
            )
        figures = await anyio.to_thread.run_sync(_rounds, made, round_count)
    return Measured(figures=figures)


def _rounds(made: Stage, round_count: int) -> dict[str, Value]:
    one, other = Tenant(made, "tenant-a"), Tenant(made, "tenant-b")
    own_bytes = foreign_bytes = looked_bytes = 0
    try:
        for _ in range(round_count):
            one.take()
            one.mark()
            own_bytes += one.marked_bytes()
            one.give_back()
            other.take()
            foreign_bytes += other.marked_bytes()
            looked_bytes += RANGE_BYTES // STEP_BYTES * len(MARK)
            other.give_back()
            one, other = other, one
    finally:
        one.close()
        other.close()
    return {
        "tenants_foreign_bytes_seen": foreign_bytes,
        "tenants_own_bytes_seen": own_bytes,
        "tenants_looked_bytes": looked_bytes,
    }

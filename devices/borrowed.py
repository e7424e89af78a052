"""A `CudaDevice` for programs that have an allocator of their own: it works on addresses which that one reserved.

Such an allocator (vLLM's, for one) keeps its addresses while memory comes and goes behind them. Here memory of others
is put there, and what lies there is read and copied.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from devices.api import InvalidUse, Region
from devices.backed import RegionState
from devices.cuda import CudaDevice, call

if TYPE_CHECKING:
    from devices.api import DeviceSettings


def gpu_uuid_of(ordinal: int) -> str:
    """The UUID, as NVML prints it, of CUDA's device of that number in this process. Not for MIG parts."""
    call("cuInit", 0)
    raw = call("cuDeviceGetUuid", call("cuDeviceGet", ordinal))
    return f"GPU-{uuid.UUID(bytes=bytes(raw.bytes))}"


class BorrowingDevice(CudaDevice):
    """Regions over borrowed addresses are as others, but their addresses are never given back."""

    def __init__(self, gpu_uuid: str, *, settings: DeviceSettings | None = None) -> None:
        super().__init__(gpu_uuid, settings=settings)
        self._borrowed: set[int] = set()

    def borrow(self, address: int, size_bytes: int) -> Region:
        """A region over addresses that are reserved already; for `import_fds` nothing may be mapped there."""
        self._enter()
        if size_bytes <= 0 or size_bytes % self.granularity_bytes:
            raise InvalidUse(call="borrow", code="NOT_WHOLE_GRANULES", detail=str(size_bytes))
        region = Region(region_id=next(self._ids), gpu_uuid=self.gpu_uuid, address=address, size_bytes=size_bytes)
        with self._table_lock:
            self._regions[region.region_id] = RegionState(region=region)
            self._borrowed.add(region.region_id)
        return region

    def release_addresses(self, region: Region) -> None:
        if region.region_id not in self._borrowed:
            super().release_addresses(region)
            return
        with self._locked(region) as state:
            if state.chunks:
                raise InvalidUse(call="release_addresses", code="BACKED")
            with self._table_lock:
                del self._regions[region.region_id]
                self._borrowed.discard(region.region_id)

    def copy_from_address(self, target: Region, address: int) -> None:
        """Fill a backed region with what lies at an address of this GPU, whoever mapped it; on the GPU itself."""
        with self._locked(target) as state:
            target_address = state.address(offset_bytes=0, size_bytes=target.size_bytes)
            call("cuMemcpyDtoD", target_address, address, target.size_bytes)
            call("cuCtxSynchronize")

    def read_address(self, address: int, size_bytes: int) -> bytes:
        """What lies at an address of this GPU, whoever mapped it."""
        self._enter()
        content = bytearray(size_bytes)
        call("cuMemcpyDtoH", content, address, size_bytes)
        return bytes(content)

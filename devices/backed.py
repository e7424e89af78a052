"""What a device knows about the memory behind a region."""

import threading
from dataclasses import dataclass, field

from devices.api import Region
from devices.regions import check_access, check_range


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One piece of physical memory, mapped into a region. The mapping alone keeps it alive."""

    offset_bytes: int
    size_bytes: int


@dataclass(slots=True, kw_only=True)
class RegionState:
    """Of one region; touched only under its lock."""

    region: Region
    chunks: list[Chunk] = field(default_factory=list)  # from the start without a gap; empty: not backed
    is_imported: bool = False
    is_writable: bool = True
    user_count: int = 0  # copies under way; the chunks stay while there are any
    lock: threading.Condition = field(default_factory=threading.Condition)

    def address(self, *, offset_bytes: int, size_bytes: int) -> int:
        """The device address of a part of the region, which has to be backed."""
        check_access(is_backed=bool(self.chunks))
        check_range("region", offset_bytes=offset_bytes, size_bytes=size_bytes, whole_bytes=self.region.size_bytes)
        return self.region.address + offset_bytes

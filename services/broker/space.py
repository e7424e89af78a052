"""Where slabs lie in the host memory that is pinned: blocks, and the free parts of them. Pure.

A block is one file, pinned as a whole. Extents are whole granules, so that what is free can always be used: an image
takes as many extents as it needs, none above `slab_bytes_max`.
"""

from dataclasses import dataclass, field
from typing import Final

from schemas.units import MiB

GRANULE_BYTES: Final = 2 * MiB
"""A huge page. What an image wastes at its end is less than this for each slab."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Extent:
    block_id: int
    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    block_id: int
    numa_index: int
    size_bytes: int


@dataclass(slots=True, kw_only=True)
class Space:
    blocks: dict[int, Block] = field(default_factory=dict)
    free: dict[int, list[Extent]] = field(default_factory=dict)
    """{block_id: free extents in address order, none touching another}"""

    @property
    def free_bytes(self) -> int:
        return sum(extent.size_bytes for extents in self.free.values() for extent in extents)

    def pinned_bytes(self, numa_index: int | None = None) -> int:
        return sum(
            block.size_bytes for block in self.blocks.values() if numa_index is None or block.numa_index == numa_index
        )

    def used_bytes(self, numa_index: int) -> int:
        free = sum(
            extent.size_bytes
            for block_id, extents in self.free.items()
            if self.blocks[block_id].numa_index == numa_index
            for extent in extents
        )
        return self.pinned_bytes(numa_index) - free

    def add(self, block: Block) -> None:
        self.blocks[block.block_id] = block
        self.free[block.block_id] = [Extent(block_id=block.block_id, offset_bytes=0, size_bytes=block.size_bytes)]

    def take(self, size_bytes: int, *, slab_bytes_max: int, numa_order: tuple[int, ...] = ()) -> tuple[Extent, ...]:
        """Extents that sum up to the size in whole granules; empty when that much is not free.

        From the nearest NUMA node first, there from the oldest block, and as few as fit.
        """
        left_bytes = -(-size_bytes // GRANULE_BYTES) * GRANULE_BYTES
        if left_bytes > self.free_bytes:
            return ()
        rank = {numa_index: place for place, numa_index in enumerate(numa_order)}
        order = sorted(self.blocks.values(), key=lambda block: (rank.get(block.numa_index, len(rank)), block.block_id))
        taken: list[Extent] = []
        for least_bytes in (slab_bytes_max, GRANULE_BYTES):  # whole slabs before crumbs
            for block in order:
                while left_bytes and (found := self._first(block.block_id, at_least=min(least_bytes, left_bytes))):
                    size = min(found.size_bytes, left_bytes, slab_bytes_max)
                    taken.append(self._cut(found, size))
                    left_bytes -= size
        assert not left_bytes, "free bytes are in granules"
        return tuple(taken)

    def _first(self, block_id: int, *, at_least: int) -> Extent | None:
        return next((extent for extent in self.free[block_id] if extent.size_bytes >= at_least), None)

    def _cut(self, found: Extent, size_bytes: int) -> Extent:
        extents = self.free[found.block_id]
        place = extents.index(found)
        rest = Extent(
            block_id=found.block_id, offset_bytes=found.offset_bytes + size_bytes,
            size_bytes=found.size_bytes - size_bytes,
        )  # fmt: skip
        extents[place : place + 1] = [rest] if rest.size_bytes else []
        return Extent(block_id=found.block_id, offset_bytes=found.offset_bytes, size_bytes=size_bytes)

    def take_exactly(self, extent: Extent) -> bool:
        """Take this very extent, of a former life; false when it is not wholly free."""
        for place, found in enumerate(self.free.get(extent.block_id, [])):
            if found.offset_bytes <= extent.offset_bytes and extent.end_bytes <= found.end_bytes:
                before = Extent(
                    block_id=found.block_id, offset_bytes=found.offset_bytes,
                    size_bytes=extent.offset_bytes - found.offset_bytes,
                )  # fmt: skip
                after = Extent(
                    block_id=found.block_id, offset_bytes=extent.end_bytes,
                    size_bytes=found.end_bytes - extent.end_bytes,
                )  # fmt: skip
                self.free[extent.block_id][place : place + 1] = [part for part in (before, after) if part.size_bytes]
                return True
        return False

    def give(self, extent: Extent) -> None:
        """It is free again, and one with its neighbours."""
        extents = sorted([*self.free[extent.block_id], extent])
        merged: list[Extent] = []
        for part in extents:
            if merged and merged[-1].end_bytes == part.offset_bytes:
                last = merged.pop()
                part = Extent(  # noqa: PLW2901
                    block_id=part.block_id, offset_bytes=last.offset_bytes,
                    size_bytes=last.size_bytes + part.size_bytes,
                )  # fmt: skip
            merged.append(part)
        self.free[extent.block_id] = merged

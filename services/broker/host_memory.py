"""Host memory for images: blocks pinned in the background, the disk tier, and slabs that are there twice made one.

All state is changed on the event loop; bytes are moved in worker threads. Every change that frees an extent writes the
index before the loop does anything else, so that no extent is used again while an index on file still gives it to an
image: whenever this process is killed, what the index says is what the blocks hold.
"""

import logging
import os
from collections.abc import Sequence
from typing import Final

import anyio
import anyio.to_thread

from devices.api import Device, DeviceError, HostBuffer
from schemas.brokers import HostPoolView
from services.broker import arena_index, disk, numa
from services.broker.arena import SLAB_BYTES_MAX, Arena, Image, Slab
from services.broker.gpu import Part
from services.broker.refusals import Refused
from services.broker.settings import BrokerSettings, Pin
from services.broker.space import GRANULE_BYTES, Block

_LOOK_EVERY_S: Final = 0.5

log = logging.getLogger(__name__)


class HostMemory:
    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._folder = settings.arena
        self._disk = settings.disk
        self._index = self._folder / "index.json"
        self._nodes = numa.nodes()
        budget_bytes = settings.host_budget_bytes or numa.available_bytes() // 2
        self.arena = Arena(
            host_budget_bytes=budget_bytes // GRANULE_BYTES * GRANULE_BYTES,
            disk_budget_bytes=settings.disk_budget_bytes,
            slab_bytes_max=min(SLAB_BYTES_MAX, settings.block_bytes // GRANULE_BYTES * GRANULE_BYTES),
        )
        self._device: Device | None = None
        self._descriptors: dict[int, int] = {}
        self._buffers: dict[int, HostBuffer] = {}
        self._next_block_id = 1
        self._pinning = anyio.Lock()
        self._moving = anyio.Lock()
        self._disk_slab_ids: set[int] = set()
        self._looked_at: set[int] = set()
        """Slabs whose digest is known, or known to say nothing, and right."""
        self._pin_threads = anyio.CapacityLimiter(1)
        self._disk_threads = anyio.CapacityLimiter(1)
        self._changed = anyio.Event()

    # ---- begin and end

    def start(self) -> int:
        """Adopt what a former broker of this folder left; the number of images."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = arena_index.read(self._index)
        block_size = {_number(path): path.stat().st_size for path in self._folder.glob("block-*")}
        disk_size: dict[int, int] = {}
        if self.arena.disk_budget_bytes:
            self._disk.mkdir(parents=True, exist_ok=True, mode=0o700)
            disk_size = {_number(path): path.stat().st_size for path in self._disk.glob("slab-????????????")}
        if found is not None:
            arena_index.adopt(self.arena, found, block_size=block_size, disk_size=disk_size)
        for block_id in block_size:
            path = arena_index.block_path(self._folder, block_id)
            if block_id in self.arena.space.blocks:
                self._descriptors[block_id] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            else:
                path.unlink()
        self._next_block_id = max(block_size, default=0) + 1
        self._disk_slab_ids = set(disk_size)
        self.save()
        return len(self.arena.images)

    def use(self, device: Device) -> None:
        """Pin with this device from now on, for all."""
        if self._device is None:
            self._device = device
            self._look()

    def close(self, *, is_kept: bool) -> None:
        """Unpin. What is not kept is gone."""
        for buffer in self._buffers.values():
            try:
                buffer.close()
            except DeviceError as error:
                log.warning("host memory was not unpinned", extra={"why": str(error)})
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        if is_kept:
            return
        for path in (*self._folder.glob("block-*"), self._index):
            path.unlink(missing_ok=True)
        self._folder.rmdir()
        for path in self._disk.glob("slab-*"):
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Call it after every change of images, before anything is awaited."""
        arena_index.write(self._index, self.arena)
        kept = {slab.slab_id for slab in self.arena.slabs.values() if slab.is_on_disk}
        for slab_id in self._disk_slab_ids - kept:
            disk.slab_path(self._disk, slab_id).unlink(missing_ok=True)
        self._disk_slab_ids = kept
        self._looked_at &= set(self.arena.slabs)
        self._look()

    def _look(self) -> None:
        """There may be something to do in the background."""
        self._changed.set()

    # ---- pinned blocks

    async def _pin(self, block_id: int) -> HostBuffer:
        """The block as a buffer, pinned now if it is not yet."""
        if block_id in self._buffers:  # as those of a wake, which asks for hundreds while somebody waits
            return self._buffers[block_id]
        async with self._pinning:
            if block_id not in self._buffers:
                device = self._device
                if device is None:
                    raise Refused("no GPU is open yet, so that no host memory can be pinned", again_after_s=1.0)
                size_bytes = self.arena.space.blocks[block_id].size_bytes
                descriptor = self._descriptors[block_id]
                try:
                    self._buffers[block_id] = await anyio.to_thread.run_sync(
                        lambda: device.host_arena(size_bytes, shared_fd=descriptor), limiter=self._pin_threads
                    )
                except DeviceError as error:
                    raise Refused(
                        f"{size_bytes} bytes of host memory cannot be pinned: {error}", short_by_bytes=size_bytes
                    ) from error
            return self._buffers[block_id]

    def _unpinned_bytes(self) -> int:
        return max(0, self.arena.host_budget_bytes - self.arena.space.pinned_bytes())

    async def _add_block(self, numa_order: tuple[int, ...]) -> bool:
        """One more block, pinned; false when the budget is used up."""
        size_bytes = min(self._settings.block_bytes, self._unpinned_bytes()) // GRANULE_BYTES * GRANULE_BYTES
        if size_bytes <= 0:
            return False
        share_bytes = self.arena.host_budget_bytes // len(self._nodes)
        order = (*numa_order, *(node for node in self._nodes if node not in numa_order))
        near = [node for node in order if node in self._nodes]
        free = [node for node in near if self.arena.space.pinned_bytes(node) < share_bytes] or near
        block = Block(block_id=self._next_block_id, numa_index=free[0], size_bytes=size_bytes)
        self._next_block_id += 1
        path = arena_index.block_path(self._folder, block.block_id)
        descriptor = arena_index.make_block(path, size_bytes=size_bytes)
        if len(self._nodes) > 1 and not numa.place(descriptor, size_bytes=size_bytes, numa_index=block.numa_index):
            log.warning("the kernel takes no wish for a NUMA node", extra={"node": block.numa_index})
        self._descriptors[block.block_id] = descriptor
        self.arena.space.blocks[block.block_id] = block
        self.arena.space.free[block.block_id] = []
        try:
            await self._pin(block.block_id)
        except BaseException:
            os.close(self._descriptors.pop(block.block_id))
            del self.arena.space.blocks[block.block_id], self.arena.space.free[block.block_id]
            path.unlink(missing_ok=True)
            raise
        self.arena.space.add(block)
        return True

    async def room(self, size_bytes: int, *, numa_order: tuple[int, ...]) -> None:
        """Returns with so much free, until the caller awaits something; pins and demotes for it. Raises `Refused`."""
        while self.arena.space.free_bytes < size_bytes:
            async with self._moving:
                short_bytes = size_bytes - self.arena.space.free_bytes
                if short_bytes <= 0 or await self._add_block(numa_order):
                    continue
                slabs = self.arena.coldest(short_bytes)
                if not slabs:
                    raise Refused(
                        f"host memory for images has {self.arena.space.free_bytes} bytes free and the rest is in use",
                        short_by_bytes=short_bytes, again_after_s=1.0,
                    )  # fmt: skip
                for slab in slabs:
                    await self._demote(slab)

    async def parts(self, slabs: Sequence[Slab]) -> list[Part]:
        """Where they lie; all have to be in host memory, and busy."""
        found = []
        for slab in slabs:
            assert slab.extent is not None
            host = await self._pin(slab.extent.block_id)
            found.append(Part(host=host, offset_bytes=slab.extent.offset_bytes, size_bytes=slab.size_bytes))
        return found

    # ---- the disk

    async def _demote(self, slab: Slab) -> None:
        """Out of host memory, onto disk if it is not there as well. Raises `Refused` when the disk is full."""
        if not slab.is_on_disk:
            self._room_on_disk(slab.size_bytes)
            extent = slab.extent
            if extent is None or slab.slab_id not in self.arena.slabs:
                return
            path = disk.slab_path(self._disk, slab.slab_id)
            descriptor = self._descriptors[extent.block_id]
            self.arena.busy((slab,))
            try:
                found = await anyio.to_thread.run_sync(
                    lambda: disk.write_slab(path, descriptor, extent, size_bytes=slab.size_bytes),
                    limiter=self._disk_threads,
                )
                slab.is_on_disk, slab.digest = True, found
                self._disk_slab_ids.add(slab.slab_id)
            except OSError as error:
                raise Refused(f"the disk tier takes no image: {error}", short_by_bytes=slab.size_bytes) from error
            finally:
                self.arena.idle((slab,))
        if slab.slab_id in self.arena.slabs and not slab.busy_count:
            self.arena.left_host(slab)
        self.save()

    def _room_on_disk(self, size_bytes: int) -> None:
        """Copies of what is in host memory as well make way."""
        for slab in sorted(self.arena.slabs.values(), key=lambda slab: -slab.last_used):
            if self.arena.disk_used_bytes + size_bytes <= self.arena.disk_budget_bytes:
                return
            if slab.is_on_disk and slab.extent is not None:
                slab.is_on_disk = False
        short_by_bytes = self.arena.disk_used_bytes + size_bytes - self.arena.disk_budget_bytes
        if short_by_bytes > 0:
            raise Refused(
                f"host memory for images is full, and so are the {self.arena.disk_budget_bytes} bytes on disk",
                short_by_bytes=short_by_bytes,
            )

    async def bring(self, slabs: Sequence[Slab], *, numa_order: tuple[int, ...]) -> None:
        """All of these busy slabs are in host memory when this returns. Raises `Refused`."""
        for slab in slabs:
            while slab.extent is None:
                await self.room(slab.size_bytes, numa_order=numa_order)
                await self._load(slab, numa_order=numa_order)

    async def _load(self, slab: Slab, *, numa_order: tuple[int, ...]) -> None:
        extents = self.arena.space.take(
            slab.size_bytes, slab_bytes_max=self.arena.slab_bytes_max, numa_order=numa_order
        )
        if len(extents) != 1:  # a slab is one extent: in crumbs it does not fit
            for extent in extents:
                self.arena.space.give(extent)
            await self._defragment(slab.size_bytes)
            return
        extent = extents[0]
        path = disk.slab_path(self._disk, slab.slab_id)
        descriptor = self._descriptors[extent.block_id]
        try:
            found = await anyio.to_thread.run_sync(
                lambda: disk.read_slab(path, descriptor, extent, size_bytes=slab.size_bytes), limiter=self._disk_threads
            )
        except OSError as error:
            self.arena.space.give(extent)
            raise Refused(f"an image on disk cannot be read: {error}") from error
        if found != slab.digest:
            self.arena.space.give(extent)
            raise Refused("an image on disk is damaged: its checksum differs from what was written")
        if slab.extent is not None:  # another restore was quicker
            self.arena.space.give(extent)
            return
        slab.extent = extent
        self.save()

    async def _defragment(self, size_bytes: int) -> None:
        """Demote until one free extent is large enough; the coldest first."""
        async with self._moving:
            slabs = self.arena.coldest(size_bytes)
            if not slabs:
                raise Refused(
                    "host memory for images is free in small parts only, and the rest is in use",
                    short_by_bytes=size_bytes, again_after_s=1.0,
                )  # fmt: skip
            await self._demote(slabs[0])

    # ---- the background

    async def run(self) -> None:
        """Pins ahead, names slabs by their bytes and keeps equal ones once; for ever."""
        while True:
            with anyio.move_on_after(_LOOK_EVERY_S):
                await self._changed.wait()
            self._changed = anyio.Event()
            try:
                await self._pin_ahead()
                while self._nameless() is not None:
                    async with self._moving:  # a slab that is being read is not demoted, and somebody may want room
                        slab = self._nameless()
                        if slab is not None:
                            await self._name(slab)
            except Refused as refused:
                log.warning("host memory is not made ready", extra={"why": refused.sentence})
                await anyio.sleep(1.0)

    async def _pin_ahead(self) -> None:
        if self._device is None:
            return
        for block_id in sorted(self.arena.space.blocks):
            await self._pin(block_id)
        while self._wanted_bytes() > self.arena.space.pinned_bytes():
            async with self._moving:
                if not await self._add_block(()):
                    return

    def _wanted_bytes(self) -> int:
        if self._settings.pin is Pin.BUDGET:
            return self.arena.host_budget_bytes
        promised_bytes = sum(self.arena.promised_bytes(replica_id) for replica_id in self.arena.reserved)
        used_bytes = self.arena.host_used_bytes
        if not promised_bytes and not used_bytes:
            return 0
        return min(self.arena.host_budget_bytes, promised_bytes + used_bytes)

    def _nameless(self) -> Slab | None:
        """The oldest slab in host memory whose bytes were not looked at."""
        found = [
            slab
            for slab in self.arena.slabs.values()
            if slab.user_count and slab.extent is not None and slab.slab_id not in self._looked_at
        ]
        return min(found, key=lambda slab: slab.slab_id) if found else None

    async def _name(self, slab: Slab) -> None:
        """Take its digest; one that was known already, of a former broker's slab, has to be the same."""
        extent = slab.extent
        assert extent is not None
        self._looked_at.add(slab.slab_id)
        self.arena.busy((slab,))
        found = await anyio.to_thread.run_sync(
            lambda: disk.digest(
                self._descriptors[extent.block_id], begin=extent.offset_bytes, size_bytes=slab.size_bytes
            )
        )
        if slab.digest and slab.digest != found:
            log.error("an image in host memory is damaged and forgotten", extra={"slab": slab.slab_id})
            self._forget_users(slab)
        slab.digest = found
        self.arena.idle((slab,))
        same = self.arena.same_as(slab) if slab.slab_id in self.arena.slabs else None
        if same is not None:
            self.arena.merge(slab, same)
        self.save()

    def _forget_users(self, slab: Slab) -> None:
        for image in [image for image in self.arena.images.values() if slab.slab_id in image.slab_ids]:
            self.arena.forget(image)

    # ---- views

    def views(self) -> tuple[HostPoolView, ...]:
        """Reserved and shared bytes, which belong to no node, stand with the first."""
        promised_bytes = sum(self.arena.promised_bytes(replica_id) for replica_id in self.arena.reserved)
        return tuple(
            HostPoolView(
                numa_index=node,
                budget_bytes=self.arena.host_budget_bytes // len(self._nodes),
                pinned_bytes=self.arena.space.pinned_bytes(node),
                reserved_bytes=promised_bytes if node == self._nodes[0] else 0,
                used_bytes=self.arena.space.used_bytes(node),
                shared_bytes=self.arena.shared_bytes if node == self._nodes[0] else 0,
            )
            for node in self._nodes
        )

    def sealed(self, images: Sequence[Image]) -> tuple[int, tuple[str, ...], str]:
        """Bytes, names and the tier of images, for an account's view."""
        if not images:
            return 0, (), ""
        tiers = {self.arena.tier_of(image) for image in images}
        names = tuple(sorted(image.image_id for image in images))
        return sum(image.size_bytes for image in images), names, "disk" if "disk" in tiers else "host"


def _number(path: os.PathLike[str]) -> int:
    return int(os.fspath(path).rsplit("-", 1)[-1])

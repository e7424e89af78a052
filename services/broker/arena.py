"""Which images are kept, in which slabs, in host memory or on disk. Pure: the bytes are moved by others.

An image is what a range of one replica held when it was sealed, as a list of slabs. A slab belongs to one tenant, and
is shared by all images of that tenant that have the same bytes in it: never across tenants, because who seals a guess
would learn from the saved copy that somebody has it. A slab is immutable once its image is sealed, so its digest names
it for ever.

What is sealed lies in host memory or on disk. `reserve` promises room before the first park: what is promised and what
is used never exceed both together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from schemas.units import MiB
from services.broker.refusals import Refused
from services.broker.space import GRANULE_BYTES, Extent, Space

SLAB_BYTES_MAX: Final = 256 * MiB
"""5 ms at 53 GB/s: so long a wake waits for a seal. Copies of less lose more between two of them."""

IMAGES_MAX: Final = 16_384
"""Bound of the table."""

ImageKey: TypeAlias = tuple[str, str]
"""(replica_id, image_id)"""


@dataclass(slots=True, kw_only=True)
class Slab:
    slab_id: int
    tenant: str
    size_bytes: int
    extent: Extent | None
    """In host memory; None: on disk only."""
    is_on_disk: bool = False
    digest: str = ""
    """Of its bytes; empty while it is not known."""
    user_count: int = 0
    """Images that use it. None: it is gone as soon as nobody copies it."""
    busy_count: int = 0
    """Copies of it under way: it stays where it is."""
    last_used: int = 0
    """By the arena's own count of uses."""
    replica_id: str = ""
    """Who seals it, until that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    replica_id: str
    image_id: str
    deployment_id: str
    tenant: str
    generation: int
    content_id: str
    size_bytes: int
    slab_ids: tuple[int, ...]

    @property
    def key(self) -> ImageKey:
        return self.replica_id, self.image_id


@dataclass(slots=True, kw_only=True)
class Arena:
    host_budget_bytes: int
    disk_budget_bytes: int
    slab_bytes_max: int = SLAB_BYTES_MAX
    space: Space = field(default_factory=Space)
    images: dict[ImageKey, Image] = field(default_factory=dict)
    slabs: dict[int, Slab] = field(default_factory=dict)
    reserved: dict[str, tuple[str, int]] = field(default_factory=dict)
    """{replica_id: (deployment_id, bytes)}"""
    next_slab_id: int = 1
    use_count: int = 0

    # ---- how full it is

    @property
    def host_used_bytes(self) -> int:
        return sum(slab.extent.size_bytes for slab in self.slabs.values() if slab.extent is not None)

    @property
    def disk_used_bytes(self) -> int:
        return sum(slab.size_bytes for slab in self.slabs.values() if slab.is_on_disk)

    @property
    def room_bytes(self) -> int:
        """What may be sealed and promised: of the disk all but one slab.

        Through that one, what is on disk and what is in host memory can change places when both are full otherwise.
        """
        return self.host_budget_bytes + max(0, self.disk_budget_bytes - self.slab_bytes_max)

    @property
    def sealed_bytes(self) -> int:
        """Each slab once, wherever it is."""
        return sum(_whole(slab.size_bytes) for slab in self.slabs.values())

    @property
    def shared_bytes(self) -> int:
        return sum((slab.user_count - 1) * slab.size_bytes for slab in self.slabs.values() if slab.user_count > 1)

    def promised_bytes(self, replica_id: str) -> int:
        """Of a replica's reservation, what it has not used yet."""
        _, reserved_bytes = self.reserved.get(replica_id, ("", 0))
        slab_ids = {slab_id for image in self.images_of(replica_id) for slab_id in image.slab_ids}
        slab_ids |= {slab.slab_id for slab in self.slabs.values() if slab.replica_id == replica_id}
        used_bytes = sum(_whole(self.slabs[slab_id].size_bytes) for slab_id in slab_ids)
        return max(0, reserved_bytes - used_bytes)

    def short_bytes(self, size_bytes: int, *, replica_id: str) -> int:
        """What there is no room for, of so much more of a replica's, every promise kept, its own included."""
        promised = sum(self.promised_bytes(other) for other in self.reserved if other != replica_id)
        promised += max(0, self.promised_bytes(replica_id) - _whole(size_bytes))
        return max(0, self.sealed_bytes + promised + _whole(size_bytes) - self.room_bytes)

    def images_of(self, replica_id: str) -> list[Image]:
        return [image for image in self.images.values() if image.replica_id == replica_id]

    # ---- promises

    def reserve(self, *, replica_id: str, deployment_id: str, size_bytes: int) -> None:
        """Promise room for a replica's images, in place of what was promised it before. Raises `Refused`."""
        if not size_bytes:
            self.reserved.pop(replica_id, None)
            return
        former = self.reserved.pop(replica_id, None)
        self.reserved[replica_id] = deployment_id, size_bytes
        new_bytes = self.promised_bytes(replica_id)
        short_by_bytes = max(self.short_bytes(new_bytes, replica_id=replica_id), size_bytes - self.host_budget_bytes)
        if short_by_bytes > 0:
            del self.reserved[replica_id]
            if former is not None:
                self.reserved[replica_id] = former
            raise Refused(
                f"host memory for images is full: {self.host_budget_bytes} bytes and {self.disk_budget_bytes} on disk, "
                f"of which {self.sealed_bytes} are used; {size_bytes} for {replica_id} do not fit",
                short_by_bytes=short_by_bytes,
            )

    # ---- sealing

    def known_content(self, *, tenant: str, content_id: str, size_bytes: int) -> Image | None:
        """An image of the tenant that has these very bytes; of several the first by name."""
        found = [
            image
            for image in self.images.values()
            if content_id and (image.tenant, image.content_id, image.size_bytes) == (tenant, content_id, size_bytes)
        ]
        return min(found, key=lambda image: image.key) if found else None

    def new_slabs(
        self, size_bytes: int, *, tenant: str, replica_id: str, numa_order: tuple[int, ...]
    ) -> tuple[Slab, ...]:
        """Busy slabs for an image that is about to be copied; empty when host memory has no room for it *now*."""
        short_by_bytes = self.short_bytes(size_bytes, replica_id=replica_id)
        if short_by_bytes:
            raise Refused(
                f"host memory for images is full, and so is the disk: {replica_id} needs {size_bytes} bytes",
                short_by_bytes=short_by_bytes,
            )
        extents = self.space.take(size_bytes, slab_bytes_max=self.slab_bytes_max, numa_order=numa_order)
        slabs: list[Slab] = []
        left_bytes = size_bytes
        for extent in extents:
            size = min(left_bytes, extent.size_bytes)
            left_bytes -= size
            slab = Slab(
                slab_id=self.next_slab_id,
                tenant=tenant,
                size_bytes=size,
                extent=extent,
                busy_count=1,
                replica_id=replica_id,
            )
            self.next_slab_id += 1
            self.slabs[slab.slab_id] = slab
            slabs.append(slab)
        return tuple(slabs)

    def seal(self, image: Image) -> None:
        """The image's bytes are in its slabs. It takes the place of an older generation of the same name."""
        if len(self.images) >= IMAGES_MAX and image.key not in self.images:
            raise Refused(f"{IMAGES_MAX} images are kept already")
        former = self.images.get(image.key)
        for slab_id in image.slab_ids:
            self.slabs[slab_id].user_count += 1
            self.slabs[slab_id].replica_id = ""
        self.images[image.key] = image
        self.touch(image)
        if former is not None:
            self._unuse(former)

    def touch(self, image: Image) -> None:
        self.use_count += 1
        for slab_id in image.slab_ids:
            self.slabs[slab_id].last_used = self.use_count

    def busy(self, slabs: Iterable[Slab]) -> None:
        for slab in slabs:
            slab.busy_count += 1

    def idle(self, slabs: Iterable[Slab]) -> None:
        """Copies of these are over; those that nobody uses are gone."""
        for slab in slabs:
            slab.busy_count -= 1
            self._drop_if_unused(slab)

    def find(self, *, replica_id: str, image_id: str, generation: int) -> Image:
        image = self.images.get((replica_id, image_id))
        if image is None:
            raise Refused(f"no image {image_id} of {replica_id} is kept")
        if image.generation != generation:
            raise Refused(f"image {image_id} of {replica_id} is of generation {image.generation}, not {generation}")
        return image

    def slabs_of(self, image: Image) -> tuple[Slab, ...]:
        return tuple(self.slabs[slab_id] for slab_id in image.slab_ids)

    # ---- forgetting

    def forget(self, image: Image) -> None:
        if self.images.get(image.key) is image:
            del self.images[image.key]
            self._unuse(image)

    def deployment_ids(self) -> tuple[str, ...]:
        """That have images or a reservation."""
        images = {image.deployment_id for image in self.images.values()}
        return tuple(sorted(images | {deployment_id for deployment_id, _ in self.reserved.values()}))

    def forget_deployment(self, deployment_id: str) -> None:
        """All images of its replicas, and what they were promised."""
        for image in [image for image in self.images.values() if image.deployment_id == deployment_id]:
            self.forget(image)
        self.reserved = {name: kept for name, kept in self.reserved.items() if kept[0] != deployment_id}

    def _unuse(self, image: Image) -> None:
        """What stays because others use it is no longer this replica's, and it was promised room once only."""
        own = {slab_id for other in self.images_of(image.replica_id) for slab_id in other.slab_ids}
        for slab_id in sorted(set(image.slab_ids)):
            slab = self.slabs[slab_id]
            slab.user_count -= image.slab_ids.count(slab_id)
            if slab.user_count and slab_id not in own and image.replica_id in self.reserved:
                deployment_id, reserved_bytes = self.reserved[image.replica_id]
                left_bytes = max(0, reserved_bytes - _whole(slab.size_bytes))
                self.reserved[image.replica_id] = deployment_id, left_bytes
            self._drop_if_unused(slab)

    def _drop_if_unused(self, slab: Slab) -> None:
        if slab.user_count or slab.busy_count or slab.slab_id not in self.slabs:
            return
        if slab.extent is not None:
            self.space.give(slab.extent)
        del self.slabs[slab.slab_id]

    # ---- the same bytes once

    def same_as(self, slab: Slab) -> Slab | None:
        """Another slab with the same bytes of the same tenant; the oldest."""
        if not slab.digest:
            return None
        found = [
            other
            for other in self.slabs.values()
            if other is not slab
            and (other.digest, other.tenant, other.size_bytes) == (slab.digest, slab.tenant, slab.size_bytes)
        ]
        return min(found, key=lambda other: other.slab_id) if found else None

    def merge(self, slab: Slab, kept: Slab) -> None:
        """Every image that used `slab` uses `kept`, which has the same bytes."""
        for image in [image for image in self.images.values() if slab.slab_id in image.slab_ids]:
            slab_ids = tuple(kept.slab_id if slab_id == slab.slab_id else slab_id for slab_id in image.slab_ids)
            moved_count = image.slab_ids.count(slab.slab_id)
            self.images[image.key] = Image(
                replica_id=image.replica_id, image_id=image.image_id, deployment_id=image.deployment_id,
                tenant=image.tenant, generation=image.generation, content_id=image.content_id,
                size_bytes=image.size_bytes, slab_ids=slab_ids,
            )  # fmt: skip
            slab.user_count -= moved_count
            kept.user_count += moved_count
        kept.last_used = max(kept.last_used, slab.last_used)
        self._drop_if_unused(slab)

    # ---- tiers

    def coldest(self, needed_bytes: int) -> tuple[Slab, ...]:
        """Slabs to take out of host memory so that so much becomes free; the longest unused first, ties by age.

        Empty when even all idle ones do not give so much.
        """
        idle = [slab for slab in self.slabs.values() if slab.extent is not None and not slab.busy_count]
        chosen: list[Slab] = []
        for slab in sorted(idle, key=lambda slab: (slab.last_used, slab.slab_id)):
            if needed_bytes <= 0:
                break
            assert slab.extent is not None
            chosen.append(slab)
            needed_bytes -= slab.extent.size_bytes
        return tuple(chosen) if needed_bytes <= 0 else ()

    def left_host(self, slab: Slab) -> None:
        """It is on disk, and its extent is free."""
        assert slab.is_on_disk
        if slab.extent is not None:
            self.space.give(slab.extent)
            slab.extent = None

    def tier_of(self, image: Image) -> str:
        return "host" if all(slab.extent is not None for slab in self.slabs_of(image)) else "disk"


def _whole(size_bytes: int) -> int:
    return -(-size_bytes // GRANULE_BYTES) * GRANULE_BYTES

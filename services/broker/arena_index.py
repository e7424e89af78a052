"""What the arena writes beside its blocks, so that the next broker can adopt them; and whether it may."""

import hashlib
import os
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from services.broker.arena import Arena, Image, Slab
from services.broker.space import Block

VERSION: Final = 1


class IndexContent(Struct, frozen=True, kw_only=True):
    version: int
    boot_id: str
    """Of the kernel that has the pages: after a restart of the host a file may hold anything."""
    blocks: tuple[Block, ...]
    slabs: tuple[Slab, ...]
    images: tuple[Image, ...]
    reserved: dict[str, tuple[str, int]]
    next_slab_id: int


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def write(path: Path, arena: Arena) -> None:
    """In one step: whoever reads it finds the former content or this."""
    used = {slab_id for image in arena.images.values() for slab_id in image.slab_ids}
    content = msgspec.json.encode(
        IndexContent(
            version=VERSION, boot_id=boot_id(), blocks=tuple(arena.space.blocks.values()),
            slabs=tuple(slab for slab in arena.slabs.values() if slab.slab_id in used),
            images=tuple(arena.images.values()), reserved=arena.reserved, next_slab_id=arena.next_slab_id,
        )
    )  # fmt: skip
    new = path.with_suffix(".new")
    new.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    new.replace(path)


def read(path: Path) -> IndexContent | None:
    """What is there, when all of it can be trusted; else None."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return None
        found = msgspec.json.decode(content, type=IndexContent)
    except (OSError, msgspec.DecodeError):
        return None
    return found if found.version == VERSION and found.boot_id == boot_id() else None


def adopt(arena: Arena, found: IndexContent, *, block_size: dict[int, int], disk_size: dict[int, int]) -> None:
    """Enter what a former broker left into an empty arena.

    `block_size` and `disk_size` are the sizes of the files that are there. An image with a slab that is not wholly
    there, or that overlaps another, is left out.
    """
    for block in found.blocks:
        if block_size.get(block.block_id) == block.size_bytes:
            arena.space.add(block)
    for slab in found.slabs:
        is_on_disk = slab.is_on_disk and disk_size.get(slab.slab_id) == slab.size_bytes
        extent = slab.extent if slab.extent is not None and _is_whole(slab) else None
        if extent is not None and not arena.space.take_exactly(extent):
            extent = None
        if extent is not None or is_on_disk:
            arena.slabs[slab.slab_id] = Slab(
                slab_id=slab.slab_id, tenant=slab.tenant, size_bytes=slab.size_bytes, extent=extent,
                is_on_disk=is_on_disk, digest=slab.digest, last_used=slab.last_used,
            )  # fmt: skip
    arena.next_slab_id = found.next_slab_id
    arena.use_count = max((slab.last_used for slab in found.slabs), default=0)
    for image in found.images:
        if all(slab_id in arena.slabs for slab_id in image.slab_ids):
            arena.images[image.key] = image
            for slab_id in image.slab_ids:
                arena.slabs[slab_id].user_count += 1
    for slab in [slab for slab in arena.slabs.values() if not slab.user_count]:
        arena.busy((slab,))
        arena.idle((slab,))
    arena.reserved = dict(found.reserved)


def _is_whole(slab: Slab) -> bool:
    return slab.extent is not None and slab.extent.size_bytes >= slab.size_bytes


def block_path(folder: Path, block_id: int) -> Path:
    return folder / f"block-{block_id:06}"


def make_block(path: Path, *, size_bytes: int) -> int:
    """A new sparse file of that size; its descriptor. Whatever had its name is gone."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

"""The engine's side of the memory broker's messages.

An engine imports no schemas: it restates what it says and hears. `tests/contract` holds both sides to the same bytes;
what each message means stands in `schemas/brokers.py`.
"""

from __future__ import annotations

from msgspec import Struct

# No message carries more descriptors beside it; the kernel's limit is 253.
DESCRIPTORS_MAX = 250
# One question asks for no more ranges.
RANGES_PER_ASK_MAX = 128


class Ask(Struct, frozen=True, kw_only=True, tag_field="ask", tag=lambda name: name):
    """A question; its ``ask`` is the name of the class."""


class EngineHello(Ask, frozen=True):
    """The first line of a connection, with what is still mapped of a former broker's memory."""

    replica_id: str
    lease_epoch: int
    key: str
    held_bytes: dict[str, int] = {}


class MemoryAsk(Ask, frozen=True):
    """So much memory for a range, or for each of several. All or nothing; content undefined, of no other tenant."""

    gpu_uuid: str
    size_bytes: int
    range_id: str
    more_range_ids: tuple[str, ...] = ()


class MemoryReturn(Ask, frozen=True):
    """The range is unmapped. GPU and size are told where a former broker lent it."""

    range_id: str
    gpu_uuid: str = ""
    size_bytes: int = 0
    more_range_ids: tuple[str, ...] = ()


class ImageSeal(Ask, frozen=True):
    """Keep the range's content of now in host memory."""

    range_id: str
    image_id: str
    generation: int
    content_id: str = ""


class ImageRestore(Ask, frozen=True):
    """Memory for a range, filled with an image; two lines answer."""

    gpu_uuid: str
    range_id: str
    image_id: str
    generation: int
    link_class: str = "wake"


class MemoryGrant(Struct, frozen=True, kw_only=True):
    range_id: str
    piece_bytes: tuple[int, ...]
    copied_bytes: int = 0
    reserve_s: float = 0.0
    copy_s: float = 0.0


class ImageSealed(Struct, frozen=True, kw_only=True):
    image_id: str
    generation: int
    copied_bytes: int
    shared_bytes: int
    seal_s: float


class ImageRestored(Struct, frozen=True, kw_only=True):
    range_id: str
    copied_bytes: int
    copy_s: float
    wait_s: float


class BrokerDone(Struct, frozen=True, kw_only=True):
    done: bool = True


class BrokerRefused(Struct, frozen=True, kw_only=True):
    refused: str
    short_by_bytes: int = 0
    again_after_s: float = 0.0

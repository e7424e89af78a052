"""Messages of the memory broker of one host: with engines over one private socket, with the node agent over another.

Both are Unix stream sockets. A message is one line of JSON; file descriptors travel beside the line that names them
(SCM_RIGHTS), in the order in which it names them. One question is answered by one line before the next is asked; an
answer that begins with ``{"refused"`` is a `BrokerRefused`.

An engine opens one connection for each of its GPUs, so that its shards are restored at the same time; each begins with
`EngineHello`. A range belongs to the connection that asked for it. The connection is the lock: when it ends, nobody
else may use its ranges, and nobody asks for more through it. But its memory counts as held until its process is gone
or the account is closed, because a process that lives may still map it. Such a process says hello again, names as held
what it still maps, and gives it back by its size.

A message carries at most 250 descriptors beside it (the kernel's limit is 253). A line that names more is sent in as
many parts as are needed, its descriptors in order, each batch with the first byte of its part.

An image's first `PAGE_BYTES` are copied apart from the rest, in both directions: a software GPU whose large copies move
nothing moves that much, so an engine can know its own content there too.

Engines restate these in ``engines/store``; ``tests/contract`` holds both to the same bytes.
"""

from enum import StrEnum

from msgspec import Struct

from schemas.units import Bytes, Count, Epoch, Identifier, Seconds

DESCRIPTORS_MAX = 250
PAGE_BYTES = 4096
RANGES_PER_ASK_MAX = 128

# --- The node agent's side: who may hold how much ---------------------------------------------------------------------


class BrokerMessage(Struct, frozen=True, kw_only=True, tag_field="ask", tag=lambda name: name):
    """The class's name is its ``ask``."""


class AccountOpen(BrokerMessage, frozen=True):
    """An engine may from now on ask for memory with this key. Again with the same epoch: changes the grant only."""

    replica_id: Identifier
    lease_epoch: Epoch
    tenant: str
    key: str
    """Secret; the engine gets it in its environment."""
    granted_bytes: dict[str, Bytes]
    """{gpu_uuid: the most that it may hold there}. Below what it holds: nothing more until it has given back."""
    deployment_id: str = ""
    """`ImageForget` of it forgets the images of all its replicas. Each replica seals and wakes from its own."""


class AccountClose(BrokerMessage, frozen=True):
    """The engine's process is gone: all its memory is taken back. Its sealed images stay until the deployment ends.

    Answered when the memory is free again, or in the pool. An account that is not open is no error.
    """

    replica_id: Identifier
    lease_epoch: Epoch


class ImageForget(BrokerMessage, frozen=True):
    """No replica of this deployment will come back: what only its images use in host memory is free."""

    deployment_id: Identifier


class HostReserve(BrokerMessage, frozen=True):
    """Keep host memory for the images of one replica, before its first park. Again: changes the amount."""

    replica_id: Identifier
    deployment_id: Identifier
    size_bytes: Bytes
    """0: gives the reservation back."""
    gpu_uuids: tuple[str, ...] = ()
    """Where it runs: the memory nearest to these is preferred."""


class LinkClass(StrEnum):
    """Who goes first on a GPU's link."""

    WAKE = "wake"
    PREFETCH = "prefetch"
    SEAL = "seal"


class Prefetch(BrokerMessage, frozen=True):
    """Bring the images of a parked replica from disk to host memory, while nobody needs the link."""

    replica_id: Identifier


class BrokerLook(BrokerMessage, frozen=True):
    """How things stand; answered with `BrokerView`."""


class AccountView(Struct, frozen=True, kw_only=True):
    replica_id: Identifier
    lease_epoch: Epoch
    is_connected: bool
    granted_bytes: dict[str, Bytes]
    held_bytes: dict[str, Bytes]
    """{gpu_uuid: in its hands now}"""
    is_held_known: bool = True
    """False until the engine has said hello for each of its GPUs since the account was opened: what a former broker
    lent it is not counted yet, so that nothing held proves nothing."""
    sealed_bytes: Bytes
    """Of its images in host memory or on disk, shared ones counted whole."""
    image_ids: tuple[str, ...]
    tier: str
    """``host``, ``disk``, or empty when nothing is sealed."""


class GpuPoolView(Struct, frozen=True, kw_only=True):
    gpu_uuid: str
    pooled_bytes: Bytes
    """Physical memory that the broker keeps ready and nobody uses."""
    lent_bytes: Bytes
    """In the hands of engines, or on the way from there back to the driver."""
    waiting_copies: Count
    link_busy_s: Seconds
    """Since the start."""


class HostPoolView(Struct, frozen=True, kw_only=True):
    """Host memory for images, of one NUMA node."""

    numa_index: int
    budget_bytes: Bytes
    pinned_bytes: Bytes
    """So much is ready; it grows to the budget in the background."""
    reserved_bytes: Bytes
    used_bytes: Bytes
    """Each shared slab once."""
    shared_bytes: Bytes
    """Saved because several images use the same slabs."""


class BrokerView(Struct, frozen=True, kw_only=True):
    broker_id: str = ""
    """Another one than before: the broker was restarted. It knows no accounts then; open them again."""
    pid: int = 0
    accounts: tuple[AccountView, ...]
    gpus: tuple[GpuPoolView, ...]
    host: tuple[HostPoolView, ...]
    disk_budget_bytes: Bytes
    disk_used_bytes: Bytes
    image_deployment_ids: tuple[Identifier, ...] = ()
    """Deployments for which host memory is used or reserved, whether an account is open or not."""


# --- The engine's side ------------------------------------------------------------------------------------------------


class EngineHello(BrokerMessage, frozen=True):
    """The first line of every connection. After a restart of either side the engine says what it still maps."""

    replica_id: Identifier
    lease_epoch: Epoch
    key: str
    held_bytes: dict[str, Bytes] = {}
    """{gpu_uuid: of memory that a former broker lent}. It has no range here; it is given back by its size."""


class MemoryAsk(BrokerMessage, frozen=True):
    """Physical memory for a range of the engine's addresses. All or nothing; content undefined but of no other tenant.

    Answered with `MemoryGrant` and one descriptor per piece; of several ranges, the pieces follow each other in order.
    """

    gpu_uuid: str
    size_bytes: Bytes
    range_id: Identifier
    """The engine's name for the range: unique in the engine."""
    more_range_ids: tuple[Identifier, ...] = ()
    """As many bytes for each of these too, at most `RANGES_PER_ASK_MAX` in all: a cache is had in one line."""


class MemoryGrant(Struct, frozen=True, kw_only=True):
    """Map the pieces in this order, then close the descriptors."""

    range_id: Identifier
    piece_bytes: tuple[Bytes, ...]
    copied_bytes: Bytes = 0
    reserve_s: Seconds = 0.0
    """Getting the physical memory, cleaning included."""
    copy_s: Seconds = 0.0


class MemoryReturn(BrokerMessage, frozen=True):
    """The engine has unmapped the range: its memory may go to somebody else."""

    range_id: Identifier
    gpu_uuid: str = ""
    """With `size_bytes`, of memory that a former broker lent: so much less is held of what the hello said."""
    size_bytes: Bytes = 0
    """0: the range is one that was asked for on this connection."""
    more_range_ids: tuple[Identifier, ...] = ()
    """Of this connection, unmapped as well: a park returns hundreds in one line. All or nothing."""


class ImageSeal(BrokerMessage, frozen=True):
    """Keep the range's content of now in host memory under this name. Answered with `ImageSealed` when it is kept.

    The engine must not change the range meanwhile. Slabs that are there already, of whatever replica of the same
    tenant, are not kept twice.
    """

    range_id: Identifier
    image_id: Identifier
    generation: Count
    """The weights' generation: sealing a newer one replaces the older."""
    content_id: str = ""
    """Names the bytes for ever, such as the digest of a checkpoint's shard: who seals the same again copies nothing."""


class ImageSealed(Struct, frozen=True, kw_only=True):
    image_id: Identifier
    generation: Count
    copied_bytes: Bytes
    shared_bytes: Bytes
    """Of the image, what was there already."""
    seal_s: Seconds


class ImageRestore(BrokerMessage, frozen=True):
    """Memory for a range, filled with an image. Answered with `MemoryGrant` and descriptors; maps may begin at once.

    The content is there when `ImageRestored` follows as a second line.
    """

    gpu_uuid: str
    range_id: Identifier
    image_id: Identifier
    generation: Count
    link_class: LinkClass = LinkClass.WAKE


class ImageRestored(Struct, frozen=True, kw_only=True):
    range_id: Identifier
    copied_bytes: Bytes
    copy_s: Seconds
    """From the first byte on the link to the last."""
    wait_s: Seconds
    """For the link, before the first byte."""


class BrokerDone(Struct, frozen=True, kw_only=True):
    """Nothing else to say."""

    done: bool = True


class BrokerRefused(Struct, frozen=True, kw_only=True):
    """Nothing was done. One sentence, and what is missing where bytes were."""

    refused: str
    short_by_bytes: Bytes = 0
    again_after_s: Seconds = 0.0
    """Ask again then, such as while the agent has not yet opened the account; 0: asking again does not help."""

"""What an operator may choose for a memory broker. Environment: ``SUBLET_BROKER_<FIELD>``."""

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from schemas.units import Bytes, GiB


class Hold(StrEnum):
    """What the broker keeps of a GPU's memory that no engine has."""

    LENT_ONLY = "lent-only"
    """Up to `pooled_bytes_max`: the rest is the driver's, for engines that allocate for themselves."""
    ALL = "all"
    """Everything but `reserve_bytes`, so that an engine finds nothing to allocate behind the broker's back."""


class Pin(StrEnum):
    """How much host memory is pinned ahead."""

    RESERVED = "reserved"
    """What is used and promised, and one block more."""
    BUDGET = "budget"
    """All of the budget, from the start on."""


class BrokerSettings(Struct, frozen=True, kw_only=True):
    """The defaults suit one host; several brokers on one host need different `state_dir`."""

    state_dir: str = ".sublet/broker"
    """Sockets, and the disk tier unless that is elsewhere. Only one broker may have it."""
    engine_socket_path: str = ""
    """Where engines ask; mode 0666, because each shows its key. Empty: `engines.sock` in `state_dir`."""
    control_socket_path: str = ""
    """Where the node agent asks; mode 0600. Empty: `control.sock` in `state_dir`. At most 107 bytes long, as all."""
    gpu_uuids: tuple[str, ...] = ()
    """Empty: all GPUs of this host."""
    hold: Hold = Hold.LENT_ONLY
    pooled_bytes_max: Bytes = 0
    """Of each GPU, kept ready though nobody uses it. Others find that much less free, so that 0 is the honest default;
    a restore that has to make its memory does so while it copies."""
    reserve_bytes: Bytes = 2 * GiB
    """Of each GPU, never taken with `hold` = `all`: for contexts and the driver."""
    piece_bytes_max: Annotated[int, Meta(ge=2 * 1024 * 1024, description="bytes")] = GiB
    """Size of the physical handles that large asks are cut into."""
    arena_dir: str = ""
    """A folder in a tmpfs for the images in host memory. Empty: one in /dev/shm that is named after `state_dir`."""
    host_budget_bytes: Bytes = 0
    """Host memory for images, over all NUMA nodes. 0: half of what is available at the start."""
    block_bytes: Annotated[int, Meta(ge=2 * 1024 * 1024, description="bytes")] = GiB
    """So much is pinned at a time, because a pin holds up what runs on the GPU (vllm-project/vllm#42632)."""
    pin: Pin = Pin.RESERVED
    is_arena_kept: bool = False
    """Leave the images in place at an orderly end, for the next broker. A killed one always leaves them."""
    disk_dir: str = ""
    """Where images go that host memory has no room for. Empty: `images` in `state_dir`."""
    disk_budget_bytes: Bytes = 0
    """0: no disk tier. One slab of it (256 MiB) stays free for images that change places with others."""

    @property
    def engine_socket(self) -> Path:
        return Path(self.engine_socket_path) if self.engine_socket_path else Path(self.state_dir) / "engines.sock"

    @property
    def control_socket(self) -> Path:
        return Path(self.control_socket_path) if self.control_socket_path else Path(self.state_dir) / "control.sock"

    @property
    def arena(self) -> Path:
        name = hashlib.sha256(str(Path(self.state_dir).resolve()).encode()).hexdigest()[:12]
        return Path(self.arena_dir) if self.arena_dir else Path("/dev/shm") / f"sublet-broker-{name}"  # noqa: S108

    @property
    def disk(self) -> Path:
        return Path(self.disk_dir) if self.disk_dir else Path(self.state_dir) / "images"

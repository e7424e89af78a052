"""The hardware port's part for other processes: freezing one and moving its GPU memory. Rules as in `devices.api`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.api import HostBuffer


class CheckpointState(Enum):
    """Where a process stands in the driver's checkpoint protocol."""

    RUNNING = "running"
    LOCKED = "locked"  # its driver calls block
    CHECKPOINTED = "checkpointed"  # no device memory left
    FAILED = "failed"  # the driver gave up; only a restart helps


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSupport:
    """What the driver can do: `has_custom_storage` means the image may go into our own pinned memory (CUDA 13.4.1)."""

    is_supported: bool
    has_custom_storage: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedImage:
    """What `ProcessCheckpoint.save` brought into our own memory: so many bytes of each GPU, from its buffer's start."""

    bytes_by_gpu: Mapping[str, int]
    save_s: float


class ProcessCheckpoint(Protocol):
    """Park and wake unmodified processes through the driver. Order: lock all, checkpoint all, restore all, unlock all.

    `checkpoint` and `restore` leave the memory with the driver, `save` and `load` put it into our own (where
    `support` says that it can be done) and are as fast as the link; a process returns by the way it went.

    Raises `NotFound` for a pid without a context, `InvalidUse` for a step out of order, `OutOfMemory` when a return
    does not fit (the process stays checkpointed).
    """

    def support(self) -> CheckpointSupport: ...

    def state(self, pid: int) -> CheckpointState: ...

    def lock(self, pid: int, *, timeout_s: float) -> None:
        """Make the process's driver calls block. Raises `NotReady` when running work did not end in time."""

    def checkpoint(self, pid: int) -> float:
        """Move the process's device memory to host memory that the driver allocates; the seconds it took."""

    def restore(self, pid: int) -> float:
        """Bring it back to the same GPUs and addresses; the seconds it took. The process stays locked."""

    def save(self, pid: int, buffers: Mapping[str, HostBuffer]) -> SavedImage:
        """Move the process's device memory into these buffers, one for each GPU that it uses.

        The caller has a device open on each of them, and each buffer holds at least what
        `Inventory.process_bytes` says of the process there. Raises `InvalidUse` without such a device, with nothing
        done; and for a missing or too small buffer, after which the process is neither here nor there and can only be
        ended: how large its memory is, is known only once the driver has begun.
        """

    def load(self, pid: int, buffers: Mapping[str, HostBuffer]) -> float:
        """Bring back what `save` put into these buffers; the seconds it took. The process stays locked."""

    def unlock(self, pid: int) -> None:
        """Let the process's driver calls go on."""

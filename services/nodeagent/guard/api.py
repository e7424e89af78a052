"""What every backend of the guard can be asked."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from devices.api import GpuDescription
from schemas.deployments import IsolationGrade


class NotEnforced(Exception):
    """The limit that was read back is not the one that was set, or the engine is not under it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one engine may hold on one GPU from now on."""

    gpu_uuid: str
    namespace: str
    """A cgroup path, or a group that the software driver knows."""
    request_bytes: int
    """Its guarantee."""
    granted_bytes: int
    """All that it may hold: its request while it is resident, more in a burst, its residue while it is parked."""
    brokered_bytes: int = 0
    """Of these, what the memory broker may lend it: charged to the broker and limited there."""
    replica_id: str = ""
    lease_epoch: int = 0

    @property
    def direct_bytes(self) -> int:
        """What it may allocate by itself."""
        return max(0, self.granted_bytes - self.brokered_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a backend works on a GPU, and how that is known."""

    is_proven: bool
    reason: str
    """Of a yes: the proof. Of a no: what is missing. A part of a sentence, for people."""
    context_bytes: int | None = None
    """What it costs to be on this GPU, when a process was there to see."""


class Backend(Protocol):
    """One way to enforce. All calls may block for as long as a driver takes: they run in worker threads or wait."""

    grade: ClassVar[IsolationGrade]

    async def prove(self, gpu: GpuDescription) -> Verdict:
        """Found by trying here and now, never by a version."""

    async def enforce(self, share: Share) -> int:
        """Hold the engine to its grant from now on; the bytes as read back, 0 where nothing can be read back.

        Called again for each new grant; takes nothing back. Raises `NotEnforced`.
        """

    async def verify(self, share: Share) -> None:
        """The engine, which runs now, is under its limit. Raises `NotEnforced`."""

    async def lift(self, share: Share) -> None:
        """No limit any more: its process is gone, its cgroup goes next. Idempotent."""

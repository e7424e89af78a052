"""What watching the GPUs tells the node agent, and how one is tried after it misbehaved."""

from dataclasses import dataclass

from kit.outcomes import Effect, Input
from schemas.nodes import GpuFaultKind, GpuOffer


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMeasured(Input):
    """One look at one GPU. None: the driver did not say; it is never zero."""

    gpu_uuid: str
    used_bytes: int | None = None
    """By everybody, what the driver keeps for itself left out."""
    foreign_bytes: int | None = None
    """By processes that are not ours."""
    utilization_fraction: float | None = None
    temperature_c: int | None = None
    is_too_hot: bool | None = None
    """The driver slows it down because of its temperature."""
    ecc_error_count: int | None = None
    """Errors that could not be corrected, since the driver was loaded."""
    problem: str = ""
    """Not empty: the driver did not answer, and nothing else in here means anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFaultSeen(Input):
    """The driver reported an error, or somebody else found one."""

    gpu_uuid: str
    kind: GpuFaultKind = GpuFaultKind.XID
    code: int = 0
    """NVIDIA's XID number; 0 for the other kinds."""
    message: str = ""
    replica_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuGone(Input):
    """The driver does not list it any more, or says that it is lost."""

    gpu_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBack(Input):
    """A GPU that is not offered is there."""

    gpu: GpuOffer


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineOver(Input):
    """Time to try it again."""

    gpu_uuid: str
    fault_count: int
    """Of the quarantine that is over; a newer one has a timer of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TryGpu(Effect):
    """Take a little memory of it, write, read back, give back, in a process of its own."""

    gpu_uuid: str
    fault_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTried(Input):
    gpu_uuid: str
    fault_count: int
    problem: str = ""
    """Why it is not well; empty: it is."""
    is_conclusive: bool = True
    """False: it could not be tried, for it was full; it is tried again later."""

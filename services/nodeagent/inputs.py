"""The node agent's slow work (effects) and what comes back of it (inputs).

`lease_epoch` makes each harmless to repeat.
"""

from dataclasses import dataclass

from kit.outcomes import Effect, Input
from schemas.deployments import IsolationGrade, SwapDriver
from schemas.nodes import GpuOffer, ParkTier, ResizeReason
from schemas.placement import ReplicaProposal
from services.nodeagent.transitions import Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeNode(Effect):
    """Look at the GPUs, their guard and the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProbed(Input):
    machine_id: str
    gpus: tuple[GpuOffer, ...]
    host_budget_bytes: int
    holder_url: str
    label: str
    cpu_millicores: int | None = None
    memory_bytes: int | None = None
    """What replicas may ask of the host, the budget for parked weights left out; None: it cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEffect(Effect):
    """Work on one replica's engine."""

    replica: ReplicaProposal
    lease_epoch: int
    wake_epoch: int
    swap_driver: SwapDriver | None = None
    """How it is parked and woken, or will be. None: as engines were before drivers had names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEngine(EngineEffect):
    """Start it gated, set and read back its limit, open the gate, wait until ready, verify, open its route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkEngine(EngineEffect):
    """Close its route, wait until it has nothing in flight, park it, prove its bytes free."""

    drain_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeEngine(EngineEffect):
    """Raise its limit, restore, verify one token, open its route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEngine(EngineEffect):
    """Close its route, drain, stop the process, clear its limit, prove its bytes free."""

    drain_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptEngine(EngineEffect):
    """After the agent's own restart: is the engine still there, and as it should be?"""

    should_be_parked: bool
    granted_bytes: tuple[int, ...] = ()
    """By shard, what it may use while it is resident; empty: its request."""
    resize_epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeEngine(EngineEffect):
    """Let it live in another grant, while it serves.

    To grow, its limit is raised, then its budget. To shrink, its budget is lowered, its use proven, then its limit
    lowered. To freeze, its limit becomes what it uses, but no less than `granted_bytes`. A newer resize of the same
    replica ends an older one.
    """

    reason: ResizeReason
    granted_bytes: tuple[int, ...]
    """By shard."""
    before_bytes: tuple[int, ...]
    """By shard, what it was granted when this was decided; to grow: before that."""
    resize_epoch: int
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictEngine(EngineEffect):
    """End its process at once, because it has not given back what it owes; told as `EngineLost`."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAtEngine(EngineEffect):
    """Close the route of a suspect, and find out what it is: to be adopted, gone, or still in doubt."""

    was: Residency
    """Where it was before: what may be found in its place."""
    granted_bytes: tuple[int, ...]
    """What it may use while it is resident, by shard."""
    neighbours: tuple[ReplicaProposal, ...]
    """Who serves or is parked on its GPUs."""
    may_end: bool
    """It has had its time: end it unless it can be adopted, and see to it that its neighbours are well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveGrace(Effect):
    """Wait by the host's steady clock, then tell that the step hangs; nobody needs to hear it when it has ended."""

    replica_id: str
    lease_epoch: int
    deadline_s: float
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInput(Input):
    """About one replica's engine; ignored when the lease has moved on."""

    replica_id: str
    lease_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStarted(EngineInput):
    endpoint: str
    start_s: float
    enforced_bytes: int
    swap_driver: SwapDriver | None = None
    grade: IsolationGrade | None = None
    """How its share is enforced; the weakest of its GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParked(EngineInput):
    residues: tuple[int, ...]
    """Bytes that each shard keeps on its GPU, by shard."""
    host_bytes: int
    copied_bytes: int
    park_s: float
    drain_s: float
    reason: str
    swap_driver: SwapDriver | None = None
    tier: ParkTier = ParkTier.HOST
    """`NOWHERE`: its process is gone, and its wake is a cold start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStayed(EngineInput):
    """A park that did not happen; the replica serves on."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWoken(EngineInput):
    endpoint: str
    copied_bytes: int
    restore_s: float
    verify_s: float
    swap_driver: SwapDriver | None = None
    map_s: float = 0.0
    copy_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNotWoken(EngineInput):
    """A restore that was rolled back; the replica is parked as before."""

    reason: str
    short_by_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStopped(EngineInput):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLost(EngineInput):
    """The process ended, would not start, or does not answer; its bytes are proven free."""

    reason: str
    shaken_ids: tuple[str, ...] = ()
    """Replicas beside it that were not well after it had been ended by force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDoubtful(EngineInput):
    """It runs, and is not as its lease says; nothing was done to it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFound(EngineInput):
    """A suspect that is well: it gave a token and its route is open, or it is parked and its bytes are proven free."""

    endpoint: str
    is_parked: bool
    residues: tuple[int, ...] = ()
    """Where it is parked: bytes that each shard keeps on its GPU, by shard."""
    enforced_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUnexplained(EngineInput):
    """A suspect that is neither well nor gone."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LookDue(EngineInput):
    """Time to look at a suspect again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOverdue(EngineInput):
    """A step's time is over; it no longer matters when the replica is in another."""

    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHung(EngineInput):
    """And its grace too."""

    deadline_s: float


def hung(grace: GiveGrace) -> StepHung:
    """What follows on this grace."""
    return StepHung(replica_id=grace.replica_id, lease_epoch=grace.lease_epoch, deadline_s=grace.deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResized(EngineInput):
    """It lives in the grant that was asked for; to freeze: in that of `granted_bytes`."""

    reason: ResizeReason
    granted_bytes: tuple[int, ...]
    """By shard, proven."""
    resize_epoch: int
    resize_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNotResized(EngineInput):
    """It did not come to where it should in its time, or could not."""

    reason: ResizeReason
    granted_bytes: tuple[int, ...]
    """By shard, what it is proven to live in."""
    resize_epoch: int
    resize_s: float
    problem: str
    is_able: bool = True
    """False: it has nothing that takes another grant, and needs not be asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBackDue(EngineInput):
    """A step of the ladder has had its time."""

    resize_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMeasured(EngineInput):
    """How full its cache is, and who waits there; of engines that may have more than their request."""

    kv_used_fraction: float
    waiting_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstDue(Input):
    """Time to share out what no lease claims."""

    is_first: bool = False
    """Of this life of the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartDue(EngineInput):
    """Time to try a failed start again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AliveDue(Input):
    """Time to say again that this agent is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GangHoldOver(Input):
    """Leases that are held for this gang have been held long enough."""

    gang_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OveruseSeen(Input):
    """The watchdog measured a replica beyond what it is granted on a GPU; told once for as long as it lasts."""

    gpu_uuid: str
    replica_id: str
    used_bytes: int
    granted_bytes: int
    is_stopped: bool
    """Its grace was over on a GPU that is only watched: its engine is being stopped, and its end follows by itself."""

"""What the node agent knows: its GPUs, its leases, and where each replica is in the residency machine."""

from dataclasses import dataclass, field, replace

from msgspec import structs

from schemas.abilities import ABILITIES, NoSwapDriver, image_bytes, swap_driver_for
from schemas.deployments import IsolationGrade, SwapDriver
from schemas.nodes import (
    GaveBack,
    GiveBackAsked,
    GiveBackStep,
    GpuOffer,
    LeaseGranted,
    LeaseReleased,
    LeaseResized,
    NodeJoined,
    ParkAbandoned,
    ParkTier,
    ReplicaDraining,
    ReplicaFact,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaSuspect,
    ReplicaWaking,
    ResizeReason,
    WakeRefused,
)
from schemas.placement import GangCommitted, ReplicaProposal, ShareProposal
from services.nodeagent.accounts import Account
from services.nodeagent.demand import Demand
from services.nodeagent.grades import is_brokered
from services.nodeagent.growth import Growth, is_elastic
from services.nodeagent.quarantines import GpuHealth, Watched, start_failed, start_succeeded
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.transitions import STATES, Cause, Holding, Residency, target_of


@dataclass(frozen=True, slots=True, kw_only=True)
class GivingBack:
    """Where a borrower is on the ladder."""

    step: GiveBackStep
    for_replica_id: str
    asked_bytes: int
    asked_at_s: float
    step_at_s: float
    is_owed: bool
    """False: other borrowers want their part, and nothing harsher than a wish follows."""


@dataclass(slots=True)
class Replica:
    """One lease and its engine."""

    proposal: ReplicaProposal
    lease_epoch: int
    """Raised whenever the engine is given up; results that name an older one are ignored."""
    residency: Residency
    since_s: float
    share_bytes: dict[str, int]
    """{gpu_uuid: what its shard there is granted now, and holds while it is resident}, in the order of its shards.

    More than its request only while it is resident, draining, or being released."""
    residue_bytes: dict[str, int]
    """{gpu_uuid: what its shard there keeps while it is parked}; expected at first, measured from the first park on."""
    held_for: str = ""
    """The gang for which its lease is held: it does not start before that gang is committed."""
    hold_ends_s: float = 0.0
    """When a held lease ends by itself."""
    swap_driver: SwapDriver | None = None
    """How it is parked and woken: chosen at the grant and again for each start, fixed while its engine lives."""
    wake_epoch: int = 1
    """Raised at each park."""
    endpoint: str = ""
    is_started: bool = False
    """Its engine is a process that can be parked and woken; a wake of one that is not started is a cold start."""
    grade: IsolationGrade | None = None
    """How its share is enforced since its engine was started; None: as its GPUs and its engine promise."""
    attempt_count: int = 0
    """Failed starts in a row."""
    victim_ids: tuple[str, ...] = ()
    """While waiting: whose bytes it waits for."""
    kept_bytes: dict[str, int] = field(default_factory=dict)
    """While it is released or suspect: {gpu_uuid: what it held there when that began}, and holds until it has ended."""
    deadline_s: float = 0.0
    """When its step is overdue; 0 where it is in none."""
    suspect_from: Residency | None = None
    """While it is suspect: where it was."""
    look_count: int = 0
    """While it is suspect: how many looks at it could not tell."""
    ordered_at_s: float = 0.0
    reserved_at_s: float = 0.0
    giving_back: GivingBack | None = None
    """While it must give bytes back; only while it is resident or draining for that."""
    growth: Growth = field(default_factory=Growth)
    """What its engine has made of larger grants since its start."""
    is_due_back: bool = False
    """It was checkpointed although it is never to be away: it returns as soon as its request has room."""
    gave_back_at_s: float = 0.0
    """When its grant last became smaller."""
    resize_epoch: int = 0
    """Raised whenever its size is settled anew; results of older resizes are ignored."""

    @property
    def request_bytes(self) -> dict[str, int]:
        """By GPU: what its shard there is guaranteed while it is resident."""
        return {share.gpu_uuid: share.request_bytes for share in self.proposal.shares}

    @property
    def borrowed_bytes(self) -> dict[str, int]:
        """By GPU: what it is granted there beyond its request."""
        return {
            share.gpu_uuid: self.share_bytes[share.gpu_uuid] - share.request_bytes for share in self.proposal.shares
        }

    @property
    def granted_bytes(self) -> tuple[int, ...]:
        """By shard."""
        return tuple(self.share_bytes.values())

    @property
    def step(self) -> tuple[Residency, int, int]:
        """Names the effect that is on its way for it."""
        return self.residency, self.lease_epoch, self.wake_epoch

    @property
    def parks_by(self) -> SwapDriver | None:
        """How what is on its way parks or wakes it; the ladder's checkpoint is always the driver's."""
        is_frozen = self.giving_back is not None and self.giving_back.step is GiveBackStep.CHECKPOINT
        return SwapDriver.CHECKPOINT if is_frozen and self.residency is Residency.DRAINING else self.swap_driver

    @property
    def has_process(self) -> bool:
        return STATES[self.residency].holds in (Holding.SHARE, Holding.KEPT) or self.is_started

    def held_on(self, gpu_uuid: str) -> int:
        """What its lease holds on this GPU now."""
        match STATES[self.residency].holds:
            case Holding.SHARE:
                return self.share_bytes.get(gpu_uuid, 0)
            case Holding.KEPT:
                return self.kept_bytes.get(gpu_uuid, 0)
            case Holding.RESIDUE if self.is_started:
                return self.residue_bytes.get(gpu_uuid, 0)
            case _:
                return 0

    @property
    def held_bytes(self) -> dict[str, int]:
        """By GPU: what its lease holds there now."""
        return {gpu_uuid: self.held_on(gpu_uuid) for gpu_uuid in self.share_bytes}

    @property
    def wanted_bytes(self) -> dict[str, int]:
        """By GPU: what it must get there beyond what it holds, to be resident."""
        return {gpu_uuid: size - self.held_on(gpu_uuid) for gpu_uuid, size in self.request_bytes.items()}

    @property
    def yielding_bytes(self) -> dict[str, int]:
        """By GPU: what its park gives there."""
        return {gpu_uuid: size - self.residue_bytes[gpu_uuid] for gpu_uuid, size in self.share_bytes.items()}

    @property
    def guaranteed_yield_bytes(self) -> dict[str, int]:
        """By GPU: what its park gives there of its request alone."""
        return {gpu_uuid: size - self.residue_bytes[gpu_uuid] for gpu_uuid, size in self.request_bytes.items()}

    def settle_at_request(self) -> None:
        """What it borrowed has ended."""
        self.share_bytes = self.request_bytes
        self.giving_back = None
        self.resize_epoch += 1


@dataclass(slots=True)
class Observed:
    """Not history: lost at a restart."""

    left: dict[str, tuple[Residency, int, int]] = field(default_factory=dict)
    """{replica_id: (residency, lease epoch, wake epoch)} as an earlier life of this agent left it."""
    gpus: dict[str, Watched] = field(default_factory=dict)
    """{gpu_uuid: what is seen of it}"""
    demands: dict[str, Demand] = field(default_factory=dict)
    """{replica_id: what its engine told last}; of those that may have more than their request."""


AWAY = frozenset({Residency.DRAINING, Residency.PARKED, Residency.WAITING, Residency.WAKING})
"""Where even one that is not parkable has an image, or is about to: it had to give back and was checkpointed."""


@dataclass(slots=True)
class NodeState:
    """The fold of this node's facts."""

    settings: NodeAgentSettings
    gpus: dict[str, GpuOffer] = field(default_factory=dict)
    """{gpu_uuid: offer}"""
    host_budget_bytes: int = 0
    machine_id: str = ""
    joined: NodeJoined | None = None
    """What was told of the node last, without its GPUs."""
    health: dict[str, GpuHealth] = field(default_factory=dict)
    """{gpu_uuid: what is remembered of one that misbehaved}"""
    replicas: dict[str, Replica] = field(default_factory=dict)
    """{replica_id: replica}, in the order of their grants."""
    accounts: dict[str, Account] = field(default_factory=dict)
    """{gpu_uuid: who lent and borrowed since that was told last}; of GPUs on which somebody has borrowed."""
    observed: Observed = field(default_factory=Observed)

    def held_bytes(self, gpu_uuid: str) -> int:
        """Sum over all leases on the GPU; never above what it offers."""
        return sum(replica.held_on(gpu_uuid) for replica in self.replicas.values())

    def host_bytes(self) -> int:
        """Host memory that the sealed weights of all parkable replicas take, and the images of others that are away."""
        return sum(
            parked_host_bytes(self, replica.proposal, replica.parks_by)
            for replica in self.replicas.values()
            if replica.proposal.deployment.swap.is_parkable or replica.residency in AWAY
        )


def new_state(settings: NodeAgentSettings) -> NodeState:
    return NodeState(settings=settings)


def swap_driver_of(state: NodeState, proposal: ReplicaProposal) -> SwapDriver | None:
    """How it would be parked on its GPUs as they are offered now; None where its wish cannot be met."""
    offered = [state.gpus[share.gpu_uuid].swap_drivers for share in proposal.shares if share.gpu_uuid in state.gpus]
    chosen = swap_driver_for(proposal.deployment.engine, tuple(offered))
    return None if isinstance(chosen, NoSwapDriver) else chosen


def parked_host_bytes(state: NodeState, proposal: ReplicaProposal, driver: SwapDriver | None) -> int:
    """Host memory that it takes while it is parked."""
    shares = proposal.shares
    return image_bytes(
        driver or SwapDriver.HTTP_SLEEP,
        proposal.deployment.engine,
        share_bytes=sum(share.request_bytes for share in shares),
        residue_bytes=sum(expected_residue(share, state.settings) for share in shares),
    )


def fold_joined(state: NodeState, fact: NodeJoined) -> None:
    state.gpus = {gpu.gpu_uuid: gpu for gpu in fact.gpus}
    for replica in state.replicas.values():
        if not replica.has_process:
            replica.swap_driver = swap_driver_of(state, replica.proposal)
    state.host_budget_bytes = fact.host_budget_bytes
    state.machine_id = fact.machine_id
    state.joined = structs.replace(fact, gpus=())


def expected_residue(share: ShareProposal, settings: NodeAgentSettings) -> int:
    """What this shard is expected to keep on its GPU while parked, until the first park measures it."""
    return min(settings.residue_bytes, share.request_bytes)


def fold_granted(state: NodeState, fact: LeaseGranted) -> None:
    for proposal in fact.replicas:
        leases = [lease for lease in fact.leases if lease.replica_id == proposal.replica_id]
        assert proposal.replica_id not in state.replicas, f"{proposal.replica_id} is granted twice"
        residency = target_of(None, Cause.LEASE_GRANTED)
        assert residency is not None
        state.replicas[proposal.replica_id] = Replica(
            proposal=proposal,
            lease_epoch=leases[0].lease_epoch,
            residency=residency,
            since_s=fact.at_s,
            share_bytes={lease.gpu_uuid: lease.granted_bytes for lease in leases},
            residue_bytes={lease.gpu_uuid: lease.residue_bytes for lease in leases},
            held_for=fact.gang_id,
            hold_ends_s=fact.at_s + fact.gang_hold_s,
            swap_driver=swap_driver_of(state, proposal),
        )


def fold_committed(state: NodeState, fact: GangCommitted) -> None:
    """Its replicas here may start from now on."""
    for replica in state.replicas.values() if fact.node == state.settings.node else ():
        if replica.held_for == fact.gang_id:
            replica.held_for = ""


def fold_released(state: NodeState, fact: LeaseReleased) -> None:
    replica = state.replicas.pop(fact.replica_id, None)
    if replica is not None:  # One that is not here is only told again: of a gang that was committed too late.
        target_of(replica.residency, Cause.RELEASED)


def _move(state: NodeState, fact: ReplicaFact, cause: Cause) -> Replica:
    """The replica, where this fact brings it."""
    return _moved(state, fact.replica_id, cause, at_s=fact.at_s, ends_within_s=fact.ends_within_s)


def _moved(state: NodeState, replica_id: str, cause: Cause, *, at_s: float, ends_within_s: float = 0.0) -> Replica:
    replica = state.replicas.get(replica_id)
    assert replica is not None, f"{cause} for {replica_id}, which has no lease"
    target = target_of(replica.residency, cause)
    assert target is not None
    if STATES[target].holds is Holding.KEPT:
        replica.kept_bytes = replica.held_bytes
    if target is Residency.SUSPECT and replica.residency is not Residency.SUSPECT:
        replica.suspect_from, replica.look_count = replica.residency, 0
    if target is not Residency.SUSPECT:
        replica.suspect_from = None
    if target is not Residency.WAITING:
        replica.victim_ids = ()
    replica.residency = target
    replica.since_s = at_s
    replica.deadline_s = at_s + ends_within_s if STATES[target].deadline_settings else 0.0
    return replica


def fold_starting(state: NodeState, fact: ReplicaStarting) -> None:
    _move(state, fact, Cause.START_BEGUN).growth = Growth()


def fold_ready(state: NodeState, fact: ReplicaReady) -> None:
    for ready in fact.replicas:
        replica = _moved(state, ready.replica_id, Cause.READY, at_s=fact.at_s)
        replica.endpoint = ready.endpoint
        replica.is_started = True
        replica.attempt_count = 0
        replica.swap_driver = ready.swap_driver
        replica.grade = ready.grade
        start_succeeded(state, replica)


def fold_draining(state: NodeState, fact: ReplicaDraining) -> None:
    replica = _move(state, fact, Cause.RELEASE_BEGUN if fact.is_release else Cause.PARK_BEGUN)
    replica.resize_epoch += 1
    is_parking = replica.giving_back is not None and replica.giving_back.step in PARKS
    replica.giving_back = replica.giving_back if is_parking and not fact.is_release else None


def fold_abandoned(state: NodeState, fact: ParkAbandoned) -> None:
    _move(state, fact, Cause.PARK_ABANDONED)


def fold_parked(state: NodeState, fact: ReplicaParked) -> None:
    is_nowhere = fact.tier is ParkTier.NOWHERE
    replica = _move(state, fact, Cause.PARKED_NOWHERE if is_nowhere else Cause.PARKED)
    replica.wake_epoch = fact.wake_epoch
    replica.settle_at_request()
    replica.swap_driver = fact.swap_driver
    if is_nowhere:  # Its next wake is a cold start, as if it had never run.
        replica.is_started = False
        replica.lease_epoch += 1
        replica.endpoint = ""
        replica.swap_driver = swap_driver_of(state, replica.proposal)
    replica.residue_bytes = dict(zip(replica.share_bytes, fact.residues(len(replica.share_bytes)), strict=True))


def fold_waking(state: NodeState, fact: ReplicaWaking) -> None:
    replica = _move(state, fact, Cause.WAKE_BEGUN if fact.is_reserved else Cause.WAKE_ACCEPTED)
    if fact.is_reserved:
        replica.reserved_at_s = fact.at_s
    else:
        replica.ordered_at_s = fact.at_s
        replica.victim_ids = fact.victim_ids


def fold_resident(state: NodeState, fact: ReplicaResident) -> None:
    replica = _move(state, fact, Cause.RESIDENT)
    replica.endpoint = fact.endpoint
    replica.is_due_back = False


def fold_wake_refused(state: NodeState, fact: WakeRefused) -> None:
    replica = state.replicas.get(fact.replica_id)
    is_started = replica is not None and replica.is_started
    _move(state, fact, Cause.WAKE_REFUSED if is_started else Cause.START_REFUSED)


def fold_suspect(state: NodeState, fact: ReplicaSuspect) -> None:
    """A step of a give-back that it was in has ended with it; what it borrowed it keeps with all else."""
    replica = _move(state, fact, Cause.SUSPECTED)
    replica.look_count = fact.look_count
    is_frozen = replica.giving_back is not None and replica.giving_back.step is GiveBackStep.CHECKPOINT
    replica.is_due_back |= is_frozen and not replica.proposal.deployment.swap.is_parkable
    replica.giving_back = None
    replica.resize_epoch += 1


def fold_failed(state: NodeState, fact: ReplicaFailed) -> None:
    failed = state.replicas.get(fact.replica_id)
    if failed is not None and Residency.STARTING in (failed.residency, failed.suspect_from):
        start_failed(state, failed, fact.at_s)
    replica = _move(state, fact, Cause.GIVEN_UP if fact.is_final else Cause.FAILED)
    replica.lease_epoch += 1
    replica.wake_epoch = fact.wake_epoch
    replica.attempt_count = fact.attempt_count
    replica.is_started = replica.is_due_back = False
    replica.endpoint = ""
    replica.settle_at_request()
    replica.swap_driver = swap_driver_of(state, replica.proposal)


LADDER = tuple(GiveBackStep)
PARKS = (GiveBackStep.PARK, GiveBackStep.CHECKPOINT)
"""Steps that it is draining for."""


def next_step(state: NodeState, replica: Replica, step: GiveBackStep) -> GiveBackStep:
    """What follows on the ladder, least harm first; a step that this replica cannot take is left out.

    One that drains and has no end can only be stopped: what was begun for it may still happen.
    """
    if replica.residency is Residency.DRAINING:
        return GiveBackStep.STOP
    spec = replica.proposal.deployment
    is_asleep_by_itself = spec.swap.is_parkable and replica.swap_driver is not SwapDriver.CHECKPOINT
    takes = {
        GiveBackStep.SHRINK: is_elastic(spec) and replica.growth.is_able,
        GiveBackStep.PARK: is_asleep_by_itself,
        GiveBackStep.CHECKPOINT: can_checkpoint(state, replica),
        GiveBackStep.STOP: True,
    }
    return next(each for each in LADDER[LADDER.index(step) + 1 :] or LADDER[-1:] if takes[each])


def can_checkpoint(state: NodeState, replica: Replica) -> bool:
    """Whether this node's driver can take its process as it is, without the engine, and host memory has room for that.

    Not where the memory broker holds a part of its memory: that is not the process's own.
    """
    engine = replica.proposal.deployment.engine
    gpus = [state.gpus.get(gpu_uuid) for gpu_uuid in replica.share_bytes]
    is_offered = all(gpu is not None and SwapDriver.CHECKPOINT in gpu.swap_drivers for gpu in gpus)
    if not is_offered or SwapDriver.CHECKPOINT not in ABILITIES[engine.kind].swap_drivers:
        return False
    is_broker_there = any(gpu is not None and SwapDriver.STORE in gpu.swap_drivers for gpu in gpus)
    if replica.swap_driver is SwapDriver.STORE or (is_broker_there and is_brokered(engine)):
        return False
    image = parked_host_bytes(state, replica.proposal, SwapDriver.CHECKPOINT)
    is_counted = replica.proposal.deployment.swap.is_parkable or replica.residency in AWAY
    counted = parked_host_bytes(state, replica.proposal, replica.parks_by) if is_counted else 0
    return state.host_bytes() - counted + image <= state.host_budget_bytes


def fold_resized(state: NodeState, fact: LeaseResized) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is None:
        return
    replica.share_bytes = dict(zip(replica.share_bytes, fact.granted_bytes, strict=True))
    if fact.reason is ResizeReason.BURST:
        replica.resize_epoch += 1
        replica.growth = replica.growth.begun()
    else:
        replica.gave_back_at_s = fact.at_s
    if fact.problem:
        replica.growth = replica.growth.failed(is_able=fact.is_able)


def fold_asked(state: NodeState, fact: GiveBackAsked) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is not None:
        replica.resize_epoch += 1
        replica.giving_back = GivingBack(
            step=GiveBackStep.FREEZE if fact.is_owed else GiveBackStep.SHRINK,
            for_replica_id=fact.for_replica_id,
            asked_bytes=fact.asked_bytes,
            asked_at_s=fact.at_s,
            step_at_s=fact.at_s,
            is_owed=fact.is_owed,
        )


def fold_gave_back(state: NodeState, fact: GaveBack) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is None or replica.giving_back is None:
        return
    replica.resize_epoch += 1
    replica.gave_back_at_s = fact.at_s
    if fact.is_enough and fact.step is GiveBackStep.CHECKPOINT:
        replica.is_due_back = not replica.proposal.deployment.swap.is_parkable
    if fact.is_enough or not replica.giving_back.is_owed:
        replica.giving_back = None
    else:
        step = next_step(state, replica, fact.step)
        replica.giving_back = replace(replica.giving_back, step=step, step_at_s=fact.at_s)

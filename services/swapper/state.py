"""What the swapper knows: GPUs, leases, who is resident, and the decisions that no fact has answered yet."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from schemas.deployments import DeploymentSpec, WorkloadKind
from schemas.gateways import ModelLoad, ModelWanted
from schemas.nodes import (
    GpuObserved,
    LeaseGranted,
    LeaseReleased,
    NodeJoined,
    ParkAbandoned,
    ReplicaDraining,
    ReplicaFailed,
    ReplicaParked,
    ReplicaReady,
    ReplicaResident,
    ReplicaStarting,
    ReplicaSuspect,
    ReplicaWaking,
    WakeRefused,
)
from schemas.placement import GangCommitted, ParkAsked, WakeAsked
from schemas.swapper import DecisionClosed, ParkDecided, WakeDecided
from services.swapper.policies import POLICIES
from services.swapper.policies.port import Policy
from services.swapper.settings import SwapperSettings


class Tier(StrEnum):
    """Where a replica is, as its node's facts say."""

    GRANTED = "granted"
    STARTING = "starting"
    RESIDENT = "resident"
    DRAINING = "draining"
    PARKED = "parked"
    WAITING = "waiting"
    WAKING = "waking"
    SUSPECT = "suspect"
    FAILED = "failed"


RESTORE_FIXED_S = 0.25
"""Of a return that was never measured: what it takes besides the copy."""
LINK_BYTES_PER_S_UNKNOWN = 25e9
"""Of a GPU whose node names no rate: a link of PCIe 4."""
HOLDING_SHARE = frozenset({Tier.STARTING, Tier.RESIDENT, Tier.DRAINING, Tier.WAKING})


@dataclass(slots=True)
class Replica:
    replica_id: str
    deployment_id: str
    spec: DeploymentSpec
    node: str
    share_bytes: dict[str, int]
    """{gpu_uuid: what its shard there holds while it is resident}, in the order of its shards."""
    residue_bytes: dict[str, int]
    """{gpu_uuid: what its shard there keeps while it is parked}"""
    tier: Tier
    since_s: float
    wake_epoch: int = 1
    is_started: bool = False
    """Its engine is a process, so that its residue is on the device while it is parked."""
    is_asked_awake: bool = False
    """An operator asked for it; holds until it is resident."""
    is_asked_parked: bool = False
    """An operator asked for it; holds until its next wake begins: training does not return from it by itself."""
    keeps_share: bool = False
    """While it is suspect: whether it holds its share, not its residue."""
    refused_at_s: float = 0.0
    not_before_s: float = 0.0
    """Its node tries a failed start again by itself then; asking sooner would spend its attempts at once."""
    restore_s: float | None = None
    """What its newest return took, once its bytes were free. None: it has not returned yet."""
    held_for: str = ""
    """The gang for which its lease is held: nobody may wake it before that gang is committed."""

    def held_on(self, gpu_uuid: str) -> int:
        """What it holds of this GPU now."""
        if self.tier in HOLDING_SHARE or (self.tier is Tier.SUSPECT and self.keeps_share):
            return self.share_bytes.get(gpu_uuid, 0)
        return self.residue_bytes.get(gpu_uuid, 0) if self.is_started else 0

    @property
    def wanted_bytes(self) -> dict[str, int]:
        """By GPU: what it must get there beyond what it holds, to be resident."""
        return {gpu_uuid: size - self.held_on(gpu_uuid) for gpu_uuid, size in self.share_bytes.items()}

    @property
    def freed_bytes(self) -> dict[str, int]:
        """By GPU: what parking it gives there."""
        return {gpu_uuid: max(0, size - self.residue_bytes[gpu_uuid]) for gpu_uuid, size in self.share_bytes.items()}

    @property
    def is_training(self) -> bool:
        return self.spec.kind is WorkloadKind.TRAINING


@dataclass(slots=True)
class Decision:
    """A wake or park that was decided and that no fact of the node has answered."""

    replica_id: str
    wake_epoch: int
    decided_at_s: float
    is_wake: bool
    victim_ids: tuple[str, ...]
    reason: str


@dataclass(slots=True)
class Wanted:
    """What gateways said about one replica, newest signal."""

    heard_at_s: float
    since_s: float
    """When its oldest waiting request arrived."""
    waiting_count: int
    wake_epoch: int
    traceparent: str = ""


@dataclass(slots=True)
class GatewayLoad:
    heard_at_s: float
    models: dict[str, ModelLoad]


@dataclass(slots=True)
class Observed:
    """Not history: lost at a restart, and then unknown, never zero."""

    policy: Policy
    """What it has learnt of uses. Keys are deployment ids."""
    wanted: dict[str, Wanted] = field(default_factory=dict)
    """{replica_id: newest wish}"""
    gateways: dict[str, GatewayLoad] = field(default_factory=dict)
    last_used_s: dict[str, float] = field(default_factory=dict)
    """{deployment_id: when a request for it was last in flight or waiting}"""
    working: set[str] = field(default_factory=set)
    """Deployments with a request in flight or waiting, as gateways last said."""


@dataclass(slots=True)
class FleetState:
    """The fold of placement's and the node agents' facts, as far as the swapper needs them."""

    settings: SwapperSettings
    observed: Observed
    offered_bytes: dict[str, int] = field(default_factory=dict)
    """{gpu_uuid: allocatable bytes}"""
    foreign_bytes: dict[str, int] = field(default_factory=dict)
    """{gpu_uuid: what strangers took off it in `offered_bytes`}"""
    replicas: dict[str, Replica] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    """{replica_id: open decision}"""
    replica_ids: dict[str, list[str]] = field(default_factory=dict)
    """{gpu_uuid: the replicas that have a lease there}"""
    room_since_s: dict[str, float] = field(default_factory=dict)
    """{gpu_uuid: when its leases last changed}"""
    link_bytes_per_s: dict[str, float] = field(default_factory=dict)
    """{gpu_uuid: how fast weights come from host memory}"""

    def on_gpu(self, gpu_uuid: str) -> list[Replica]:
        """In the order of their grants."""
        return [self.replicas[replica_id] for replica_id in self.replica_ids.get(gpu_uuid, ())]

    def restore_s(self, replica: Replica) -> float:
        """What bringing it back takes: as its newest return did, else its bytes over the links of its GPUs."""
        if replica.restore_s is not None:
            return replica.restore_s
        links_bytes_per_s = (self.link_bytes_per_s.get(uuid, 0.0) for uuid in replica.share_bytes)
        rate = min((rate for rate in links_bytes_per_s if rate > 0), default=LINK_BYTES_PER_S_UNKNOWN)
        shard_bytes = replica.spec.engine.weights_bytes / max(1, len(replica.share_bytes))
        return RESTORE_FIXED_S + shard_bytes / rate

    def groups(self, gpu_uuids: Iterable[str]) -> list[tuple[str, ...]]:
        """All GPUs that are to be decided on together with these: linked by replicas that span several, each once.

        A decision is about one group at a time; where every replica lives on one GPU, a group is one GPU.
        """
        groups: list[tuple[str, ...]] = []
        seen: set[str] = set()
        for gpu_uuid in gpu_uuids:
            if gpu_uuid in seen:
                continue
            group, fresh = {gpu_uuid}, [gpu_uuid]
            while fresh:
                for replica in self.on_gpu(fresh.pop()):
                    if len(replica.share_bytes) > 1:
                        linked = replica.share_bytes.keys() - group
                        group |= linked
                        fresh += sorted(linked)
            seen |= group
            groups.append(tuple(sorted(group)))
        return groups


def new_state(settings: SwapperSettings) -> FleetState:
    return FleetState(settings=settings, observed=Observed(policy=POLICIES[settings.policy]()))


# --- Facts ------------------------------------------------------------------------------------------------------------


def fold_joined(state: FleetState, fact: NodeJoined) -> None:
    for gpu in fact.gpus:
        state.offered_bytes[gpu.gpu_uuid] = gpu.allocatable_bytes
        state.link_bytes_per_s[gpu.gpu_uuid] = gpu.link_bytes_per_s
        state.foreign_bytes[gpu.gpu_uuid] = gpu.capacity_bytes - gpu.reserve_bytes - gpu.allocatable_bytes


def fold_observed(state: FleetState, fact: GpuObserved) -> None:
    """What strangers use counts as taken; below zero where replicas and strangers together have more than there is."""
    if fact.gpu_uuid in state.offered_bytes:
        offered_bytes = state.offered_bytes[fact.gpu_uuid] + state.foreign_bytes.get(fact.gpu_uuid, 0)
        state.offered_bytes[fact.gpu_uuid] = offered_bytes - fact.foreign_bytes
        state.foreign_bytes[fact.gpu_uuid] = fact.foreign_bytes


def fold_granted(state: FleetState, fact: LeaseGranted) -> None:
    for proposal in fact.replicas:
        replica_id = proposal.replica_id
        _leave(state, replica_id)
        leases = [lease for lease in fact.leases if lease.replica_id == replica_id]
        for lease in leases:
            state.replica_ids.setdefault(lease.gpu_uuid, []).append(replica_id)
        state.replicas[replica_id] = Replica(
            replica_id=replica_id,
            deployment_id=proposal.deployment_id,
            spec=proposal.deployment,
            node=fact.node,
            share_bytes={lease.gpu_uuid: lease.granted_bytes for lease in leases},
            residue_bytes={lease.gpu_uuid: lease.residue_bytes for lease in leases},
            tier=Tier.GRANTED,
            since_s=fact.at_s,
            held_for=fact.gang_id,
        )


def fold_committed(state: FleetState, fact: GangCommitted) -> None:
    for replica_id in fact.replica_ids:
        replica = state.replicas.get(replica_id)
        if replica is not None and replica.held_for == fact.gang_id:
            replica.held_for = ""


def fold_released(state: FleetState, fact: LeaseReleased) -> None:
    replica = _leave(state, fact.replica_id)
    state.decisions.pop(fact.replica_id, None)
    if replica is not None:
        state.room_since_s.update(dict.fromkeys(replica.share_bytes, fact.at_s))
        deployment_id = replica.deployment_id
        if all(other.deployment_id != deployment_id for other in state.replicas.values()):
            state.observed.policy.forgotten(deployment_id)
            state.observed.working.discard(deployment_id)


def _leave(state: FleetState, replica_id: str) -> Replica | None:
    """The replica, which has no place any more."""
    replica = state.replicas.pop(replica_id, None)
    if replica is not None:
        for gpu_uuid in replica.share_bytes:
            state.replica_ids[gpu_uuid].remove(replica_id)
    return replica


def _move(state: FleetState, replica_id: str, tier: Tier, at_s: float) -> Replica | None:
    replica = state.replicas.get(replica_id)
    if replica is not None:
        replica.tier, replica.since_s = tier, at_s
        state.room_since_s.update(dict.fromkeys(replica.share_bytes, at_s))
    return replica


def _settle(state: FleetState, replica_id: str, *, is_wake: bool) -> None:
    """A fact of the node answers the open decision."""
    decision = state.decisions.get(replica_id)
    if decision is not None and decision.is_wake == is_wake:
        del state.decisions[replica_id]


def fold_starting(state: FleetState, fact: ReplicaStarting) -> None:
    _move(state, fact.replica_id, Tier.STARTING, fact.at_s)


def fold_ready(state: FleetState, fact: ReplicaReady) -> None:
    for ready in fact.replicas:
        replica = _move(state, ready.replica_id, Tier.RESIDENT, fact.at_s)
        if replica is not None:
            replica.is_asked_awake, replica.is_started = False, True
            replica.wake_epoch = ready.wake_epoch
            _tell_restored(state, replica, fact.at_s)
        _settle(state, ready.replica_id, is_wake=True)


def fold_draining(state: FleetState, fact: ReplicaDraining) -> None:
    _move(state, fact.replica_id, Tier.DRAINING, fact.at_s)


def fold_abandoned(state: FleetState, fact: ParkAbandoned) -> None:
    replica = _move(state, fact.replica_id, Tier.RESIDENT, fact.at_s)
    if replica is not None:
        replica.is_asked_parked = False
    _settle(state, fact.replica_id, is_wake=False)


def fold_parked(state: FleetState, fact: ReplicaParked) -> None:
    replica = _move(state, fact.replica_id, Tier.PARKED, fact.at_s)
    if replica is not None:
        replica.wake_epoch = fact.wake_epoch
        replica.residue_bytes = dict(zip(replica.share_bytes, fact.residues(len(replica.share_bytes)), strict=True))
        state.observed.policy.parked(replica.deployment_id, now_s=fact.at_s)
    _settle(state, fact.replica_id, is_wake=False)


def fold_waking(state: FleetState, fact: ReplicaWaking) -> None:
    replica = _move(state, fact.replica_id, Tier.WAKING if fact.is_reserved else Tier.WAITING, fact.at_s)
    if replica is not None and not fact.is_reserved:
        replica.is_asked_parked = False


def fold_resident(state: FleetState, fact: ReplicaResident) -> None:
    replica = _move(state, fact.replica_id, Tier.RESIDENT, fact.at_s)
    if replica is not None:
        replica.is_asked_awake = False
        replica.restore_s = fact.restore_s + fact.verify_s
        _tell_restored(state, replica, fact.at_s)
    _settle(state, fact.replica_id, is_wake=True)


def _tell_restored(state: FleetState, replica: Replica, at_s: float) -> None:
    state.observed.policy.restored(
        replica.deployment_id,
        now_s=at_s,
        restore_s=state.restore_s(replica),
        size_bytes=sum(replica.freed_bytes.values()),
    )


def fold_wake_refused(state: FleetState, fact: WakeRefused) -> None:
    replica = state.replicas.get(fact.replica_id)
    if replica is not None:
        if replica.tier in (Tier.WAITING, Tier.WAKING):
            _move(state, fact.replica_id, Tier.PARKED if replica.is_started else Tier.GRANTED, fact.at_s)
        replica.refused_at_s = fact.at_s
    _settle(state, fact.replica_id, is_wake=True)


def fold_suspect(state: FleetState, fact: ReplicaSuspect) -> None:
    """Its node finds out what it is; until then it keeps what it held, and nothing is asked of it."""
    replica = state.replicas.get(fact.replica_id)
    if replica is not None and replica.tier is not Tier.SUSPECT:
        replica.keeps_share = replica.tier in HOLDING_SHARE
        _move(state, fact.replica_id, Tier.SUSPECT, fact.at_s)
    state.decisions.pop(fact.replica_id, None)


def fold_failed(state: FleetState, fact: ReplicaFailed) -> None:
    replica = _move(state, fact.replica_id, Tier.FAILED if fact.is_final else Tier.GRANTED, fact.at_s)
    if replica is not None:
        replica.wake_epoch, replica.is_started = fact.wake_epoch, False
        replica.refused_at_s = fact.at_s
        replica.not_before_s = fact.at_s + fact.retry_s
    state.decisions.pop(fact.replica_id, None)


def fold_park_asked(state: FleetState, fact: ParkAsked) -> None:
    for replica in state.replicas.values():
        if replica.deployment_id == fact.deployment_id:
            replica.is_asked_parked, replica.is_asked_awake = True, False


def fold_wake_asked(state: FleetState, fact: WakeAsked) -> None:
    for replica in state.replicas.values():
        if replica.deployment_id == fact.deployment_id and replica.tier is not Tier.RESIDENT:
            replica.is_asked_awake, replica.is_asked_parked = True, False


def fold_wake_decided(state: FleetState, fact: WakeDecided) -> None:
    state.decisions[fact.replica_id] = Decision(
        replica_id=fact.replica_id,
        wake_epoch=fact.wake_epoch,
        decided_at_s=fact.at_s,
        is_wake=True,
        victim_ids=fact.victim_ids,
        reason=fact.reason,
    )


def fold_park_decided(state: FleetState, fact: ParkDecided) -> None:
    state.decisions[fact.replica_id] = Decision(
        replica_id=fact.replica_id,
        wake_epoch=fact.wake_epoch,
        decided_at_s=fact.at_s,
        is_wake=False,
        victim_ids=(),
        reason=fact.reason,
    )


def fold_closed(state: FleetState, fact: DecisionClosed) -> None:
    state.decisions.pop(fact.replica_id, None)


# --- Observations -----------------------------------------------------------------------------------------------------


def observe_wanted(state: FleetState, wanted: ModelWanted, now_s: float) -> None:
    if wanted.replica_id not in state.replicas:
        return
    state.observed.wanted[wanted.replica_id] = Wanted(
        heard_at_s=now_s,
        since_s=now_s - wanted.oldest_wait_s,
        waiting_count=wanted.waiting_count,
        wake_epoch=wanted.wake_epoch,
    )
    state.observed.last_used_s[wanted.deployment_id] = now_s
    if wanted.deployment_id not in state.observed.working:
        state.observed.working.add(wanted.deployment_id)
        state.observed.policy.used(wanted.deployment_id, now_s=now_s, was_idle=True)


def observe_load(state: FleetState, gateway: str, models: tuple[ModelLoad, ...], now_s: float) -> None:
    state.observed.gateways[gateway] = GatewayLoad(heard_at_s=now_s, models={m.deployment_id: m for m in models})
    last_used_s = state.observed.last_used_s
    for model in models:
        used_s = now_s if model.in_flight_count + model.waiting_count > 0 else model.last_arrival_s
        last_used_s[model.deployment_id] = max(used_s, last_used_s.get(model.deployment_id, 0.0))
        _note_use(state, model, now_s)


def _note_use(state: FleetState, model: ModelLoad, now_s: float) -> None:
    """Tells the policy: all arrivals of one sample are one use; it rests when no gateway has work for it."""
    observed, deployment_id = state.observed, model.deployment_id
    was_working = deployment_id in observed.working
    is_working = model.in_flight_count + model.waiting_count > 0 or _works_elsewhere(state, deployment_id, now_s)
    if model.arrived_count > 0 or (is_working and not was_working):
        observed.policy.used(deployment_id, now_s=now_s, was_idle=not was_working)
    if is_working:
        observed.working.add(deployment_id)
    elif was_working or model.arrived_count > 0:
        observed.working.discard(deployment_id)
        observed.policy.rested(deployment_id, now_s=now_s)


def _works_elsewhere(state: FleetState, deployment_id: str, now_s: float) -> bool:
    for load in state.observed.gateways.values():
        model = load.models.get(deployment_id)
        is_there = now_s - load.heard_at_s <= state.settings.gateway_gone_s
        if is_there and model is not None and model.in_flight_count + model.waiting_count > 0:
            return True
    return False

"""Who comes back, and who may give way: the hard rules, which no policy can break. Training gives way before inference.

Who of those that may is worth least, says the policy (`policies/`). Pure, total orders, ties by id.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from services.swapper.policies.selection import Candidate, chosen
from services.swapper.state import FleetState, Replica, Tier, Wanted

AWAY: Final = (Tier.PARKED, Tier.GRANTED)
"""Where a replica is that may be woken. Looked at for every replica at every tick, and enums are slow to name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One wake with its victims. An empty `victims` means that there is room already."""

    replica: Replica
    victims: tuple[Replica, ...]
    reason: str


def is_idle(state: FleetState, replica: Replica, *, now_s: float) -> bool:
    """True only when every gateway that may route to it says so, freshly. Not knowing is not idle."""
    known = False
    for load in state.observed.gateways.values():
        age_s = now_s - load.heard_at_s
        if age_s > state.settings.gateway_gone_s:
            continue
        if age_s > state.settings.load_fresh_s:
            return False
        known = True
        model = load.models.get(replica.deployment_id)
        if model is not None and model.in_flight_count + model.waiting_count > 0:
            return False
    return known


def last_used_s(state: FleetState, replica: Replica) -> float:
    """When it last had work, at the earliest when it became resident."""
    return max(state.observed.last_used_s.get(replica.deployment_id, 0.0), replica.since_s)


def fresh_wish(state: FleetState, replica: Replica, *, now_s: float) -> Wanted | None:
    wanted = state.observed.wanted.get(replica.replica_id)
    if wanted is None or now_s - wanted.heard_at_s > state.settings.wanted_fresh_s:
        return None
    if replica.tier is Tier.PARKED and wanted.wake_epoch != replica.wake_epoch:
        return None  # An earlier return has answered it; who still waits says so again with the new epoch.
    return wanted


def wakes(state: FleetState, gpu_uuids: Collection[str], *, now_s: float) -> list[Plan]:
    """The wakes to order on these GPUs now, most urgent first; none is in the way of another.

    `gpu_uuids` is a whole group (`FleetState.groups`). A replica that spans several of its GPUs is planned on all of
    them or not at all, in one order for all, so that no two can each have what the other waits for.
    """
    candidates = _candidates(state, gpu_uuids, now_s=now_s)
    if not candidates:
        return []
    account = _Account(state, gpu_uuids)
    plans = []
    awaited: set[str] = set()
    """GPUs on which somebody more urgent waits for room: nobody less urgent may take what is being freed there."""
    for _, replica, wanted in candidates:
        plan = None
        if awaited.isdisjoint(replica.share_bytes):
            plan = _plan(state, account, replica, wanted, now_s=now_s)
        if plan is not None:
            account.book(plan)
            plans.append(plan)
        elif wanted is not None:
            awaited.update(replica.share_bytes)
    return plans


def _candidates(
    state: FleetState, gpu_uuids: Collection[str], *, now_s: float
) -> list[tuple[tuple[int, int, float, str], Replica, Wanted | None]]:
    """Replicas that should be on these GPUs and are not, in the order in which they may take room."""
    found = []
    for replica in _here(state, gpu_uuids):
        if replica.tier not in AWAY or replica.replica_id in state.decisions:
            continue
        if now_s - replica.refused_at_s < state.settings.refused_pause_s or now_s < replica.not_before_s:
            continue
        if replica.held_for:
            continue
        wanted = fresh_wish(state, replica, now_s=now_s)
        priority = -replica.spec.priority_number
        if wanted is not None or replica.is_asked_awake:
            since_s = wanted.since_s if wanted is not None else replica.since_s
            found.append(((0, priority, since_s, replica.replica_id), replica, wanted))
        elif replica.tier is Tier.GRANTED or not replica.spec.swap.is_parkable:
            found.append(((1, priority, replica.since_s, replica.replica_id), replica, None))
        elif replica.is_training and not replica.is_asked_parked:
            found.append(((2, priority, replica.since_s, replica.replica_id), replica, None))
    return sorted(found, key=lambda item: item[0])


def _here(state: FleetState, gpu_uuids: Collection[str]) -> list[Replica]:
    """Who has a lease on any of these, each once: by GPU, then in the order of their grants."""
    if len(gpu_uuids) == 1:
        return state.on_gpu(next(iter(gpu_uuids)))
    return list({replica.replica_id: replica for uuid in gpu_uuids for replica in state.on_gpu(uuid)}.values())


class _Account:
    """Free bytes of each GPU of a group while its wakes are being chosen."""

    def __init__(self, state: FleetState, gpu_uuids: Collection[str]) -> None:
        self._here = _here(state, gpu_uuids)
        self._free_bytes = {uuid: state.offered_bytes.get(uuid, 0) for uuid in gpu_uuids}
        self.taken: set[str] = set()
        """Replicas that are giving way already."""
        for replica in self._here:
            decision = state.decisions.get(replica.replica_id)
            is_coming = replica.tier is Tier.WAITING or (
                decision is not None and decision.is_wake and replica.tier in AWAY
            )
            for gpu_uuid, share_bytes in replica.share_bytes.items():
                self._free_bytes[gpu_uuid] -= share_bytes if is_coming else replica.held_on(gpu_uuid)
            if replica.tier is Tier.DRAINING:
                self._give(replica)
        self._count_ordered_victims(state)

    def _count_ordered_victims(self, state: FleetState) -> None:
        """Victims of orders that the node has not answered yet will give their bytes too."""
        resident = {r.replica_id: r for r in self._here if r.tier is Tier.RESIDENT}
        for decision in state.decisions.values():
            named = decision.victim_ids if decision.is_wake else (decision.replica_id,)
            for victim_id in named:
                if victim_id in resident and victim_id not in self.taken:
                    self._give(resident[victim_id])

    def _give(self, replica: Replica) -> None:
        self.taken.add(replica.replica_id)
        for gpu_uuid, size in replica.freed_bytes.items():
            self._free_bytes[gpu_uuid] += size

    def missing_bytes(self, replica: Replica) -> dict[str, int]:
        """By GPU: what it lacks to be resident; only GPUs on which it lacks something."""
        missing = {uuid: size - self._free_bytes[uuid] for uuid, size in replica.wanted_bytes.items()}
        return {uuid: size for uuid, size in missing.items() if size > 0}

    def book(self, plan: Plan) -> None:
        for gpu_uuid, size in plan.replica.wanted_bytes.items():
            self._free_bytes[gpu_uuid] -= size
        for victim in plan.victims:
            self._give(victim)


def _plan(
    state: FleetState, account: _Account, replica: Replica, wanted: Wanted | None, *, now_s: float
) -> Plan | None:
    missing = account.missing_bytes(replica)
    if not missing:
        if replica.is_training and replica.tier is Tier.PARKED and wanted is None:
            quiet_s = now_s - max(state.room_since_s.get(uuid, 0.0) for uuid in replica.share_bytes)
            if quiet_s < state.settings.training_return_s:
                return None
        return Plan(replica=replica, victims=(), reason=_reason(replica, wanted))
    if replica.is_training and not replica.is_asked_awake:
        return None  # Training takes what is free; nobody gives way to its first start or its return.
    victims = _victims(state, account, replica, wanted, missing=missing, now_s=now_s)
    return Plan(replica=replica, victims=victims, reason=_reason(replica, wanted)) if victims else None


def _reason(replica: Replica, wanted: Wanted | None) -> str:
    if wanted is not None:
        return f"{wanted.waiting_count} waiting"
    if replica.is_asked_awake:
        return "asked for by an operator"
    return "first start" if replica.tier is Tier.GRANTED else "room is free"


def _victims(
    state: FleetState,
    account: _Account,
    replica: Replica,
    wanted: Wanted | None,
    *,
    missing: Mapping[str, int],
    now_s: float,
) -> tuple[Replica, ...]:
    """Those worth least that free enough on every GPU, lowest priority first; () when too few may.

    One that spans several GPUs gives on all of them.
    """
    has_waited = wanted is not None and now_s - wanted.since_s >= state.settings.switch_after_s
    may = [
        other
        for other in _here(state, missing)
        if other.tier is Tier.RESIDENT
        and other.replica_id not in account.taken
        and other.spec.swap.is_parkable
        and _may_give_way(state, other, replica, has_waited=has_waited, now_s=now_s)
    ]
    candidates = [_candidate(state, other, now_s=now_s) for other in may]
    choice = chosen(candidates, missing_bytes=missing, adds=state.observed.policy.adds)
    return () if choice is None else tuple(state.replicas[key] for key in choice.keys)


def _candidate(state: FleetState, replica: Replica, *, now_s: float) -> Candidate:
    freed_bytes = replica.freed_bytes
    worth = state.observed.policy.worth(
        replica.deployment_id,
        now_s=now_s,
        since_s=replica.since_s,
        restore_s=state.restore_s(replica),
        size_bytes=sum(freed_bytes.values()),
    )
    return Candidate(
        key=replica.replica_id, priority=replica.spec.priority_number, freed_bytes=freed_bytes, worth=worth
    )


def _may_give_way(state: FleetState, other: Replica, replica: Replica, *, has_waited: bool, now_s: float) -> bool:
    """Training gives way to inference at once; inference when idle and long enough here, or to a long wait.

    To a lower priority only idle inference gives way, and only to a long wait: it is guaranteed its return, and a GPU
    that nobody uses is no reason to let requests run out of time.
    """
    if other.spec.priority_number < replica.spec.priority_number and other.is_training:
        return True
    if now_s - other.since_s < other.spec.swap.minimum_residency_s:
        return False
    idle = is_idle(state, other, now_s=now_s)
    if other.spec.priority_number > replica.spec.priority_number:
        return has_waited and idle and not other.is_training
    return has_waited or idle


def expired(state: FleetState, *, now_s: float) -> list[tuple[Replica, str]]:
    """Resident replicas that should park now, with the reason: asked for, or idle longer than their warm window."""
    found = []
    for replica in state.replicas.values():
        if replica.tier is not Tier.RESIDENT or not replica.spec.swap.is_parkable:
            continue
        if replica.replica_id in state.decisions:
            continue
        if replica.is_asked_parked:
            found.append((replica, "asked for by an operator"))
        elif not replica.is_training and _is_cooled(state, replica, now_s=now_s):
            found.append((replica, "idle longer than its warm window"))
    return found


def _is_cooled(state: FleetState, replica: Replica, *, now_s: float) -> bool:
    idle_s = now_s - last_used_s(state, replica)
    return idle_s >= replica.spec.swap.warm_window_s and is_idle(state, replica, now_s=now_s)

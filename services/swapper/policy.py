"""Who comes back, and who gives way: least recently used first, training before inference.

Pure, total orders, ties by id.
"""

from dataclasses import dataclass

from services.swapper.state import FleetState, Replica, Tier, Wanted


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


def wakes(state: FleetState, gpu_uuid: str, *, now_s: float) -> list[Plan]:
    """The wakes to order on this GPU now, most urgent first; none is in the way of another."""
    candidates = _candidates(state, gpu_uuid, now_s=now_s)
    if not candidates:
        return []
    account = _Account(state, gpu_uuid)
    plans = []
    for _, replica, wanted in candidates:
        plan = _plan(state, account, replica, wanted, now_s=now_s)
        if plan is not None:
            account.book(plan)
            plans.append(plan)
        elif wanted is not None:
            # The most urgent one waits for room: nobody less urgent may take what is being freed for it.
            break
    return plans


def _candidates(
    state: FleetState, gpu_uuid: str, *, now_s: float
) -> list[tuple[tuple[int, int, float, str], Replica, Wanted | None]]:
    """Replicas that should be on the GPU and are not, in the order in which they may take room."""
    found = []
    for replica in state.on_gpu(gpu_uuid):
        if replica.tier not in (Tier.PARKED, Tier.GRANTED) or replica.replica_id in state.decisions:
            continue
        if now_s - replica.refused_at_s < state.settings.refused_pause_s or now_s < replica.not_before_s:
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


class _Account:
    """Bytes of one GPU while its wakes are being chosen."""

    def __init__(self, state: FleetState, gpu_uuid: str) -> None:
        here = state.on_gpu(gpu_uuid)
        self.free_bytes = state.offered_bytes.get(gpu_uuid, 0) - sum(r.held_bytes for r in here)
        self.taken: set[str] = set()
        """Replicas that are giving way already."""
        for replica in here:
            decision = state.decisions.get(replica.replica_id)
            is_coming = replica.tier is Tier.WAITING or (
                decision is not None and decision.is_wake and replica.tier in (Tier.PARKED, Tier.GRANTED)
            )
            if is_coming:
                self.free_bytes -= replica.share_bytes - replica.held_bytes
            if replica.tier is Tier.DRAINING:
                self.free_bytes += replica.freed_bytes
                self.taken.add(replica.replica_id)
        self._count_ordered_victims(state, here)

    def _count_ordered_victims(self, state: FleetState, here: list[Replica]) -> None:
        """Victims of orders that the node has not answered yet will give their bytes too."""
        resident = {r.replica_id: r for r in here if r.tier is Tier.RESIDENT}
        for decision in state.decisions.values():
            named = decision.victim_ids if decision.is_wake else (decision.replica_id,)
            for victim_id in named:
                if victim_id in resident and victim_id not in self.taken:
                    self.taken.add(victim_id)
                    self.free_bytes += resident[victim_id].freed_bytes

    def book(self, plan: Plan) -> None:
        self.free_bytes -= plan.replica.share_bytes - plan.replica.held_bytes
        for victim in plan.victims:
            self.taken.add(victim.replica_id)
            self.free_bytes += victim.freed_bytes


def _plan(
    state: FleetState, account: _Account, replica: Replica, wanted: Wanted | None, *, now_s: float
) -> Plan | None:
    missing_bytes = replica.share_bytes - replica.held_bytes - account.free_bytes
    if missing_bytes <= 0:
        if replica.is_training and replica.tier is Tier.PARKED and wanted is None:
            quiet_s = now_s - state.room_since_s.get(replica.gpu_uuid, 0.0)
            if quiet_s < state.settings.training_return_s:
                return None
        return Plan(replica=replica, victims=(), reason=_reason(replica, wanted))
    if replica.is_training and not replica.is_asked_awake:
        return None  # Training takes what is free; nobody gives way to its first start or its return.
    victims = _victims(state, account, replica, wanted, missing_bytes=missing_bytes, now_s=now_s)
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
    missing_bytes: int,
    now_s: float,
) -> tuple[Replica, ...]:
    """The fewest that free enough: lowest priority first, then least recently used; () when not enough may give way."""
    has_waited = wanted is not None and now_s - wanted.since_s >= state.settings.switch_after_s
    candidates = [
        other
        for other in state.on_gpu(replica.gpu_uuid)
        if other.tier is Tier.RESIDENT
        and other.replica_id not in account.taken
        and other.spec.swap.is_parkable
        and _may_give_way(state, other, replica, has_waited=has_waited, now_s=now_s)
    ]
    candidates.sort(key=lambda o: (o.spec.priority_number, last_used_s(state, o), o.replica_id))
    chosen: list[Replica] = []
    freed_bytes = 0
    for other in candidates:
        if freed_bytes >= missing_bytes:
            break
        chosen.append(other)
        freed_bytes += other.freed_bytes
    if freed_bytes < missing_bytes:
        return ()
    for other in list(chosen):
        if freed_bytes - other.freed_bytes >= missing_bytes:
            chosen.remove(other)
            freed_bytes -= other.freed_bytes
    return tuple(chosen)


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

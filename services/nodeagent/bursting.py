"""Who gets how much of what no lease claims: by need and weight, equal weights equal parts, never beyond a limit.

Pure arithmetic over whole bytes. One level rises for all at once, as water does, until a limit or a full GPU stops
somebody; the others go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit.outcomes import Context, Timer
from services.nodeagent.demand import Size, wanted_bytes
from services.nodeagent.growth import is_elastic
from services.nodeagent.inputs import BurstDue
from services.nodeagent.ledger import Ledger
from services.nodeagent.quarantines import barred
from services.nodeagent.state import NodeState, Replica
from services.nodeagent.transitions import Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class Burster:
    """One replica that may have more than its request; on each of its GPUs the same."""

    replica_id: str
    gpu_uuids: tuple[str, ...]
    weight: int
    extra_bytes: int
    """What it has beyond its request now."""
    most_bytes: int
    """What it needs beyond its request, as far as it may have that."""
    is_resting: bool = False
    """It has given back lately, or one of its GPUs takes nothing new: it does not grow now."""


def first_look(state: NodeState, ctx: Context) -> list[Timer]:
    """When shares are looked at first; also where none may burst, if an earlier life left one that gives back."""
    tick_s = state.settings.burst_tick_s
    is_due = tick_s > 0 or any(replica.giving_back is not None for replica in state.replicas.values())
    return [Timer(due_s=ctx.now_s + tick_s, input=BurstDue(is_first=True))] if is_due else []


def bursters(state: NodeState, *, now_s: float) -> list[Burster]:
    """In the order of their ids."""
    return [
        Burster(
            replica_id=replica_id,
            gpu_uuids=tuple(replica.share_bytes),
            weight=replica.proposal.deployment.share.burst_weight,
            extra_bytes=min(replica.borrowed_bytes.values()),
            most_bytes=_wished_bytes(state, replica, now_s=now_s),
            is_resting=now_s < replica.gave_back_at_s + replica.growth.rest_s(state.settings.burst_rest_s)
            or bool(barred(state, replica.share_bytes)),
        )
        for replica_id, replica in sorted(state.replicas.items())
        if may_burst(replica) and replica.giving_back is None
    ]


def may_burst(replica: Replica) -> bool:
    is_here = replica.residency is Residency.RESIDENT and replica.growth.is_able
    return is_here and is_elastic(replica.proposal.deployment) and most_bytes(replica) > 0


def _wished_bytes(state: NodeState, replica: Replica, *, now_s: float) -> int:
    """All that it may have, where nobody asks engines how full they are."""
    if state.settings.demand_s <= 0:
        return most_bytes(replica)
    told = state.observed.demands.get(replica.proposal.replica_id)
    shares = replica.proposal.shares
    size = Size(
        request_bytes=min(share.request_bytes for share in shares),
        fixed_bytes=replica.proposal.deployment.engine.weights_bytes // len(shares),
        extra_bytes=min(replica.borrowed_bytes.values()),
        most_bytes=most_bytes(replica),
        changed_at_s=replica.gave_back_at_s,
    )
    is_its = told is not None and told.lease_epoch == replica.lease_epoch
    return wanted_bytes(told if is_its else None, size, now_s=now_s, idle_s=state.settings.burst_idle_s)


def most_bytes(replica: Replica) -> int:
    """What its limits leave beyond its requests, on the GPU that leaves least."""
    return min(share.limit_bytes - share.request_bytes for share in replica.proposal.shares)


def room_bytes(ledger: Ledger, here: Sequence[Burster]) -> dict[str, int]:
    """By GPU: what these may have together beyond their requests; nothing where a waiting wake lacks bytes."""
    room: dict[str, int] = {}
    for burster in here:
        for gpu_uuid in burster.gpu_uuids:
            room[gpu_uuid] = room.get(gpu_uuid, ledger.unclaimed_bytes(gpu_uuid)) + burster.extra_bytes
    return {uuid: size if ledger.unclaimed_bytes(uuid) >= 0 else 0 for uuid, size in room.items()}


def fair_extras(here: Sequence[Burster], room: Mapping[str, int], *, step_bytes: int) -> dict[str, int]:
    """{replica_id: what it should have beyond its request}; below its limit only whole steps.

    No one can get more without taking it from somebody who has no more for his weight.
    """
    left = {gpu_uuid: max(0, size) for gpu_uuid, size in room.items()}
    extras = {burster.replica_id: 0 for burster in here}
    rising = [burster for burster in here if burster.most_bytes > 0]
    while rising:
        weights: dict[str, int] = {}
        for burster in rising:
            for gpu_uuid in burster.gpu_uuids:
                weights[gpu_uuid] = weights.get(gpu_uuid, 0) + burster.weight
        by_room = min(left[gpu_uuid] // weight for gpu_uuid, weight in weights.items())
        by_limit = min((b.most_bytes - extras[b.replica_id]) // b.weight for b in rising)
        for burster in rising:
            more_bytes = min(by_room, by_limit) * burster.weight
            extras[burster.replica_id] += more_bytes
            for gpu_uuid in burster.gpu_uuids:
                left[gpu_uuid] -= more_bytes
        full = {gpu_uuid for gpu_uuid, weight in weights.items() if left[gpu_uuid] < weight}
        rising = [
            burster
            for burster in rising
            if burster.most_bytes - extras[burster.replica_id] >= burster.weight
            if full.isdisjoint(burster.gpu_uuids)
        ]
    return {b.replica_id: _in_steps(extras[b.replica_id], b, step_bytes) for b in here}


def _in_steps(extra_bytes: int, burster: Burster, step_bytes: int) -> int:
    """The last bytes below a limit are as good as the limit only if it was reached but for the rounding by weight."""
    if burster.most_bytes - extra_bytes < burster.weight:
        return extra_bytes
    return extra_bytes - extra_bytes % max(1, step_bytes)


def growths(
    here: Sequence[Burster], extras: Mapping[str, int], ledger: Ledger, *, step_bytes: int
) -> list[tuple[Burster, int]]:
    """Who grows now, to which extra: as far as bytes are free now. Books what it gives."""
    found = []
    for burster in here:
        free_bytes = min(ledger.unclaimed_bytes(gpu_uuid) for gpu_uuid in burster.gpu_uuids)
        more_bytes = min(extras[burster.replica_id] - burster.extra_bytes, free_bytes)
        if burster.is_resting or more_bytes < max(1, min(step_bytes, burster.most_bytes)):
            continue
        ledger.hold(dict.fromkeys(burster.gpu_uuids, more_bytes))
        found.append((burster, burster.extra_bytes + more_bytes))
    return found


def surpluses(
    here: Sequence[Burster], extras: Mapping[str, int], *, step_bytes: int
) -> list[tuple[Burster, int, Burster | None]]:
    """Who has more than its part while somebody on one of its GPUs has less; to which extra it shrinks; for whom.

    And who has more than it needs: for nobody, so that the next owner finds it free.
    """
    short = [
        burster
        for burster in here
        if extras[burster.replica_id] - burster.extra_bytes >= max(1, min(step_bytes, burster.most_bytes))
        if not burster.is_resting
    ]
    found: list[tuple[Burster, int, Burster | None]] = []
    for burster in here:
        if burster.extra_bytes - extras[burster.replica_id] < step_bytes:
            continue
        wanting = [other for other in short if set(other.gpu_uuids) & set(burster.gpu_uuids)]
        if wanting:
            found.append((burster, extras[burster.replica_id], wanting[0]))
        elif burster.extra_bytes - burster.most_bytes >= step_bytes:
            found.append((burster, burster.most_bytes, None))
    return found

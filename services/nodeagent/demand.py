"""How much a replica needs beyond its request, by what its engine tells of its cache and its queue.

Pure. Whoever is short may have all up to its limit; whoever has enough keeps what it has; whoever has used little for a
while keeps what it uses. More need never means a smaller wish, and what is not known is not zero: it changes nothing.
"""

from dataclasses import dataclass, replace
from typing import Final

HUNGRY_FRACTION: Final = 0.8
"""So much of its cache in use: the next requests will not find room in it."""
BUSY_FRACTION: Final = 0.5
"""With requests that wait, so much is enough: below, they wait for something else than memory."""
AIMED_FRACTION: Final = 0.65
"""Between the two: a cache that was shrunk to what is used is neither short at once nor idle still."""
FRESH_S: Final = 15.0
"""What was told longer ago says nothing of now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one engine has told."""

    lease_epoch: int
    kv_used_fraction: float
    """Of the cache that it has now."""
    waiting_count: int
    at_s: float
    idle_since_s: float | None = None
    """Since when it has used little of its cache and let nobody wait; None: it does not."""

    @property
    def is_hungry(self) -> bool:
        least = BUSY_FRACTION if self.waiting_count > 0 else HUNGRY_FRACTION
        return self.kv_used_fraction >= least

    @property
    def is_idle(self) -> bool:
        return self.kv_used_fraction < BUSY_FRACTION and self.waiting_count == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of one replica, on each of its GPUs."""

    request_bytes: int
    fixed_bytes: int
    """Of that, what is no cache: its weights."""
    extra_bytes: int
    """What it has beyond its request now."""
    most_bytes: int
    """What it may have beyond its request."""
    changed_at_s: float = 0.0
    """When it last became smaller: what was told of the cache before says nothing of the one that it has now."""


def heard(before: Demand | None, now: Demand) -> Demand:
    """What is remembered after it was told anew."""
    if not now.is_idle:
        return replace(now, idle_since_s=None)
    since_s = before.idle_since_s if before is not None and before.lease_epoch == now.lease_epoch else None
    return replace(now, idle_since_s=now.at_s if since_s is None else since_s)


def wanted_bytes(demand: Demand | None, size: Size, *, now_s: float, idle_s: float) -> int:
    """What it should have beyond its request, were it alone; never more than it may have."""
    kept_bytes = min(size.extra_bytes, size.most_bytes)
    if demand is None or now_s - demand.at_s > FRESH_S:
        return kept_bytes
    if demand.is_hungry:
        return size.most_bytes
    if not demand.is_idle or demand.idle_since_s is None or demand.at_s <= size.changed_at_s:
        return kept_bytes
    if now_s - max(demand.idle_since_s, size.changed_at_s) < idle_s:
        return kept_bytes
    fixed_bytes = min(size.fixed_bytes, size.request_bytes)
    cache_bytes = size.request_bytes + size.extra_bytes - fixed_bytes
    aimed_bytes = fixed_bytes + int(cache_bytes * demand.kv_used_fraction / AIMED_FRACTION)
    return min(kept_bytes, max(0, aimed_bytes - size.request_bytes))

"""Which gateway may still send requests where. Pure: the time is an argument, waiting is the shell's (`routes.py`).

Every change of a route gives the table a new version. A gateway gets a lease *on a version*: until it ends, the
gateway may route to what that version shows open. It acknowledges a version by naming it in its next wish. A route
that was closed by version V is truly closed when no gateway holds a live lease on a version before V without having
acknowledged V or later.
"""

from dataclasses import dataclass, field
from typing import Final

from schemas.holders import RouteLease

GATEWAYS_MAX: Final = 1024
"""Bound of the table. A fleet has a handful of gateways; one that restarts in a loop leaves a name a second."""

VERSIONS_PER_MS: Final = 1024
"""First versions of two lives of a holder differ by this for each millisecond between their starts."""

VERSIONS_PER_LIFE: Final = 2**24
"""And by this at least, however the clock was set in between: more changes than a holder sees in a year."""

# The holder counts a lease a little longer than the gateway: their clocks' rates may differ, in practice by 0.05 %.
_CLOCK_ALLOWANCE: Final = 1.01


def first_version(*, unix_ms: int, former_first_version: int | None) -> int:
    """Where a holder that starts now begins to count: above all versions of its former lives. Below 2**53, for JSON.

    A gateway ignores versions below those it knows, so a clock that went back must not matter where the former life's
    first version is still known.
    """
    by_clock = unix_ms * VERSIONS_PER_MS
    return by_clock if former_first_version is None else max(by_clock, former_first_version + VERSIONS_PER_LIFE)


@dataclass(slots=True, kw_only=True)
class Route:
    """A replica that was opened or closed; one that was forgotten has none, and gets no requests."""

    endpoint: str
    is_open: bool
    changed_version: int
    """The version that made it so; never above the table's."""


@dataclass(slots=True, kw_only=True)
class GatewayLeases:
    """What one gateway was granted."""

    seen_version: int = -1
    """Named in its latest wish; -1 when that named none of this holder's. Never above the table's."""
    ends_at_s: dict[int, float] = field(default_factory=dict)
    """{version: when the last lease on it ends}; ended ones are dropped at the next look."""

    def may_route_before(self, version: int, *, now_s: float) -> float | None:
        """When its last lease on an older version ends; None when it acts on this version, or has no such lease."""
        if self.seen_version >= version:
            return None
        ends = [end_s for granted, end_s in self.ends_at_s.items() if granted < version and end_s > now_s]
        return max(ends, default=None)


@dataclass(slots=True, kw_only=True)
class RouteTable:
    """Routes and leases of one holder's life."""

    term_s: float
    born_version: int
    born_at_s: float
    """Until a term later gateways may hold leases of this holder's former life, of which it knows nothing."""
    version: int = field(init=False)
    routes: dict[str, Route] = field(default_factory=dict)
    gateways: dict[str, GatewayLeases] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.version = self.born_version

    # -- what the node agent says

    def open(self, replica_id: str, *, endpoint: str) -> int:
        """The version that shows it open. Idempotent."""
        route = self.routes.get(replica_id)
        if route is None or not route.is_open or route.endpoint != endpoint:
            self._change(replica_id, endpoint=endpoint, is_open=True)
        return self.routes[replica_id].changed_version

    def close(self, replica_id: str) -> int:
        """The version that shows it closed. Idempotent. An unknown replica is closed too: it may be a forgotten one."""
        route = self.routes.get(replica_id)
        if route is None or route.is_open:
            self._change(replica_id, endpoint=route.endpoint if route else "", is_open=False)
        return self.routes[replica_id].changed_version

    def forget(self, replica_id: str) -> None:
        """Neither open nor closed, which means no requests. Idempotent."""
        if self.routes.pop(replica_id, None) is not None:
            self.version += 1

    # -- what gateways say

    def is_full(self, gateway: str, *, now_s: float) -> bool:
        """No room for one more gateway; those whose leases have ended are dropped first."""
        if gateway in self.gateways or len(self.gateways) < GATEWAYS_MAX:
            return False
        for name in [
            name for name, leases in self.gateways.items() if max(leases.ends_at_s.values(), default=0) <= now_s
        ]:
            del self.gateways[name]
        return len(self.gateways) >= GATEWAYS_MAX

    def acknowledge(self, gateway: str, *, seen_version: int) -> bool:
        """Take note of what a wish names; true when the gateway is up to date, so that its answer can wait.

        The latest wish counts, not the highest version: a gateway that restarted under its old name has seen nothing. A
        version that is not of this life, such as one of a holder with a faster clock, counts as nothing seen.
        """
        is_ours = self.born_version <= seen_version <= self.version
        self.gateways.setdefault(gateway, GatewayLeases()).seen_version = seen_version if is_ours else -1
        return seen_version == self.version

    def grant(self, gateway: str, *, wished_at_s: float, now_s: float) -> RouteLease:
        """A lease on the current version. It ends a term after its wish came, which is later than when it was sent."""
        leases = self.gateways.setdefault(gateway, GatewayLeases())
        leases.ends_at_s = {version: end_s for version, end_s in leases.ends_at_s.items() if end_s > now_s}
        end_s = wished_at_s + self.term_s * _CLOCK_ALLOWANCE
        leases.ends_at_s[self.version] = max(end_s, leases.ends_at_s.get(self.version, end_s))
        open_ids = self.open_ids()
        return RouteLease(
            version=self.version,
            closed_ids=self.closed_ids(),
            open_ids=open_ids,
            endpoints=tuple(self.routes[replica_id].endpoint for replica_id in open_ids),
            term_s=self.term_s,
        )

    # -- what is asked

    def open_ids(self) -> tuple[str, ...]:
        return tuple(sorted(replica_id for replica_id, route in self.routes.items() if route.is_open))

    def closed_ids(self) -> tuple[str, ...]:
        return tuple(sorted(replica_id for replica_id, route in self.routes.items() if not route.is_open))

    def unaware(self, version: int, *, now_s: float) -> dict[str, float]:
        """`{gateway: when its last lease ends}` of those that may still act on a version before this one, by name."""
        found = {name: leases.may_route_before(version, now_s=now_s) for name, leases in self.gateways.items()}
        return {name: end_s for name, end_s in sorted(found.items()) if end_s is not None}

    def _change(self, replica_id: str, *, endpoint: str, is_open: bool) -> None:
        self.version += 1
        self.routes[replica_id] = Route(endpoint=endpoint, is_open=is_open, changed_version=self.version)


@dataclass(slots=True, kw_only=True)
class Closing:
    """One close on its way. Ask `next_look_s` at each change of the table and at the time that it gave."""

    replica_id: str
    version: int
    waiting: frozenset[str] = frozenset()
    """Gateways that were unaware at the last look."""
    expired_count: int = 0
    """Gateways whose leases ended before they acknowledged."""

    def next_look_s(self, table: RouteTable, *, now_s: float) -> float | None:
        """None when no gateway may route to the replica any more; else when that may be so without another word."""
        unaware = table.unaware(self.version, now_s=now_s)
        for gateway in self.waiting - unaware.keys():
            leases = table.gateways.get(gateway)
            self.expired_count += leases is None or leases.seen_version < self.version
        self.waiting = frozenset(unaware)
        former_end_s = table.born_at_s + table.term_s * _CLOCK_ALLOWANCE
        ends = [*unaware.values(), *([former_end_s] if former_end_s > now_s else [])]
        return min(ends, default=None)

    def is_overtaken(self, table: RouteTable) -> bool:
        """Somebody opened the route again: what was asked for will not be."""
        route = table.routes.get(self.replica_id)
        return route is not None and route.is_open


def check_invariants(table: RouteTable) -> None:
    """What must hold between any two calls."""
    assert table.version >= table.born_version
    for replica_id, route in table.routes.items():
        assert table.born_version < route.changed_version <= table.version, (replica_id, route, table.version)
    for name, leases in table.gateways.items():
        assert leases.seen_version <= table.version, (name, leases)
        assert all(version <= table.version for version in leases.ends_at_s), (name, leases)

"""Gateways in virtual time: the real core, with history, route leases, engines and clients of the simulation around it.

For the simulator only. Every request that a gateway accepts must end in exactly one way; what breaks that raises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from kit.bus import Stored
from kit.simulation import Simulation
from kit.simulation_members import Party
from schemas.catalogue import decode
from schemas.holders import RouteLease
from schemas.messages import NODE_WRITER, Fact, prefix_of
from services.gateway.actions import Action, Bounce, Dispatch, Publish, Refuse
from services.gateway.core import Gateway
from services.gateway.routes import RouteTable
from services.gateway.settings import GatewaySettings

SAFETY_S: Final = 0.3
"""As `leases.py` has it: so much of a lease's term is left when its renewal is answered."""
ANSWERED: Final = "answered"
BOUNCES: Final = {"asleep": Bounce.ASLEEP, "unreachable": Bounce.UNREACHABLE, "cut": Bounce.CUT}


class Holder(Protocol):
    """Grants this gateway a route lease."""

    def lease(
        self, gateway: str, *, seen_version: int, wait_s: float, answer: Callable[[RouteLease], None]
    ) -> None: ...


class Node(Protocol):
    """A host, as a gateway reaches it over HTTP."""

    @property
    def is_up(self) -> bool: ...

    @property
    def holder(self) -> Holder: ...

    def serve(self, replica_id: str, caller: Any, *, takes_s: float) -> None: ...

    def leave(self, replica_id: str, caller: Any) -> None: ...


@dataclass(slots=True, eq=False)
class Ask:
    """One request of a client, from its arrival at a gateway to its end."""

    model: str
    gateway: str
    arrived_s: float
    takes_s: float
    first_byte_s: float | None = None
    ended_s: float | None = None
    outcome: str = ""
    """``answered``, a refusal's code, ``broken`` (one error event after the answer had begun), or ``gateway died``."""

    def end(self, outcome: str, *, now_s: float) -> None:
        assert self.ended_s is None, f"{self} ended a second time: {outcome}"
        self.ended_s, self.outcome = now_s, outcome


@dataclass(slots=True, eq=False)
class _Trip:
    """One turn of a request at a replica."""

    gateway: "SimulatedGateway"
    request_id: str
    replica_id: str
    node: str
    life: int

    def first_byte(self) -> None:
        self._tell(SimulatedGateway.first_byte)

    def finished(self) -> None:
        self._tell(lambda gateway, trip: gateway.over(trip, ANSWERED))

    def bounced(self, why: str) -> None:
        self._tell(lambda gateway, trip: gateway.bounced(trip, BOUNCES[why]))

    def broken(self) -> None:
        self._tell(lambda gateway, trip: gateway.over(trip, "broken"))

    def _tell(self, action: Callable[[Any, Any], None]) -> None:
        """At once, or when the gateway goes on."""
        if self.gateway.is_paused:
            self.gateway.frozen.append((action, self))
        else:
            action(self.gateway, self)


@dataclass(slots=True, eq=False)
class SimulatedGateway(Party):
    """One gateway process; a restarted one has a new id and nothing left of its requests."""

    simulation: Simulation = None  # type: ignore[assignment]  # Always given; fields of the base have defaults.
    nodes: Mapping[str, Node] = field(default_factory=dict)
    settings: GatewaySettings = field(default_factory=GatewaySettings)
    core: Gateway = None  # type: ignore[assignment]  # Made by `start`.
    is_alive: bool = False
    asks: dict[str, Ask] = field(default_factory=dict)
    backlog: list[Ask] = field(default_factory=list)
    """In its socket: it has not read them yet."""
    trips: dict[str, _Trip] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    wished_s: dict[str, float] = field(default_factory=dict)
    """{node: when the wish that is on its way was sent}"""
    _timer_due_s: float | None = None
    _count: int = 0

    # --- Its life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read history to its end, then route."""
        if self.is_alive or not self.simulation.hears(self):
            if not self.is_alive:
                self.simulation.after(1.0, self.start)
            return
        simulation = self.simulation
        self.is_alive = True
        self.core = Gateway(self.settings, gateway_id=f"{self.name}-{self.life}", now_s=simulation.now_s)
        routes = RouteTable()
        for stored in simulation.stream:
            if self in simulation.history.readers(stored.subject):
                fact = decode(stored.body)
                assert isinstance(fact, Fact), fact
                routes.fold(fact)
        self.position, self.is_reading = len(simulation.stream), False
        self._timer_due_s = None
        self.seen.clear()
        self.wished_s.clear()
        self._apply(self.core.replace_routes(routes, now_s=simulation.now_s))
        simulation.wire.read_on(self)
        self._look_at_nodes()

    def crash(self, *, down_s: float) -> None:
        """Its clients see their connections end; engines see their callers leave."""
        if not self.is_alive:
            return
        self.is_alive = self.is_paused = self.is_reading = False
        self.frozen.clear()
        self.life += 1
        for trip in list(self.trips.values()):
            self.nodes[trip.node].leave(trip.replica_id, trip)
        self.trips.clear()
        for ask in (*self.backlog, *self.asks.values()):
            ask.end("gateway died", now_s=self.simulation.now_s)
        self.asks.clear()
        self.backlog.clear()
        self.simulation.after(down_s, self.start)

    # --- Requests -----------------------------------------------------------------------------------------------------

    def ask(self, ask: Ask, *, tenant: str, patience_s: float | None = None) -> None:
        """A client's request arrives; at a stopped process it waits in the socket."""
        if not self.is_alive:
            ask.end("gateway died", now_s=self.simulation.now_s)
            return
        self.backlog.append(ask)
        self.simulation.schedule(self.simulation.now_s, _arrive, self, (ask, tenant, patience_s))

    def arrive(self, ask: Ask, tenant: str, patience_s: float | None) -> None:
        self.backlog.remove(ask)
        self._count += 1
        request_id = str(self._count)
        self.asks[request_id] = ask
        self._apply(
            self.core.arrive(
                request_id,
                tenant=tenant,
                model=ask.model,
                body_bytes=1000,
                patience_s=patience_s,
                now_s=self.simulation.now_s,
            )
        )

    def leave(self, ask: Ask) -> None:
        """Its client gives up."""
        for request_id, known in self.asks.items():
            if known is ask:
                trip = self.trips.pop(request_id, None)
                if trip is not None:
                    self.nodes[trip.node].leave(trip.replica_id, trip)
                self._finish(request_id, "client left")
                return

    def first_byte(self, trip: _Trip) -> None:
        if self._is_current(trip):
            self.asks[trip.request_id].first_byte_s = self.simulation.now_s
            self._apply(self.core.first_byte(trip.request_id, now_s=self.simulation.now_s))

    def over(self, trip: _Trip, outcome: str) -> None:
        if self._is_current(trip):
            del self.trips[trip.request_id]
            self._finish(trip.request_id, outcome)

    def bounced(self, trip: _Trip, why: Bounce) -> None:
        if self._is_current(trip):
            del self.trips[trip.request_id]
            self._apply(self.core.bounced(trip.request_id, trip.replica_id, why, now_s=self.simulation.now_s))

    def _is_current(self, trip: _Trip) -> bool:
        return self.is_alive and trip.life == self.life and self.trips.get(trip.request_id) is trip

    def _finish(self, request_id: str, outcome: str) -> None:
        self.asks.pop(request_id).end(outcome, now_s=self.simulation.now_s)
        self._apply(self.core.finished(request_id, now_s=self.simulation.now_s))

    # --- The core's answers -------------------------------------------------------------------------------------------

    def _apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Publish():
                    self.simulation.fleeting(action.signal, self)
                case Dispatch():
                    self._dispatch(action)
                case Refuse():
                    ask = self.asks.pop(action.request_id)
                    ask.end(action.refusal.code, now_s=self.simulation.now_s)
        self._set_timer()

    def _dispatch(self, action: Dispatch) -> None:
        node = self.core.routes.replicas[action.replica_id].node
        trip = _Trip(self, action.request_id, action.replica_id, node, self.life)
        assert action.request_id not in self.trips, action
        self.trips[action.request_id] = trip
        ask = self.asks[action.request_id]
        if self.nodes[node].is_up:
            self.nodes[node].serve(action.replica_id, trip, takes_s=ask.takes_s)
        else:
            self.simulation.schedule(self.simulation.now_s + self.settings.connect_timeout_s, _unreachable, self, trip)

    def _set_timer(self) -> None:
        due_s = self.core.next_due_s()
        if due_s is None or (self._timer_due_s is not None and self._timer_due_s <= due_s):
            return
        self._timer_due_s = due_s
        self.simulation.schedule(max(due_s, self.simulation.now_s), _tick, self, due_s)

    def tick(self, due_s: float) -> None:
        if self._timer_due_s == due_s:
            self._timer_due_s = None
        self._apply(self.core.tick(now_s=self.simulation.now_s))
        self._renew_overdue()

    # --- History and leases -------------------------------------------------------------------------------------------

    def read(self, stored: Stored) -> None:
        if not self.is_alive:
            return  # Its next life reads history from the start.
        self.simulation.counters.delivered_count += 1
        fact = decode(stored.body)
        assert isinstance(fact, Fact), fact
        self._apply(self.core.fact(fact, now_s=self.simulation.now_s))
        self._look_at_nodes()

    def _look_at_nodes(self) -> None:
        for node in self.core.routes.holder_urls:
            if node not in self.wished_s:
                self._wish(node)

    def _wish(self, node: str) -> None:
        """Ask the node's holder for the lease, and again when its answer is there."""
        sent_s = self.simulation.now_s
        self.wished_s[node] = sent_s
        host = self.nodes[node]
        if not host.is_up:
            return
        present = self.core.routes.leases.get(node)
        left_s = 0.0 if present is None else present.ends_s - sent_s
        wait_s = max(0.0, min(self.settings.lease_wait_s, left_s - SAFETY_S))
        life = self.life
        seen = self.seen.get(node, -1)
        way_s = self.simulation.faults.latency_s

        def answer(lease: RouteLease) -> None:
            self.simulation.schedule(self.simulation.now_s + way_s, _leased, self, (node, sent_s, lease), life)

        self.simulation.after(
            way_s, lambda: host.holder.lease(self.core.gateway_id, seen_version=seen, wait_s=wait_s, answer=answer)
        )

    def leased(self, node: str, sent_s: float, lease: RouteLease) -> None:
        if self.wished_s.get(node) != sent_s:
            return  # It was given up, and another wish is on its way.
        self._apply(self.core.lease(node, lease, sent_s=sent_s, now_s=self.simulation.now_s))
        self.seen[node] = max(lease.version, self.seen.get(node, -1))
        self._wish(node)

    def _renew_overdue(self) -> None:
        limit_s = self.settings.lease_wait_s + self.settings.lease_timeout_s
        for node, sent_s in list(self.wished_s.items()):
            if self.simulation.now_s - sent_s > limit_s:
                self._wish(node)


def _arrive(gateway: Any, payload: tuple[Ask, str, float | None]) -> None:
    gateway.arrive(*payload)


def _tick(gateway: Any, due_s: float) -> None:
    gateway.tick(due_s)


def _leased(gateway: Any, payload: tuple[str, float, RouteLease]) -> None:
    gateway.leased(*payload)


def _unreachable(gateway: Any, trip: _Trip) -> None:
    trip.bounced("unreachable")


def _read(gateway: Any, stored: Stored) -> None:
    gateway.read(stored)


def gateway(
    simulation: Simulation, name: str, nodes: Mapping[str, Node], settings: GatewaySettings
) -> SimulatedGateway:
    """A gateway that has started."""
    made = SimulatedGateway(
        name=name,
        filters=(prefix_of("placement"), prefix_of(f"{NODE_WRITER}.*")),
        receive=_read,
        simulation=simulation,
        nodes=nodes,
        settings=settings,
    )
    simulation.join(made)
    made.start()
    return made

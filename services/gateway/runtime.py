"""Drives the core in real time: stamps inputs, carries out what it answers, and calls it when something is due."""

import asyncio
import time
from collections.abc import Callable, Iterable

from schemas.holders import RouteLease
from schemas.messages import Fact
from services.gateway.actions import Action, Bounce, Dispatch, Publish, Refuse
from services.gateway.core import Gateway
from services.gateway.routes import RouteTable
from services.gateway.settings import GatewaySettings
from services.gateway.signals import Signals


class Clock:
    """Unix seconds that never go back. They follow the boot clock, which also counts a suspended host's time."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def now_s(self) -> float:
        return self._offset_s + time.clock_gettime(time.CLOCK_BOOTTIME)


class Ticket:
    """One request's place in the core. `turn` waits until the core has decided."""

    __slots__ = ("_decided", "id", "traceparent")

    def __init__(self, ticket_id: str, *, traceparent: str) -> None:
        self.id = ticket_id
        self.traceparent = traceparent
        """Of its hold span, so that a wish for the model continues the trace of who wished."""
        self._decided: asyncio.Future[Dispatch | Refuse] = asyncio.get_running_loop().create_future()

    def decide(self, decision: Dispatch | Refuse) -> None:
        if self._decided.done():
            self._decided = asyncio.get_running_loop().create_future()
        self._decided.set_result(decision)

    @property
    def is_decided(self) -> bool:
        return self._decided.done()

    async def wait(self, timeout_s: float | None) -> bool:
        """Whether the decision is there, after at most `timeout_s`."""
        if not self._decided.done():
            await asyncio.wait((self._decided,), timeout=timeout_s)
        return self._decided.done()

    def take(self) -> Dispatch | Refuse:
        """The decision; the next `wait` is for the next one."""
        decision = self._decided.result()
        self._decided = asyncio.get_running_loop().create_future()
        return decision


class Runtime:
    """The core and everything around it that is not HTTP. All methods run on the loop's thread."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        gateway_id: str,
        signals: Signals,
        clock: Callable[[], float],
        on_nodes_changed: Callable[[dict[str, str]], None] = lambda _: None,
    ) -> None:
        self.now_s = clock
        self.core = Gateway(settings, gateway_id=gateway_id, now_s=clock())
        self.signals = signals
        self.on_nodes_changed = on_nodes_changed
        self.tickets: dict[str, Ticket] = {}
        self._nodes: dict[str, str] = {}
        self._ticket_count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s: float | None = None

    # --- Requests -----------------------------------------------------------------------------------------------------

    def arrive(self, *, tenant: str, model: str, body_bytes: int, patience_s: float | None, traceparent: str) -> Ticket:
        self._ticket_count += 1
        ticket = Ticket(str(self._ticket_count), traceparent=traceparent)
        self.tickets[ticket.id] = ticket
        self._apply(
            self.core.arrive(
                ticket.id,
                tenant=tenant,
                model=model,
                body_bytes=body_bytes,
                patience_s=patience_s,
                now_s=self.now_s(),
            )
        )
        return ticket

    def first_byte(self, ticket: Ticket) -> None:
        self._apply(self.core.first_byte(ticket.id, now_s=self.now_s()))

    def bounced(self, ticket: Ticket, replica_id: str, why: Bounce) -> None:
        self._apply(self.core.bounced(ticket.id, replica_id, why, now_s=self.now_s()))

    def finished(self, ticket: Ticket) -> None:
        """Call it exactly once per ticket, whatever happened."""
        del self.tickets[ticket.id]
        self._apply(self.core.finished(ticket.id, now_s=self.now_s()))

    # --- News ---------------------------------------------------------------------------------------------------------

    def fact(self, fact: Fact) -> None:
        self._apply(self.core.fact(fact, now_s=self.now_s()))
        self._look_at_nodes()

    def replace_routes(self, routes: RouteTable) -> None:
        self._apply(self.core.replace_routes(routes, now_s=self.now_s()))
        self._look_at_nodes()

    def lease(self, node: str, lease: RouteLease, *, sent_s: float) -> None:
        self._apply(self.core.lease(node, lease, sent_s=sent_s, now_s=self.now_s()))

    async def reconnected(self) -> None:
        self._apply(self.core.reconnected(now_s=self.now_s()))

    def start(self) -> None:
        """Begin to act on time: samples, repeats, deadlines."""
        self._schedule()

    def refuse_waiting(self) -> None:
        """The gateway is about to stop."""
        self._apply(self.core.stop(now_s=self.now_s()))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- Inside -------------------------------------------------------------------------------------------------------

    def _apply(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Publish():
                    self.signals.offer(action.signal, self._traceparent_of(action.request_id))
                case Dispatch() | Refuse():
                    ticket = self.tickets.get(action.request_id)
                    if ticket is not None:
                        ticket.decide(action)
        self._schedule()

    def _traceparent_of(self, ticket_id: str) -> Callable[[], str]:
        """Read when the signal leaves: the hold span begins just after the core decided to hold."""
        ticket = self.tickets.get(ticket_id)
        return lambda: "" if ticket is None else ticket.traceparent

    def _schedule(self) -> None:
        due_s = self.core.next_due_s()
        if due_s is None or (self._timer is not None and self._timer_due_s is not None and self._timer_due_s <= due_s):
            # A timer that comes too early finds nothing due and sets the next one.
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due_s = due_s
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due_s - self.now_s()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._apply(self.core.tick(now_s=self.now_s()))

    def _look_at_nodes(self) -> None:
        nodes = self.core.routes.holder_urls
        if nodes != self._nodes:
            self._nodes = dict(nodes)
            self.on_nodes_changed(self._nodes)

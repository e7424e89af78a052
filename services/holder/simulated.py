"""A holder's route table in virtual time: the real table, callbacks where the shell waits; for the simulator only."""

from collections.abc import Callable
from typing import Final, Protocol

from schemas.holders import RouteLease
from services.holder.core import Closing, RouteTable

WAIT_PER_TERM_MAX: Final = 0.5
"""As `routes.py` has it."""


class Clock(Protocol):
    """What it needs of the simulation."""

    @property
    def now_s(self) -> float: ...

    def after(self, delay_s: float, action: Callable[[], None]) -> None: ...


class SimulatedRoutes:
    """Grants route leases and closes routes as `services.holder.routes` does."""

    def __init__(self, clock: Clock, *, term_s: float) -> None:
        self._clock = clock
        self.table = RouteTable(term_s=term_s, born_version=0, born_at_s=clock.now_s - 10 * term_s)
        self._polls: list[tuple[str, float, Callable[[RouteLease], None]]] = []
        self._closings: list[tuple[Closing, Callable[[str], None]]] = []

    def open(self, replica_id: str, endpoint: str) -> None:
        self.table.open(replica_id, endpoint=endpoint)
        self._changed()

    def forget(self, replica_id: str) -> None:
        self.table.forget(replica_id)
        self._changed()

    def close(self, replica_id: str, then: Callable[[str], None]) -> None:
        """Call `then` with ``closed`` when no gateway may route there any more, or ``reopened``."""
        closing = Closing(replica_id=replica_id, version=self.table.close(replica_id))
        self._closings.append((closing, then))
        self._changed()

    def close_soon(self, replica_id: str) -> None:
        """Its engine is dead: tell the gateways, wait for nobody."""
        if replica_id in self.table.routes:
            self.table.close(replica_id)
            self._changed()

    def lease(self, gateway: str, *, seen_version: int, wait_s: float, answer: Callable[[RouteLease], None]) -> None:
        """Answer at once when the gateway is behind, else at the next change or after `wait_s`."""
        wished_at_s = self._clock.now_s
        is_up_to_date = self.table.acknowledge(gateway, seen_version=seen_version)
        self._look_at_closings()
        if not is_up_to_date:
            answer(self.table.grant(gateway, wished_at_s=wished_at_s, now_s=wished_at_s))
            return
        poll = (gateway, wished_at_s, answer)
        self._polls.append(poll)
        self._clock.after(min(wait_s, self.table.term_s * WAIT_PER_TERM_MAX), lambda: self._answer(poll))

    def _answer(self, poll: tuple[str, float, Callable[[RouteLease], None]]) -> None:
        if poll in self._polls:
            self._polls.remove(poll)
            gateway, wished_at_s, answer = poll
            answer(self.table.grant(gateway, wished_at_s=wished_at_s, now_s=self._clock.now_s))

    def _changed(self) -> None:
        for poll in list(self._polls):
            self._answer(poll)
        self._look_at_closings()

    def _look_at_closings(self) -> None:
        for item in list(self._closings):
            if item not in self._closings:
                continue  # Ended by what an earlier one led to.
            closing, then = item
            if closing.is_overtaken(self.table):
                self._closings.remove(item)
                then("reopened")
                continue
            look_s = closing.next_look_s(self.table, now_s=self._clock.now_s)
            if look_s is None:
                self._closings.remove(item)
                then("closed")
            else:
                self._clock.after(look_s - self._clock.now_s + 1e-6, self._look_at_closings)

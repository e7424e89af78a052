"""Waits for what `core.py` decides: long polls of gateways, and closes that need their word."""

import time
from collections.abc import Callable
from typing import Final

import anyio

from schemas.holders import RouteClosed, RouteLease, RouteLeaseWish
from services.holder.core import Closing, RouteTable
from services.holder.refusals import Refused

# A gateway that waits longer has too little of its term left to renew in.
_WAIT_PER_TERM_MAX: Final = 0.5


def boot_time_s() -> float:
    """A clock that also runs while the host is suspended, as leases must."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Routes:
    """The route table of this holder, and those who wait for it."""

    def __init__(self, *, term_s: float, born_version: int, clock: Callable[[], float] = boot_time_s) -> None:
        self.table = RouteTable(term_s=term_s, born_version=born_version, born_at_s=clock())
        self._clock = clock
        self._changed = anyio.Event()

    def open(self, replica_id: str, *, endpoint: str) -> None:
        self.table.open(replica_id, endpoint=endpoint)
        self._wake()

    def forget(self, replica_id: str) -> None:
        self.table.forget(replica_id)
        self._wake()

    def close_soon(self, replica_id: str) -> None:
        """Tell the gateways, and do not wait for them: its engine is dead. An unknown replica stays unknown."""
        if replica_id in self.table.routes:
            self.table.close(replica_id)
            self._wake()

    async def close(self, replica_id: str) -> RouteClosed:
        """Returns when no gateway may send a request there any more. Raises `Refused` when it is opened meanwhile."""
        began_at_s = self._clock()
        closing = Closing(replica_id=replica_id, version=self.table.close(replica_id))
        self._wake()
        while True:
            now_s = self._clock()
            if closing.is_overtaken(self.table):
                raise Refused(f"the route to {replica_id} was opened again before every gateway had stopped using it")
            next_look_s = closing.next_look_s(self.table, now_s=now_s)
            if next_look_s is None:
                return RouteClosed(waited_s=now_s - began_at_s, expired_count=closing.expired_count)
            with anyio.move_on_after(next_look_s - now_s):
                await self._changed.wait()

    async def close_all(self) -> None:
        """At the holder's own end: so that no request is under way to an engine that is about to stop."""
        async with anyio.create_task_group() as tasks:
            for replica_id in self.table.open_ids():
                tasks.start_soon(self.close, replica_id)

    async def lease(self, wish: RouteLeaseWish) -> RouteLease:
        """A lease on the current version: at once when that is news to the gateway, else at the next change."""
        wished_at_s = self._clock()
        if self.table.is_full(wish.gateway, now_s=wished_at_s):
            raise Refused("more gateways than the holder keeps leases for", status=503)
        is_up_to_date = self.table.acknowledge(wish.gateway, seen_version=wish.seen_version)
        self._wake()
        if is_up_to_date:
            with anyio.move_on_after(min(wish.wait_s, self.table.term_s * _WAIT_PER_TERM_MAX)):
                while self.table.version == wish.seen_version:
                    await self._changed.wait()
        return self.table.grant(wish.gateway, wished_at_s=wished_at_s, now_s=self._clock())

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

"""Sends signals to the bus without ever making a request wait for it."""

import asyncio
import logging
from collections.abc import Callable

from kit.bus import Bus, BusError
from schemas.catalogue import encode
from schemas.messages import Signal, signal_subject

log = logging.getLogger("gateway")


class Signals:
    """A bounded queue before the bus. What does not fit, or is not taken in time, is dropped and counted."""

    def __init__(self, bus: Bus, *, queue_max: int, timeout_s: float, clock: Callable[[], float]) -> None:
        self.dropped_count = 0
        self.sent_s: float | None = None
        """When the bus last took a signal; None when it never did."""
        self._bus = bus
        self._timeout_s = timeout_s
        self._clock = clock
        self._queue: asyncio.Queue[tuple[Signal, Callable[[], str]]] = asyncio.Queue(queue_max)

    def offer(self, signal: Signal, traceparent: Callable[[], str]) -> None:
        """Never waits. Without a connection a signal is dropped: later it would be an old one."""
        if self._queue.full() or not self._bus.is_connected:
            self.dropped_count += 1
            return
        self._queue.put_nowait((signal, traceparent))

    async def run(self) -> None:
        while True:
            signal, traceparent = await self._queue.get()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._bus.publish(signal_subject(signal), encode(signal), traceparent=traceparent())
                self.sent_s = self._clock()
            except (BusError, TimeoutError) as error:
                self.dropped_count += 1
                log.warning("signal dropped", extra={"reason": str(error) or "the bus did not take it in time"})

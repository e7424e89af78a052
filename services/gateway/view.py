"""Follows history and keeps the core's routes up to date. A gateway that loses the bus keeps what it has read."""

import asyncio
import contextlib
import logging
from typing import Final

from kit.bus import Bus, BusError, CaughtUp, Forbidden, HistoryGone, Stored, Stream
from kit.processor import CHAIN_START, chain_hash
from schemas.catalogue import UnknownVersion, UnreadableMessage, decode
from schemas.messages import NODE_WRITER, Fact, prefix_of
from services.gateway.routes import RouteTable
from services.gateway.runtime import Runtime

FILTERS: Final = (prefix_of("placement"), prefix_of(f"{NODE_WRITER}.*"))
"""Whole prefixes, although some facts in them change nothing here: only then can the chains be checked."""
RETRY_S: Final = 0.5
GONE_RETRY_S: Final = 5.0
"""Reading from the start is work for the server too; somebody must act first anyway."""

log = logging.getLogger("gateway")


class HistoryView:
    """One reader of history. `problem` says why its view is not fresh; empty when it is."""

    def __init__(self, bus: Bus, runtime: Runtime) -> None:
        self.problem = "history has not been read to its end yet"
        self.skipped_count = 0
        """Facts that could not be read or did not continue their writer's chain."""
        self.is_usable = False
        """True from the first complete read on, whatever happens to the bus later."""
        self._bus = bus
        self._runtime = runtime
        self._restart()

    async def run(self) -> None:
        """Until cancelled. An unknown version ends the reading: guessing would be worse than standing still."""
        while True:
            pause_s = RETRY_S
            try:
                await self._follow()
            except UnknownVersion as error:
                self.problem = str(error)
                log.error("history holds a message of a newer version", extra={"tag": error.tag})
                return
            except HistoryGone as error:
                self.problem = f"history was trimmed or replaced ({error}); reseed this gateway by restarting it"
                self._restart()
                pause_s = GONE_RETRY_S
            except Forbidden as error:
                self.problem, pause_s = f"may not read history: {error}", GONE_RETRY_S
            except BusError as error:
                self.problem = f"cannot read history: {error}"
            log.warning("reading of history stopped", extra={"problem": self.problem})
            await asyncio.sleep(pause_s)

    def _restart(self) -> None:
        """Read from the start, into a table of its own, beside the one in use."""
        self._seq = 0
        self._stream_id = ""
        self._hashes: dict[str, str] = {}
        self._fresh: RouteTable | None = RouteTable()

    async def _follow(self) -> None:
        reading = self._bus.read(Stream.HISTORY, FILTERS, after_seq=self._seq, stream_id=self._stream_id)
        async with contextlib.aclosing(reading):
            async for item in reading:
                if isinstance(item, CaughtUp):
                    self._caught_up(item)
                    continue
                fact = self._accept(item)
                if fact is not None and self._fresh is not None:
                    self._fresh.fold(fact)
                elif fact is not None:
                    self._runtime.fact(fact)
                self._seq = item.seq

    def _caught_up(self, item: CaughtUp) -> None:
        self._stream_id = item.stream_id or self._stream_id
        if self._fresh is not None:
            self._runtime.replace_routes(self._fresh)
            self._fresh = None
        self.problem, self.is_usable = "", True

    def _accept(self, stored: Stored) -> Fact | None:
        """The fact, unless it is unreadable or does not continue its writer's chain (a writer that was superseded)."""
        tokens = stored.subject.split(".")
        writer = ".".join(tokens[2:4]) if tokens[2] == NODE_WRITER else tokens[2]
        if self._hashes.get(writer, CHAIN_START) != stored.previous_hash:
            self.skipped_count += 1
            return None
        self._hashes[writer] = chain_hash(stored.previous_hash, id=stored.id, subject=stored.subject, body=stored.body)
        try:
            fact = decode(stored.body)
        except UnreadableMessage:
            self.skipped_count += 1
            return None
        return fact if isinstance(fact, Fact) else None

"""Follows history and keeps the core's routes up to date. A gateway that loses the bus keeps what it has read."""

import asyncio
import contextlib
import logging
from typing import Final

from kit.bus import Bus, BusError, CaughtUp, Forbidden, HistoryGone, Stored, Stream
from kit.processor import CHAIN_START, chain_hash, writer_of
from kit.snapshots import Snapshot
from schemas.catalogue import UnknownVersion, UnreadableMessage, decode
from schemas.messages import NODE_WRITER, Fact
from services.gateway.routes import RouteTable
from services.gateway.runtime import Runtime
from services.gateway.snapshots import newest

FOLLOWED: Final = ("placement", NODE_WRITER)
"""Whole prefixes, although some facts in them change nothing here: only then can the chains be checked."""
FILTERS: Final = ("sublet.fact.>",)
"""The others' few facts are dropped: with several filters the server delivers at a third of the rate."""
RETRY_S: Final = 0.5
GONE_RETRY_S: Final = 5.0
"""Reading from the start is work for the server too; somebody must act first anyway."""

log = logging.getLogger("gateway")


class ChainedTable:
    """A table of routes, the chains of those whose facts it folds, and how far it has come."""

    def __init__(self) -> None:
        self.routes = RouteTable()
        self.hashes: dict[str, str] = {}
        self.seq = 0
        self.skipped_count = 0
        """Facts that could not be read or did not continue their writer's chain."""

    def begin(self, snapshot: Snapshot, routes: RouteTable) -> None:
        self.routes = routes
        self.hashes = dict(snapshot.foreign_hashes)
        self.seq = snapshot.position.read_seq

    def fold(self, stored: Stored) -> None:
        fact = self.accept(stored)
        if fact is not None:
            self.routes.fold(fact)

    def accept(self, stored: Stored) -> Fact | None:
        """The fact, unless it is unreadable or does not continue its writer's chain (a writer that was superseded)."""
        self.seq = stored.seq
        writer = writer_of(stored.subject)
        if writer.partition(".")[0] not in FOLLOWED:
            return None
        if self.hashes.get(writer, CHAIN_START) != stored.previous_hash:
            self.skipped_count += 1
            return None
        self.hashes[writer] = chain_hash(stored.previous_hash, id=stored.id, subject=stored.subject, body=stored.body)
        try:
            fact = decode(stored.body)
        except UnreadableMessage:
            self.skipped_count += 1
            return None
        return fact if isinstance(fact, Fact) else None


class HistoryView:
    """One reader of history. `problem` says why its view is not fresh; empty when it is."""

    def __init__(self, bus: Bus, runtime: Runtime) -> None:
        self.problem = "history has not been read to its end yet"
        self.is_usable = False
        """True from the first complete read on, whatever happens to the bus later."""
        self._bus = bus
        self._runtime = runtime
        self._is_refolding = False
        """The kept snapshot did not fit: begin at the start of history."""
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
                # Once more without the snapshot: it may be of another stream than the one that is there now.
                self._is_refolding = not self._is_in_use and self._read.seq > 0
                self.problem = f"history was trimmed or replaced ({error}); reseed this gateway by restarting it"
                self._restart()
                pause_s = GONE_RETRY_S
            except Forbidden as error:
                self.problem, pause_s = f"may not read history: {error}", GONE_RETRY_S
            except BusError as error:
                self.problem = f"cannot read history: {error}"
            log.warning("reading of history stopped", extra={"problem": self.problem})
            await asyncio.sleep(pause_s)

    @property
    def skipped_count(self) -> int:
        return self._read.skipped_count

    def _restart(self) -> None:
        """Read from the start, into a table of its own, beside the one in use."""
        self._stream_id = ""
        self._read = ChainedTable()
        self._is_in_use = False

    async def _begin(self) -> None:
        """From what was kept when the start of history was trimmed, if it was."""
        try:
            found = await newest(self._bus)
        except BusError as error:
            log.warning("no snapshot can be read", extra={"reason": str(error)})
            return
        if found is not None:
            self._read.begin(*found)
            self._stream_id = found[0].position.stream_id

    async def _follow(self) -> None:
        if not self._is_in_use and not self._read.seq and not self._is_refolding:
            await self._begin()
        reading = self._bus.read(Stream.HISTORY, FILTERS, after_seq=self._read.seq, stream_id=self._stream_id)
        async with contextlib.aclosing(reading):
            async for item in reading:
                if isinstance(item, CaughtUp):
                    self._caught_up(item)
                    continue
                fact = self._read.accept(item)
                if fact is not None and self._is_in_use:
                    self._runtime.fact(fact)
                elif fact is not None:
                    self._read.routes.fold(fact)

    def _caught_up(self, item: CaughtUp) -> None:
        self._stream_id = item.stream_id or self._stream_id
        if not self._is_in_use:
            self._runtime.replace_routes(self._read.routes)
            self._is_in_use = True
        self.problem, self.is_usable = "", True

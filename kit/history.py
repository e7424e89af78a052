"""Appending with certainty: the same bytes are sent again until it is known whether they are in history."""

from collections.abc import Sequence

import anyio

from kit.bus import AppendConflict, AppendUnknown, Bus, BusError, Entry, Stored
from kit.errors import Superseded

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
"""Doubling from 50 ms to 2 s spans the 4-10 s that a three-node cluster needs for a new leader."""


async def append_surely(bus: Bus, prefix: str, entries: Sequence[Entry], *, last_seq: int) -> int:
    """Store the entries and give the sequence of the last one, however often the server must be asked.

    A conflict is ours when the prefix's newest message bears our last id: an ack was lost. Otherwise another instance
    writes here, and `Superseded` is raised. `AppendRefused` (a full stream, say) passes through.
    """
    backoff_s = BACKOFF_FIRST_S
    while True:
        try:
            return (await bus.append(prefix, entries, last_seq=last_seq)).last_seq
        except AppendUnknown:
            await anyio.sleep(backoff_s)
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
        except AppendConflict:
            newest = await last_surely(bus, prefix)
            if newest is not None and newest.id == entries[-1].id:
                return newest.seq
            raise Superseded(f"another instance appended under {prefix}") from None


async def last_surely(bus: Bus, prefix: str) -> Stored | None:
    """The prefix's newest message, however often the server must be asked."""
    backoff_s = BACKOFF_FIRST_S
    while True:
        try:
            return await bus.last(prefix)
        except BusError:
            await anyio.sleep(backoff_s)
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)

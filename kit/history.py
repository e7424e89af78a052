"""Appending with certainty: the same bytes are sent again until it is known whether they are in history."""

import random
from collections.abc import Sequence
from typing import Final

import anyio

from kit.bus import AppendConflict, AppendFull, AppendUnknown, Bus, BusError, Entry, Stored
from kit.errors import Superseded
from kit.status import Hold, told_to_nobody

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 0.25
"""What an append may lose after a new leader is there: a three-node cluster takes 4-9 s to choose one, and a refusal in
between costs it nothing."""
FULL_RETRY_S: Final = 1.0
"""Between two looks whether there is room again."""
HOLD_AFTER_S: Final = 10.0
"""No answer for longer is told as a problem; a new leader is there before."""
PLACE: Final = "history"
REMEDY: Final = "is the NATS server up and its disk not full? One whose disk was full must be restarted"


async def append_surely(
    bus: Bus, prefix: str, entries: Sequence[Entry], *, last_seq: int, hold: Hold = told_to_nobody
) -> int:
    """Store the entries and give the sequence of the last one, however often the server must be asked.

    A conflict is ours when the prefix's newest message bears our last id: an ack was lost. Otherwise another instance
    writes here, and `Superseded` is raised. While there is no room, or no answer, it waits, and `hold` is told why.
    `AppendRefused` for any other reason passes through.

    A server whose store becomes full within a batch keeps its first part (seen with 2.15.1): the rest is sent then.
    """
    began_s = anyio.current_time()
    backoff_s = BACKOFF_FIRST_S
    try:
        while True:
            try:
                return (await bus.append(prefix, entries, last_seq=last_seq)).last_seq
            except AppendFull as error:
                hold(PLACE, str(error))
                await anyio.sleep(FULL_RETRY_S)
            except AppendUnknown as error:
                waited_s = anyio.current_time() - began_s
                if waited_s > HOLD_AFTER_S:
                    hold(PLACE, f"history cannot be written for {waited_s:.0f} s: {error}; {REMEDY}")
                await _pause(backoff_s)
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
            except AppendConflict:
                newest = await last_surely(bus, prefix)
                place = next((n for n, entry in enumerate(entries) if newest and entry.id == newest.id), None)
                if newest is None or place is None:
                    raise Superseded(f"another instance appended under {prefix}") from None
                if place == len(entries) - 1:
                    return newest.seq
                entries, last_seq = entries[place + 1 :], newest.seq
    finally:
        hold(PLACE, "")


async def last_surely(bus: Bus, prefix: str) -> Stored | None:
    """The prefix's newest message, however often the server must be asked."""
    backoff_s = BACKOFF_FIRST_S
    while True:
        try:
            return await bus.last(prefix)
        except BusError:
            await _pause(backoff_s)
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)


async def _pause(backoff_s: float) -> None:
    """Not all writers at once."""
    await anyio.sleep(backoff_s * random.uniform(0.5, 1.0))

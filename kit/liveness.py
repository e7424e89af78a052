"""Which of two instances of a writer is active. For liveness only: safety comes from the stream."""

from typing import Final

import anyio

from kit.bus import Bus, BusError

LEASE_TERM_S: Final = 2.0


class ActiveLease:
    """One instance's wish to be the active one."""

    def __init__(self, bus: Bus, writer: str, instance: str) -> None:
        self._bus = bus
        self._writer = writer
        self._instance = instance

    async def take(self) -> str:
        """One attempt: '' when this instance is active, else why not."""
        try:
            if await self._bus.acquire_lease(self._writer, self._instance, term_s=LEASE_TERM_S):
                return ""
        except BusError as error:
            return f"waiting for the bus: {error}"
        return "standing by: another instance is active"

    async def keep(self) -> None:
        """Renew it for ever. Losing it changes nothing until another instance really appends."""
        while True:
            await anyio.sleep(LEASE_TERM_S / 3)
            try:
                await self._bus.acquire_lease(self._writer, self._instance, term_s=LEASE_TERM_S)
            except BusError:
                continue

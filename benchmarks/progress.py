"""Progress on stderr: one line that changes on a terminal, a line now and then anywhere else."""

import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TextIO

import anyio

TERMINAL_EVERY_S: Final = 0.5
PIPE_EVERY_S: Final = 5.0
ERASE_LINE: Final = "\r\x1b[2K"


class Progress:
    """Says how far a run is. The same text twice in a row is written once."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._began_s = time.monotonic()
        self._last = ""

    def say(self, text: str) -> None:
        """A line that stays."""
        start = ERASE_LINE if self._is_terminal else ""
        print(f"{start}{self._stamped(text)}", file=self._stream, flush=True)
        self._last = text

    @asynccontextmanager
    async def showing(self, text: Callable[[], str]) -> AsyncIterator[None]:
        """While the block runs, and once at its end. An exception of the block stays what it is."""
        failure: Exception | None = None
        async with anyio.create_task_group() as tg:
            tg.start_soon(self._show, text)
            try:
                yield
            except Exception as error:  # noqa: BLE001  (raised again below; the task group would wrap it)
                failure = error
            tg.cancel_scope.cancel()
        if failure is not None:
            raise failure
        self.say(text())

    async def _show(self, text: Callable[[], str]) -> None:
        while True:
            if self._is_terminal:
                print(f"{ERASE_LINE}{self._stamped(text())}", end="", file=self._stream, flush=True)
            elif text() != self._last:
                self.say(text())
            await anyio.sleep(TERMINAL_EVERY_S if self._is_terminal else PIPE_EVERY_S)

    def _stamped(self, text: str) -> str:
        return f"{time.monotonic() - self._began_s:6.1f} s  {text}"

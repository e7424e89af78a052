"""An asyncio loop in which waiting takes no time: when nothing is ready, the clock jumps to what is due next.

The real shell runs in it unchanged. While a worker thread is busy (a journal's write) the clock stands still.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits for a time to come: it moves the clock there instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.limiter: anyio.CapacityLimiter | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if self.limiter is not None and self.limiter.borrowed_tokens:
            return super().select(10)
        assert timeout is not None, "everything waits and nothing will ever happen"
        self.now_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def watch_threads(self) -> None:
        """Call it inside the running loop."""
        self._jumping.limiter = anyio.to_thread.current_default_thread_limiter()


def run(story: Callable[[], Awaitable[T]]) -> T:
    """Run to its end in virtual time."""

    async def watched() -> T:
        loop: Any = asyncio.get_running_loop()
        loop.watch_threads()
        return await story()

    return anyio.run(watched, backend="asyncio", backend_options={"loop_factory": VirtualLoop})

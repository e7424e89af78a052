"""One engine's changes of size come one after the other, and only the newest counts."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import anyio

from services.nodeagent.inputs import EngineEffect

T = TypeVar("T")


@dataclass(slots=True)
class _Lane:
    resize_epoch: int = -1
    turn: anyio.Lock = field(default_factory=anyio.Lock)
    scope: anyio.CancelScope | None = None
    """Of the newest change that has not ended."""


class Lanes:
    """The newest change of an engine ends those before it; whatever else is done to the engine ends them all."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, int], _Lane] = {}

    async def run(self, effect: EngineEffect, resize_epoch: int, work: Callable[[], Awaitable[T]]) -> T | None:
        """What it gives; None when a newer one came, before or meanwhile."""
        lane = self._lanes.setdefault((effect.replica.replica_id, effect.lease_epoch), _Lane())
        if resize_epoch < lane.resize_epoch:
            return None
        lane.resize_epoch = resize_epoch
        if lane.scope is not None:
            lane.scope.cancel()
        result: T | None = None
        with anyio.CancelScope() as scope:
            lane.scope = scope
            async with lane.turn:
                result = await work()
        if lane.scope is scope:
            lane.scope = None
        return None if scope.cancelled_caught else result

    async def quiet(self, effect: EngineEffect) -> None:
        """Ends what is under way, and waits for that."""
        lane = self._lanes.pop((effect.replica.replica_id, effect.lease_epoch), None)
        if lane is not None:
            if lane.scope is not None:
                lane.scope.cancel()
            async with lane.turn:
                return

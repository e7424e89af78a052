"""Every effect of the node agent, and who carries it out."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import anyio

from devices.api import DeviceError
from kit.outcomes import Effect, Input
from services.nodeagent.effects.adopting import adopt
from services.nodeagent.effects.ending import lost, stop
from services.nodeagent.effects.hands import HOLDER_RETRY_S, Gone, Hands, log
from services.nodeagent.effects.looking import look
from services.nodeagent.effects.parking import park
from services.nodeagent.effects.probing import probe
from services.nodeagent.effects.resizing import evict, resize
from services.nodeagent.effects.starting import start
from services.nodeagent.effects.trying import try_gpu
from services.nodeagent.effects.waking import wake
from services.nodeagent.gpu_inputs import TryGpu
from services.nodeagent.guard import NotEnforced
from services.nodeagent.inputs import (
    AdoptEngine,
    EngineEffect,
    EvictEngine,
    GiveGrace,
    LookAtEngine,
    ParkEngine,
    ProbeNode,
    ResizeEngine,
    StartEngine,
    StopEngine,
    WakeEngine,
    hung,
)
from services.nodeagent.runtimes.api import RuntimeProblem

Work = Callable[[Hands, Any, str], Awaitable[Input | None]]
"""Called with the hands, the effect and the trace that it belongs to. May raise `RuntimeProblem`, or `Gone`."""


async def _give_grace(hands: Hands, effect: GiveGrace, traceparent: str) -> Input:
    await anyio.sleep(effect.grace_s)
    return hung(effect)


WORK: Final[Mapping[type[Effect], Work]] = {
    ProbeNode: probe,
    StartEngine: start,
    ParkEngine: park,
    WakeEngine: wake,
    StopEngine: stop,
    AdoptEngine: adopt,
    TryGpu: try_gpu,
    LookAtEngine: look,
    GiveGrace: _give_grace,
    ResizeEngine: resize,
    EvictEngine: evict,
}


class NodeEffects:
    """One host's hands at work."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._at_work: dict[str, anyio.CancelScope] = {}
        """{replica_id: the scope of the effect that was begun last for it}"""

    async def perform(self, effect: Effect, traceparent: str) -> Input | None:
        """The result; None when a newer effect took its place."""
        if not isinstance(effect, EngineEffect):
            return await self._carried_out(effect, traceparent)
        replica_id, older = effect.replica.replica_id, self._at_work.get(effect.replica.replica_id)
        if older is not None and isinstance(effect, LookAtEngine | StopEngine):
            older.cancel()  # It hangs, or no longer matters; what it does later would be behind the newer one's back.
        with anyio.CancelScope() as scope:
            self._at_work[replica_id] = scope
            try:
                return await self._carried_out(effect, traceparent)
            finally:
                if self._at_work.get(replica_id) is scope:
                    del self._at_work[replica_id]
        return None

    async def _carried_out(self, effect: Effect, traceparent: str) -> Input | None:
        """The result; an engine that is gone is a result too. Waits for the holder as long as it is away."""
        if isinstance(effect, EngineEffect) and not isinstance(effect, ResizeEngine | AdoptEngine):
            await self._hands.lanes.quiet(effect)
        lost_because: str | None = None
        while True:
            try:
                if lost_because is not None:
                    assert isinstance(effect, EngineEffect), effect
                    return await lost(self._hands, effect, lost_because)
                return await WORK[type(effect)](self._hands, effect, traceparent)
            except RuntimeProblem as problem:
                log.warning("holder problem", extra={"reason": str(problem), "effect": type(effect).__name__})
                await anyio.sleep(HOLDER_RETRY_S)
            except (NotEnforced, DeviceError) as problem:
                # What a step can do about it, it has done. Nothing may stay as nobody knows it: an engine is ended; its
                # end, and what concerns no engine, is tried again.
                log.warning("driver problem", extra={"reason": str(problem), "effect": type(effect).__name__})
                if lost_because is None and isinstance(effect, StartEngine | ParkEngine | WakeEngine):
                    lost_because = str(problem)
                else:
                    await anyio.sleep(HOLDER_RETRY_S)
            except Gone as gone:
                lost_because = str(gone)

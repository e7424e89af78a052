"""Wakes: the limit first, then the restore, then one token, then its route."""

import time

from kit.outcomes import Input
from schemas.holders import EngineView
from services.nodeagent.effects.hands import Gone, Hands, requests
from services.nodeagent.effects.parking import proven_residues
from services.nodeagent.engine_client import EngineProblem
from services.nodeagent.inputs import EngineNotWoken, EngineWoken, WakeEngine


async def wake(hands: Hands, effect: WakeEngine, traceparent: str) -> Input:
    engine = await hands.running(effect)
    endpoint = hands.endpoint(engine)
    replica_id = effect.replica.replica_id
    began_s = time.monotonic()
    await hands.limit(effect.replica, engine, requests(effect.replica))
    with hands.tracer.span("restore", parent=traceparent) as span:
        try:
            woke = await hands.engines.wake(endpoint, timeout_s=hands.settings.wake_deadline_s)
        except EngineProblem as error:
            return await _rolled_back(hands, effect, engine, error)
        span.set("sublet.copied_bytes", woke.copied_bytes)
    restored_s = time.monotonic()
    with hands.tracer.span("verify", parent=traceparent):
        await hands.verify(effect, endpoint)
    await hands.holder.open_route(replica_id, endpoint)
    return EngineWoken(
        replica_id=replica_id,
        lease_epoch=effect.lease_epoch,
        endpoint=endpoint,
        copied_bytes=woke.copied_bytes,
        restore_s=restored_s - began_s,
        verify_s=time.monotonic() - restored_s,
    )


async def _rolled_back(hands: Hands, effect: WakeEngine, engine: EngineView, error: EngineProblem) -> Input:
    """A wake that the engine could not do: parked as before if it says so, else lost."""
    try:
        state = await hands.engines.state(hands.endpoint(engine))
    except EngineProblem:
        raise Gone(str(error)) from error
    if state.state != "asleep":
        raise Gone(f"{error}; it is {state.state} now") from error
    await hands.limit(effect.replica, engine, await proven_residues(hands, effect, engine))
    return EngineNotWoken(
        replica_id=effect.replica.replica_id,
        lease_epoch=effect.lease_epoch,
        reason=str(error),
        short_by_bytes=error.short_by_bytes,
    )

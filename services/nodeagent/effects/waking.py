"""Wakes: the limit first, then the restore, then one token, then its route."""

import time
from typing import Final

import anyio

from kit.outcomes import Input
from schemas.holders import EngineView
from services.nodeagent.effects.ending import watch
from services.nodeagent.effects.hands import Gone, Hands, requests
from services.nodeagent.effects.parking import confine, proven_residues
from services.nodeagent.guard import NotEnforced
from services.nodeagent.inputs import EngineEffect, EngineNotWoken, EngineWoken, WakeEngine
from services.nodeagent.mover.driver import Broken, Driver, StillParked, SwapTarget, Woken

AGAIN_S: Final = 0.05
"""Before a failed wake is tried once more: as long as the driver may take to give back what another has let go."""


async def wake(hands: Hands, effect: WakeEngine, traceparent: str) -> Input:
    engine = await hands.running(effect)
    watch(hands, effect)  # An agent that returned within a wake has adopted nothing.
    endpoint = hands.endpoint(engine)
    replica_id = effect.replica.replica_id
    began_s = time.monotonic()
    driver = hands.mover.by(effect.swap_driver)
    with hands.tracer.span(f"wake by {driver.name}", parent=traceparent) as span:
        try:
            woken = await restored(hands, effect, engine)
        except StillParked as error:
            return await _rolled_back(hands, effect, engine, error)
        span.set("sublet.copied_bytes", woken.copied_bytes)
    restored_s = time.monotonic()
    with hands.tracer.span("verify", parent=traceparent):
        await hands.verify_return(effect, endpoint)
    await hands.holder.open_route(replica_id, endpoint)
    return EngineWoken(
        replica_id=replica_id,
        lease_epoch=effect.lease_epoch,
        endpoint=endpoint,
        copied_bytes=woken.copied_bytes,
        restore_s=restored_s - began_s,
        verify_s=time.monotonic() - restored_s,
        swap_driver=driver.name,
        map_s=woken.map_s,
        copy_s=woken.copy_s,
    )


async def restored(hands: Hands, effect: EngineEffect, engine: EngineView) -> Woken:
    """Allowed its share again, and back in it. Raises `StillParked`, or `Gone`."""
    driver, target = hands.mover.by(effect.swap_driver), hands.target(effect, engine)
    try:
        await hands.limit_in_time(effect.replica, engine, requests(effect.replica))
    except NotEnforced as error:
        raise StillParked(str(error)) from error
    try:
        return await _twice_at_most(driver, target)
    except Broken as error:
        raise Gone(str(error)) from error


async def _twice_at_most(driver: Driver, target: SwapTarget) -> Woken:
    try:
        return await driver.wake(target)
    except StillParked:
        if not driver.is_wake_repeatable:
            raise
    await anyio.sleep(AGAIN_S)
    return await driver.wake(target)


async def _rolled_back(hands: Hands, effect: WakeEngine, engine: EngineView, error: StillParked) -> Input:
    """Parked as before, which is proven again: what failed half-way may have left something."""
    await confine(hands, effect, engine, await proven_residues(hands, effect, engine))
    return EngineNotWoken(
        replica_id=effect.replica.replica_id,
        lease_epoch=effect.lease_epoch,
        reason=str(error),
        short_by_bytes=error.short_by_bytes,
    )

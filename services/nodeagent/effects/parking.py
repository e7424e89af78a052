"""Parks: no request is lost, and nobody gets the bytes before the driver says that they are free."""

import time
from collections.abc import Sequence
from typing import Final

import anyio

from kit.outcomes import Input
from schemas.deployments import SwapDriver
from schemas.holders import EngineView
from schemas.nodes import ParkTier
from schemas.units import MiB
from services.nodeagent.effects.ending import end, unwatch, watch
from services.nodeagent.effects.hands import Gone, Hands
from services.nodeagent.effects.resizing import is_beyond_request, live_in_request
from services.nodeagent.engine_client import EngineProblem
from services.nodeagent.guard import NotEnforced
from services.nodeagent.inputs import EngineEffect, EngineParked, EngineStayed, ParkEngine
from services.nodeagent.mover.driver import Broken, Parked, StillResident

FREED_POLL_S: Final = 0.01
FREED_DEADLINE_S: Final = 5.0
"""The driver's account follows an unmap within milliseconds; longer means that the bytes are not free."""
RESIDUE_SLACK_BYTES: Final = 64 * MiB
"""Between an engine's own account and the driver's: both count the context, the driver its rounding too."""


async def park(hands: Hands, effect: ParkEngine, traceparent: str) -> Input:
    engine = await hands.running(effect)
    watch(hands, effect)  # An agent that returned within a park has adopted nothing.
    endpoint = hands.endpoint(engine)
    replica_id = effect.replica.replica_id
    began_s = time.monotonic()
    with hands.tracer.span("drain", parent=traceparent):
        await hands.holder.close_route(replica_id)
        is_idle = await hands.is_idle(effect, endpoint, timeout_s=effect.drain_s)
    if not is_idle:
        return await _stays(hands, effect, engine, f"still busy after {effect.drain_s:.0f} s")
    drained_s = time.monotonic()
    driver = hands.mover.by(effect.swap_driver)
    if driver.name is not SwapDriver.RESTART:
        await hands.note_proof(effect, endpoint)
    await live_in_request(hands, effect, engine)
    if driver.name is SwapDriver.CHECKPOINT and (problem := await is_beyond_request(hands, effect, engine)):
        return await _stays(hands, effect, engine, problem)
    with hands.tracer.span(f"park by {driver.name}", parent=traceparent):
        try:
            parked = await driver.park(hands.target(effect, engine))
        except StillResident as stays:
            return await _stays(hands, effect, engine, str(stays))
        except Broken as error:
            raise Gone(str(error)) from error
        residues = await settled(hands, effect, engine, parked)
    return EngineParked(
        replica_id=replica_id,
        lease_epoch=effect.lease_epoch,
        residues=residues,
        host_bytes=parked.host_bytes,
        copied_bytes=parked.copied_bytes,
        park_s=time.monotonic() - drained_s,
        drain_s=drained_s - began_s,
        reason=effect.reason,
        swap_driver=driver.name,
        tier=parked.tier,
    )


async def _stays(hands: Hands, effect: ParkEngine, engine: EngineView, reason: str) -> EngineStayed:
    await hands.holder.open_route(effect.replica.replica_id, hands.endpoint(engine))
    return EngineStayed(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason=reason)


async def settled(hands: Hands, effect: EngineEffect, engine: EngineView, parked: Parked) -> tuple[int, ...]:
    """What it keeps on each GPU, proven, and no more allowed; one whose weights are nowhere is ended."""
    if parked.tier is ParkTier.NOWHERE:
        unwatch(hands, effect)
        await end(hands, effect, engine)
        return (0,) * len(effect.replica.shares)
    residues = await proven_residues(hands, effect, engine)
    await confine(hands, effect, engine, residues)
    return residues


async def confine(hands: Hands, effect: EngineEffect, engine: EngineView, residues: Sequence[int]) -> None:
    """No more allowed than what is left. Raises `Gone` where that cannot be had: nothing may stay without a limit."""
    try:
        # No limit is as small as no bytes at all.
        await hands.limit_in_time(effect.replica, engine, [max(size, MiB) for size in residues])
    except NotEnforced as error:
        raise Gone(str(error)) from error


async def proven_residues(hands: Hands, effect: EngineEffect, engine: EngineView) -> tuple[int, ...]:
    """What the driver says is left on each of its GPUs, once that is no more than a parked engine may keep there.

    That is what its swap driver leaves, or else what the engine says it holds, which is one number for all its GPUs
    and is taken as spread evenly, or half of its share when it does not say. Raises `Gone` when more stays.
    """
    shares = effect.replica.shares
    left_bytes = hands.mover.by(effect.swap_driver).residue_bytes
    if left_bytes is not None:
        allowed = [left_bytes] * len(shares)
    else:
        allowed = await _told_residues(hands, effect, engine)
    used: list[int] = []
    used_bytes: int | None = None
    with anyio.move_on_after(FREED_DEADLINE_S):
        for share, most_bytes in zip(shares, allowed, strict=True):
            while True:
                used_bytes = await hands.guard.used_bytes(share.gpu_uuid, engine.namespace, engine.pid)
                if used_bytes is not None and used_bytes <= most_bytes:
                    used.append(used_bytes)
                    break
                await anyio.sleep(FREED_POLL_S)
        return tuple(used)
    raise Gone(f"its bytes on {shares[len(used)].gpu_uuid} are not proven free after its park ({used_bytes} used)")


async def _told_residues(hands: Hands, effect: EngineEffect, engine: EngineView) -> list[int]:
    shares = effect.replica.shares
    try:
        told_bytes = (
            await hands.engines.state(hands.endpoint(engine), effect.replica.deployment.engine.kind)
        ).held_bytes
    except EngineProblem as error:
        raise Gone(str(error)) from error
    if not told_bytes:
        return [share.request_bytes // 2 for share in shares]
    return [-(-told_bytes // len(shares)) + RESIDUE_SLACK_BYTES] * len(shares)

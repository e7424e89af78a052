"""Parks: no request is lost, and nobody gets the bytes before the driver says that they are free."""

import time
from typing import Final

import anyio

from kit.outcomes import Input
from schemas.holders import EngineView
from schemas.units import MiB
from services.nodeagent.effects.hands import Gone, Hands
from services.nodeagent.engine_client import EngineProblem
from services.nodeagent.inputs import EngineEffect, EngineParked, EngineStayed, ParkEngine

FREED_POLL_S: Final = 0.01
FREED_DEADLINE_S: Final = 5.0
"""The driver's account follows an unmap within milliseconds; longer means that the bytes are not free."""
RESIDUE_SLACK_BYTES: Final = 64 * MiB
"""Between an engine's own account and the driver's: both count the context, the driver its rounding too."""


async def park(hands: Hands, effect: ParkEngine, traceparent: str) -> Input:
    engine = await hands.running(effect)
    endpoint = hands.endpoint(engine)
    replica_id = effect.replica.replica_id
    began_s = time.monotonic()
    with hands.tracer.span("drain", parent=traceparent):
        await hands.holder.close_route(replica_id)
        is_idle = await hands.is_idle(effect, endpoint, timeout_s=effect.drain_s)
    if not is_idle:
        await hands.holder.open_route(replica_id, endpoint)
        reason = f"still busy after {effect.drain_s:.0f} s"
        return EngineStayed(replica_id=replica_id, lease_epoch=effect.lease_epoch, reason=reason)
    drained_s = time.monotonic()
    with hands.tracer.span("sleep", parent=traceparent):
        try:
            slept = await hands.engines.sleep(endpoint, timeout_s=hands.settings.wake_deadline_s)
        except EngineProblem as error:
            raise Gone(f"it did not go to sleep: {error}") from error
        residues = await proven_residues(hands, effect, engine)
    await hands.limit(effect.replica, engine, residues)
    return EngineParked(
        replica_id=replica_id,
        lease_epoch=effect.lease_epoch,
        residues=residues,
        host_bytes=effect.replica.deployment.engine.weights_bytes,
        copied_bytes=slept.copied_bytes,
        park_s=time.monotonic() - drained_s,
        drain_s=drained_s - began_s,
        reason=effect.reason,
    )


async def proven_residues(hands: Hands, effect: EngineEffect, engine: EngineView) -> tuple[int, ...]:
    """What the driver says is left on each of its GPUs, once that is no more than a parked engine may keep there.

    That is what the engine says it holds, which is one number for all its GPUs and is taken as spread evenly, or half
    of its share when it does not say. Raises `Gone` when more stays.
    """
    shares = effect.replica.shares
    try:
        told_bytes = (await hands.engines.state(hands.endpoint(engine))).held_bytes
    except EngineProblem as error:
        raise Gone(str(error)) from error
    used: list[int] = []
    used_bytes: int | None = None
    with anyio.move_on_after(FREED_DEADLINE_S):
        for share in shares:
            allowed_bytes = -(-told_bytes // len(shares)) + RESIDUE_SLACK_BYTES
            if not told_bytes:
                allowed_bytes = share.request_bytes // 2
            while True:
                used_bytes = await hands.guard.used_bytes(share.gpu_uuid, engine.namespace, engine.pid)
                if used_bytes is not None and used_bytes <= allowed_bytes:
                    used.append(max(used_bytes, MiB))
                    break
                await anyio.sleep(FREED_POLL_S)
        return tuple(used)
    raise Gone(f"its bytes on {shares[len(used)].gpu_uuid} are not proven free after its park ({used_bytes} used)")

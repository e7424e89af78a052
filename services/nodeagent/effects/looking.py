"""Looks at suspects: what runs is adopted where it can be, and nothing is ended before it has had its time."""

from typing import Final

from devices.api import DeviceError
from kit.outcomes import Input
from schemas.holders import EngineView
from schemas.placement import ReplicaProposal
from schemas.units import MiB
from services.nodeagent.effects.ending import lost, watch
from services.nodeagent.effects.hands import Gone, Hands
from services.nodeagent.effects.parking import proven_residues
from services.nodeagent.engine_client import EngineProblem
from services.nodeagent.guard import NotEnforced
from services.nodeagent.inputs import EngineFound, EngineLost, EngineUnexplained, LookAtEngine
from services.nodeagent.mover.driver import Broken, Standing, StillParked, StillResident
from services.nodeagent.transitions import Residency

SLEEP_DRAIN_S: Final = 5.0
"""For requests of an engine that should be parked and is awake; nobody was told to send it any."""
DOUBTS: Final = (Gone, EngineProblem, NotEnforced, DeviceError, Broken, StillParked, StillResident)


async def look(hands: Hands, effect: LookAtEngine, traceparent: str) -> Input:
    """Found well, gone, or neither; where it may be ended, not the last of these."""
    engine = await hands.running(effect)
    if effect.was is Residency.RELEASING:
        raise Gone("its release did not end in time")
    await hands.holder.close_route(effect.replica.replica_id)
    try:
        found = await _found(hands, effect, engine)
    except DOUBTS as doubt:
        if effect.may_end:
            return await _ended(hands, effect, str(doubt))
        return EngineUnexplained(
            replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason=str(doubt)
        )
    watch(hands, effect)
    return found


async def _found(hands: Hands, effect: LookAtEngine, engine: EngineView) -> EngineFound:
    """Raises what kept it from being well. What was interrupted half-way is finished in the direction of its lease."""
    driver, target = hands.mover.by(effect.swap_driver), hands.target(effect, engine)
    standing = await driver.standing(target)
    if standing is not Standing.PARKED and effect.was is Residency.PARKED:
        if not await hands.is_idle(effect, target.endpoint, timeout_s=SLEEP_DRAIN_S):
            raise Gone("it should be parked, and has requests")
        await driver.park(target)
        standing = Standing.PARKED
    if standing is Standing.PARKED and effect.was is not Residency.STARTING:
        return await _parked(hands, effect, engine)
    enforced_bytes = await hands.limit(effect.replica, engine, effect.granted_bytes)
    if standing is Standing.BETWEEN and effect.was is not Residency.STARTING:
        await driver.wake(target)
    elif standing is not Standing.RESIDENT:
        raise Gone("it has not come up yet")
    await hands.verify(effect, target.endpoint)
    await hands.holder.open_route(effect.replica.replica_id, target.endpoint)
    return EngineFound(
        replica_id=effect.replica.replica_id,
        lease_epoch=effect.lease_epoch,
        endpoint=target.endpoint,
        is_parked=False,
        enforced_bytes=enforced_bytes,
    )


async def _parked(hands: Hands, effect: LookAtEngine, engine: EngineView) -> EngineFound:
    residues = await proven_residues(hands, effect, engine)
    await hands.limit(effect.replica, engine, [max(size, MiB) for size in residues])
    return EngineFound(
        replica_id=effect.replica.replica_id,
        lease_epoch=effect.lease_epoch,
        endpoint=hands.endpoint(engine),
        is_parked=True,
        residues=residues,
    )


async def _ended(hands: Hands, effect: LookAtEngine, reason: str) -> EngineLost:
    """Ended by force, with a look at whoever shares a GPU with it: a fault there can take others along."""
    told = await lost(hands, effect, f"given up as a suspect: {reason}")
    gpu_uuids = {share.gpu_uuid for share in effect.replica.shares}
    shaken = [
        neighbour.replica_id
        for neighbour in effect.neighbours
        if not await _is_well(hands, neighbour, gpu_uuids=gpu_uuids)
    ]
    return EngineLost(
        replica_id=told.replica_id, lease_epoch=told.lease_epoch, reason=told.reason, shaken_ids=tuple(shaken)
    )


async def _is_well(hands: Hands, neighbour: ReplicaProposal, *, gpu_uuids: set[str]) -> bool:
    """The driver shows its memory on every GPU that both use, and it answers. No word of the driver is no doubt."""
    engine = await hands.runtime(neighbour).engine(neighbour.replica_id)
    if engine is None or not engine.is_alive:
        return True  # Its end is told by who waits for it.
    for gpu_uuid in gpu_uuids & set(engine.gpu_uuids):
        if await hands.guard.used_bytes(gpu_uuid, engine.namespace, engine.pid) == 0:
            return False
    try:
        await hands.engines.state(hands.endpoint(engine), neighbour.deployment.engine.kind)
    except EngineProblem:
        return False
    return True

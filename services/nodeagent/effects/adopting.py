"""After the agent's own restart: whether an engine is as its lease says."""

from devices.api import DeviceError
from kit.outcomes import Input
from schemas.holders import EngineView
from services.nodeagent.effects.ending import watch
from services.nodeagent.effects.hands import Gone, Hands
from services.nodeagent.effects.parking import settled
from services.nodeagent.effects.resizing import live_as_leased
from services.nodeagent.effects.waking import restored
from services.nodeagent.guard import NotEnforced
from services.nodeagent.inputs import AdoptEngine, EngineDoubtful
from services.nodeagent.mover.driver import Broken, Standing, StillParked, StillResident


async def adopt(hands: Hands, effect: AdoptEngine, traceparent: str) -> Input | None:
    """What differs is put right, what is gone or in doubt is told; nothing is ended here."""
    engine = await hands.running(effect)
    driver, target = hands.mover.by(effect.swap_driver), hands.target(effect, engine)
    try:
        standing = await driver.standing(target)
        if standing is Standing.UNTOLD:
            standing = await _by_its_use(hands, effect, engine)
        if effect.should_be_parked and standing is not Standing.PARKED:
            await hands.holder.close_route(effect.replica.replica_id)
            await settled(hands, effect, engine, await driver.park(target))
        elif not effect.should_be_parked:
            if standing is not Standing.RESIDENT:
                await restored(hands, effect, engine)
            await live_as_leased(hands, effect, engine)
            await hands.holder.open_route(effect.replica.replica_id, hands.endpoint(engine))
    except (Gone, Broken, StillResident, StillParked, NotEnforced, DeviceError) as error:
        replica_id, lease_epoch = effect.replica.replica_id, effect.lease_epoch
        return EngineDoubtful(replica_id=replica_id, lease_epoch=lease_epoch, reason=str(error))
    watch(hands, effect)
    return None


async def _by_its_use(hands: Hands, effect: AdoptEngine, engine: EngineView) -> Standing:
    """Parked when it uses no more than half of its share on any GPU; not even told: resident, so that it is parked."""
    for share in effect.replica.shares:
        used_bytes = await hands.guard.used_bytes(share.gpu_uuid, engine.namespace, engine.pid)
        if used_bytes is None or used_bytes > share.request_bytes // 2:
            return Standing.RESIDENT
    return Standing.PARKED

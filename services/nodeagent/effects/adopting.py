"""After the agent's own restart: whether an engine is as its lease says."""

from kit.outcomes import Input
from services.nodeagent.effects.ending import watch
from services.nodeagent.effects.hands import Gone, Hands
from services.nodeagent.effects.parking import settled
from services.nodeagent.effects.waking import restored
from services.nodeagent.inputs import AdoptEngine
from services.nodeagent.mover.driver import Broken, Standing, StillParked, StillResident


async def adopt(hands: Hands, effect: AdoptEngine, traceparent: str) -> Input | None:
    """What differs is put right, what is gone is told."""
    engine = await hands.running(effect)
    driver, target = hands.mover.by(effect.swap_driver), hands.target(effect, engine)
    try:
        standing = await driver.standing(target)
        if effect.should_be_parked and standing is not Standing.PARKED:
            await hands.holder.close_route(effect.replica.replica_id)
            await settled(hands, effect, engine, await driver.park(target))
        elif not effect.should_be_parked:
            if standing is not Standing.RESIDENT:
                await restored(hands, effect, engine)
            await hands.holder.open_route(effect.replica.replica_id, hands.endpoint(engine))
    except (Broken, StillResident, StillParked) as error:
        raise Gone(str(error)) from error
    watch(hands, effect)
    return None

"""After the agent's own restart: whether an engine is as its lease says."""

from kit.outcomes import Input
from services.nodeagent.effects.ending import watch
from services.nodeagent.effects.hands import Gone, Hands
from services.nodeagent.engine_client import EngineProblem
from services.nodeagent.inputs import AdoptEngine


async def adopt(hands: Hands, effect: AdoptEngine, traceparent: str) -> Input | None:
    """What differs is put right, what is gone is told."""
    engine = await hands.running(effect)
    endpoint = hands.endpoint(engine)
    try:
        state = await hands.engines.state(endpoint)
    except EngineProblem as error:
        raise Gone(str(error)) from error
    if effect.should_be_parked and state.state == "resident":
        await hands.holder.close_route(effect.replica.replica_id)
        await hands.engines.sleep(endpoint, timeout_s=hands.settings.wake_deadline_s)
    elif not effect.should_be_parked:
        if state.state == "asleep":
            await hands.engines.wake(endpoint, timeout_s=hands.settings.wake_deadline_s)
        await hands.holder.open_route(effect.replica.replica_id, endpoint)
    watch(hands, effect)
    return None

"""Ends: those that are asked for, and those that happen."""

import contextlib
from typing import Final

import anyio

from kit.outcomes import Input
from schemas.holders import EngineView
from services.nodeagent.adapters.registry import is_container
from services.nodeagent.effects.hands import HOLDER_RETRY_S, Gone, Hands, log_line
from services.nodeagent.inputs import EngineEffect, EngineLost, EngineStopped, StopEngine
from services.nodeagent.runtimes.api import RuntimeProblem

WATCH_S: Final = 30.0
"""One long poll for an engine's end."""
UNKNOWN: Final = 404
ANOTHER_EPOCH: Final = 409


async def stop(hands: Hands, effect: StopEngine, traceparent: str) -> Input:
    stopped = EngineStopped(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch)
    engine = await hands.runtime(effect.replica).engine(effect.replica.replica_id)
    if engine is None or engine.lease_epoch != effect.lease_epoch:
        return stopped
    if engine.is_alive and not engine.is_gated:
        await hands.holder.close_route(effect.replica.replica_id)
        with contextlib.suppress(Gone):
            await hands.is_idle(effect, hands.endpoint(engine), timeout_s=effect.drain_s)
    await end(hands, effect, engine)
    return stopped


async def lost(hands: Hands, effect: EngineEffect, reason: str) -> EngineLost:
    """Make sure that nothing is left of it, then tell."""
    engine = await hands.runtime(effect.replica).engine(effect.replica.replica_id)
    if engine is not None and engine.lease_epoch == effect.lease_epoch:
        await end(hands, effect, engine)
    return EngineLost(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason=reason)


async def end_older(hands: Hands, effect: EngineEffect) -> None:
    """An engine of an earlier lease of this replica must be gone before the new one starts."""
    engine = await hands.runtime(effect.replica).engine(effect.replica.replica_id)
    if engine is not None and engine.lease_epoch != effect.lease_epoch:
        await end(hands, effect, engine)


async def end(hands: Hands, effect: EngineEffect, engine: EngineView) -> None:
    grace_s = hands.settings.stop_grace_s
    await hands.guard.drain(engine)
    if is_container(effect.replica.deployment):  # Docker takes its cgroup away as it ends.
        await hands.guard.give_up(effect.replica, engine)
    await hands.runtime(effect.replica).stop(engine.replica_id, lease_epoch=engine.lease_epoch, grace_s=grace_s)
    await hands.guard.lift(effect.replica, engine)
    hands.proofs.pop((engine.replica_id, engine.lease_epoch), None)
    await hands.mover.by(effect.swap_driver).forget(hands.target(effect, engine))
    await hands.runtime(effect.replica).forget(engine.replica_id, lease_epoch=engine.lease_epoch)


def watch(hands: Hands, effect: EngineEffect) -> None:
    """Tell when the engine ends by itself; once per engine."""
    key = (effect.replica.replica_id, effect.lease_epoch)
    if key not in hands.watched:
        hands.watched.add(key)
        hands.watchers.start_soon(_watch_end, hands, effect)


def unwatch(hands: Hands, effect: EngineEffect) -> None:
    """Its end is wanted, and told by whoever wants it."""
    hands.watched.discard((effect.replica.replica_id, effect.lease_epoch))


async def end_of(hands: Hands, effect: EngineEffect) -> str | None:
    """Why it does not run any more; None while it does, after one long poll. A restarted holder knows no engine."""
    try:
        view = await hands.runtime(effect.replica).wait_for_exit(
            effect.replica.replica_id, lease_epoch=effect.lease_epoch, timeout_s=WATCH_S
        )
    except RuntimeProblem as problem:
        if problem.status == UNKNOWN:
            return "the holder does not know it any more"
        raise
    return None if view.is_alive else f"it ended with code {view.exit_code}: {log_line(view)}"


async def _watch_end(hands: Hands, effect: EngineEffect) -> None:
    replica_id, lease_epoch = effect.replica.replica_id, effect.lease_epoch
    while True:
        try:
            reason = await end_of(hands, effect)
            if (replica_id, lease_epoch) not in hands.watched:
                break
            if reason is not None:
                hands.report(await lost(hands, effect, reason))
                break
        except RuntimeProblem as problem:
            if problem.status == ANOTHER_EPOCH:
                break
            await anyio.sleep(HOLDER_RETRY_S)
    hands.watched.discard((replica_id, lease_epoch))

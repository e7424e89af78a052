"""What an agent finds when it looks at a suspect, in virtual time; for the simulator only."""

from collections.abc import Callable
from typing import Final, Protocol

from kit.outcomes import Input
from services.nodeagent.inputs import (
    EngineDoubtful,
    EngineEffect,
    EngineFound,
    EngineLost,
    EngineUnexplained,
    LookAtEngine,
)
from services.nodeagent.simulated_engine import Clock, Engine, Phase
from services.nodeagent.transitions import Residency

ANSWER_S: Final = 5.0
"""So long a look waits for an engine's answer."""
LOOKS_BEFORE_END: Final = 1
"""No engine may be ended as a suspect before it was looked at so often and was not well (a rule of the simulator)."""


def silent(effect: EngineEffect) -> EngineDoubtful:
    """An engine that does not answer its agent, which has come back."""
    return EngineDoubtful(
        replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason="it does not answer"
    )


class Host(Protocol):
    """What a look needs of the host."""

    clock: Clock
    silent_until_s: float
    """Until then NVML says nothing."""

    def mine(self, effect: LookAtEngine) -> Engine | None: ...

    def open_route(self, effect: LookAtEngine, engine: Engine, is_alive: Callable[[], bool]) -> None: ...

    def drain(self, effect: LookAtEngine, engine: Engine, drain_s: float, then: Callable[[str], None]) -> None: ...

    def lost(self, effect: LookAtEngine, reason: str) -> EngineLost: ...

    def endpoint(self, effect: LookAtEngine) -> str: ...


def look(
    host: Host, effect: LookAtEngine, *, tell: Callable[[float, Input], None], is_alive: Callable[[], bool]
) -> None:
    """As `effects.looking` does it."""
    engine = host.mine(effect)
    if engine is None or effect.was is Residency.RELEASING:
        tell(0.01, host.lost(effect, "gone, or its release did not end in time"))
        return

    def closed(outcome: str) -> None:
        if not is_alive():
            return
        if host.mine(effect) is not engine:
            tell(0.0, host.lost(effect, "gone while it was looked at"))
        else:
            tell(0.02, _judged(host, effect, engine, is_alive, is_idle=outcome == "idle"))

    if engine.hung_until_s > host.clock.now_s:
        # Its route is closed all the same; its requests hang with it.
        host.drain(effect, engine, 0.0, lambda _: None)
        tell(ANSWER_S, _in_doubt(host, effect, engine, "it does not answer"))
        return
    host.drain(effect, engine, ANSWER_S, closed)


def _judged(host: Host, effect: LookAtEngine, engine: Engine, is_alive: Callable[[], bool], *, is_idle: bool) -> Input:
    if effect.was is Residency.PARKED and engine.phase is Phase.RESIDENT and is_idle:
        engine.phase = Phase.ASLEEP
    is_parked = engine.phase is Phase.ASLEEP
    if engine.phase is Phase.LOADING:
        return _in_doubt(host, effect, engine, "it has not come up yet")
    if is_parked and effect.was is Residency.STARTING:
        return _in_doubt(host, effect, engine, "it sleeps and was to start")
    if is_parked and host.silent_until_s > host.clock.now_s:
        return _in_doubt(host, effect, engine, "its bytes are not proven free")
    if not is_parked and effect.was is Residency.PARKED:
        return _in_doubt(host, effect, engine, "it should be parked, and has requests")
    if not is_parked:
        host.open_route(effect, engine, is_alive)
    return EngineFound(
        replica_id=effect.replica.replica_id,
        lease_epoch=effect.lease_epoch,
        endpoint=host.endpoint(effect),
        is_parked=is_parked,
        residues=tuple(engine.used_on(gpu_uuid) for gpu_uuid in engine.share_bytes) if is_parked else (),
        enforced_bytes=sum(engine.share_bytes.values()),
    )


def _in_doubt(host: Host, effect: LookAtEngine, engine: Engine, reason: str) -> Input:
    engine.doubtful_look_count += 1
    if effect.may_end:
        looks = engine.doubtful_look_count
        assert looks > LOOKS_BEFORE_END, f"{effect.replica.replica_id} is ended at its first look"
        return host.lost(effect, f"given up as a suspect: {reason}")
    return EngineUnexplained(replica_id=effect.replica.replica_id, lease_epoch=effect.lease_epoch, reason=reason)

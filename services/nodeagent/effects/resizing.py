"""Grants that change while an engine serves; at any instant the driver allows no more than the account holds.

To grow: the limit, then the budget. To shrink: the budget, then the proof, then the limit. To freeze: the limit at what
is used.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import anyio
import msgspec

from devices.api import DeviceError
from kit.outcomes import Input
from schemas.holders import EngineView
from schemas.nodes import ResizeReason
from schemas.units import MiB
from services.nodeagent.effects.hands import Gone, Hands, requests
from services.nodeagent.engine_client import EngineProblem
from services.nodeagent.grades import is_brokered
from services.nodeagent.growth import is_elastic
from services.nodeagent.guard import NotEnforced
from services.nodeagent.inputs import (
    AdoptEngine,
    EngineEffect,
    EngineNotResized,
    EngineResized,
    EvictEngine,
    ResizeEngine,
)

PROOF_POLL_S: Final = 0.005
UNDER_WAY_BYTES: Final = 64 * MiB
"""A frozen engine may finish what it is at: the little memory that it takes for a moment when it gets busy."""
TELL_S: Final = 2.0
"""How long an engine may take to hear of a budget that nothing waits for."""


NO_SUCH_ROUTE: Final = frozenset({404, 405, 501})
"""What an engine answers that has nothing which takes a budget: asking it again is of no use."""


class Unable(str):
    """Why an engine cannot live in another grant at all, however often it is asked."""

    __slots__ = ()


class _Budget(msgspec.Struct, kw_only=True):
    """What ``POST /sublet/budget`` answers."""

    short_by_bytes: int = 0


async def resize(hands: Hands, effect: ResizeEngine, traceparent: str) -> Input | None:
    """None when a newer change has ended it."""
    began_s = time.monotonic()
    work = {ResizeReason.BURST: _grow, ResizeReason.FREEZE: _freeze, ResizeReason.GIVE_BACK: _shrink}[effect.reason]

    async def resized() -> tuple[tuple[int, ...], str]:
        engine = await hands.running(effect)
        with hands.tracer.span(f"resize {effect.reason}", parent=traceparent):
            return await work(hands, effect, engine)

    try:
        result = await hands.lanes.run(effect, effect.resize_epoch, resized)
    except (NotEnforced, DeviceError) as error:
        raise Gone(f"its share cannot be enforced: {error}") from error
    if result is None:
        return None
    granted, problem = result
    about: dict[str, Any] = {
        "replica_id": effect.replica.replica_id,
        "lease_epoch": effect.lease_epoch,
        "reason": effect.reason,
        "granted_bytes": granted,
        "resize_epoch": effect.resize_epoch,
        "resize_s": time.monotonic() - began_s,
    }
    if not problem:
        return EngineResized(**about)
    return EngineNotResized(**about, problem=problem, is_able=not isinstance(problem, Unable))


async def evict(hands: Hands, effect: EvictEngine, traceparent: str) -> Input:
    """Nothing is left of it when that is told."""
    raise Gone(effect.reason)


async def live_as_leased(hands: Hands, effect: AdoptEngine, engine: EngineView) -> None:
    """After the agent's own restart: limit and budget as its lease says, unless a newer change came first."""
    granted = effect.granted_bytes
    if not granted or not _may_burst(effect):
        return

    async def lives() -> None:
        await hands.limit(effect.replica, engine, granted)
        await _told(hands, engine, granted, timeout_s=TELL_S)

    try:
        await hands.lanes.run(effect, effect.resize_epoch, lives)
    except (NotEnforced, DeviceError) as error:
        raise Gone(f"its share cannot be enforced: {error}") from error


async def live_in_request(hands: Hands, effect: EngineEffect, engine: EngineView) -> None:
    """Before its park: it comes back with its request, whatever it had."""
    if _may_burst(effect):
        await _told(hands, engine, requests(effect.replica), timeout_s=TELL_S)


async def is_beyond_request(hands: Hands, effect: EngineEffect, engine: EngineView) -> str:
    """Why its image would not fit into its request when it returns; empty when it does. Asked after it was told."""
    if not _may_burst(effect):
        return ""
    used: tuple[int, ...] | None = None
    with anyio.move_on_after(TELL_S):
        while True:
            used = await used_bytes(hands, effect, engine)
            if _fits(used, requests(effect.replica)):
                return ""
            await anyio.sleep(PROOF_POLL_S)
    told = "what it uses cannot be measured" if used is None else f"it uses {used} bytes"
    return f"{told}, and must come back in its request of {requests(effect.replica)}"


def _may_burst(effect: EngineEffect) -> bool:
    """Whether it can ever have had another grant than its request."""
    has_room = all(share.limit_bytes > share.request_bytes for share in effect.replica.shares)
    return has_room and is_elastic(effect.replica.deployment)


async def _told(hands: Hands, engine: EngineView, sizes: Sequence[int], *, timeout_s: float) -> str:
    """The engine's budget is of each of its GPUs, so that the smallest counts. Why it did not take it, or nothing."""
    body = msgspec.json.encode({"memory_bytes": min(sizes)})
    try:
        answer = await hands.engines.post(f"{hands.endpoint(engine)}/sublet/budget", timeout_s=timeout_s, body=body)
        short_bytes = msgspec.json.decode(answer, type=_Budget).short_by_bytes
    except EngineProblem as error:
        return Unable(error) if error.status in NO_SUCH_ROUTE else str(error)
    except msgspec.MsgspecError as error:
        return str(error)
    return f"it is short by {short_bytes} bytes" if short_bytes > 0 else ""


async def _grow(hands: Hands, effect: ResizeEngine, engine: EngineView) -> tuple[tuple[int, ...], str]:
    await hands.limit(effect.replica, engine, effect.granted_bytes)
    problem = await _told(hands, engine, effect.granted_bytes, timeout_s=effect.deadline_s)
    if not problem:
        return effect.granted_bytes, ""
    await _told(hands, engine, effect.before_bytes, timeout_s=TELL_S)
    granted = await _down_to(hands, effect, engine, effect.before_bytes, most=effect.granted_bytes)
    return granted, problem


async def _freeze(hands: Hands, effect: ResizeEngine, engine: EngineView) -> tuple[tuple[int, ...], str]:
    """Only where something holds it there: else its grant stays what it was, and it is asked next."""
    used = await used_bytes(hands, effect, engine)
    if used is None:
        return effect.before_bytes, "what it uses cannot be measured"
    granted = _around(effect, used)
    if granted == effect.before_bytes:
        return granted, ""
    if await hands.limit(effect.replica, engine, granted) and _fits(await used_bytes(hands, effect, engine), granted):
        await _told(hands, engine, granted, timeout_s=TELL_S)
        return granted, ""
    await hands.limit(effect.replica, engine, effect.before_bytes)
    return effect.before_bytes, ""


async def _shrink(hands: Hands, effect: ResizeEngine, engine: EngineView) -> tuple[tuple[int, ...], str]:
    ends_s = time.monotonic() + effect.deadline_s
    problem = await _told(hands, engine, effect.granted_bytes, timeout_s=effect.deadline_s)
    while not problem:
        if _fits(await used_bytes(hands, effect, engine), effect.granted_bytes):
            await hands.limit(effect.replica, engine, effect.granted_bytes)
            return effect.granted_bytes, ""
        if time.monotonic() >= ends_s:
            problem = f"it has not shrunk within {effect.deadline_s:.1f} s"
        await anyio.sleep(PROOF_POLL_S)
    granted = await _down_to(hands, effect, engine, effect.granted_bytes, most=effect.before_bytes)
    return granted, problem


async def _down_to(
    hands: Hands, effect: ResizeEngine, engine: EngineView, least: tuple[int, ...], *, most: tuple[int, ...]
) -> tuple[int, ...]:
    """Its limit at what it uses now, at least at `least`; at `most` where that cannot be proven."""
    used = await used_bytes(hands, effect, engine)
    if used is not None:
        over = [size + UNDER_WAY_BYTES - low for size, low in zip(used, least, strict=True) if size > low]
        extra_bytes = max(over, default=0)
        sizes = tuple(min(low + extra_bytes, high) for low, high in zip(least, most, strict=True))
        await hands.limit(effect.replica, engine, sizes)
        if _fits(await used_bytes(hands, effect, engine), sizes):
            return sizes
    await hands.limit(effect.replica, engine, most)
    return most


def _around(effect: ResizeEngine, used: Sequence[int]) -> tuple[int, ...]:
    """A little more than it uses, not less than it may be frozen at, the same beyond that on each of its GPUs."""
    extra_bytes = max(size + UNDER_WAY_BYTES - low for size, low in zip(used, effect.granted_bytes, strict=True))
    sizes = [low + max(0, extra_bytes) for low in effect.granted_bytes]
    return tuple(min(size, high) for size, high in zip(sizes, effect.before_bytes, strict=True))


def _fits(used: Sequence[int] | None, sizes: Sequence[int]) -> bool:
    return used is not None and all(size <= most for size, most in zip(used, sizes, strict=True))


async def used_bytes(hands: Hands, effect: EngineEffect, engine: EngineView) -> tuple[int, ...] | None:
    """By shard: its own by the driver's account and what the memory broker has lent it; None: it cannot be told."""
    lent: Mapping[str, int] = {}
    if hands.guard.accounts is not None and is_brokered(effect.replica.deployment.engine):
        view = await hands.guard.accounts.look()
        of = (effect.replica.replica_id, effect.lease_epoch)
        account = next((a for a in view.accounts if (a.replica_id, a.lease_epoch) == of), None) if view else None
        if account is None or not account.is_held_known:
            return None
        lent = account.held_bytes
    used = []
    for share in effect.replica.shares:
        own_bytes = await hands.guard.used_bytes(share.gpu_uuid, engine.namespace, engine.pid)
        if own_bytes is None:
            return None
        used.append(own_bytes + lent.get(share.gpu_uuid, 0))
    return tuple(used)

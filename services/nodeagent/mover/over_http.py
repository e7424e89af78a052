"""The drivers that ask the engine itself: vLLM's sleep mode and SGLang's memory release.

Engines answer with nothing (vLLM), with ``null`` (SGLang), or with what they did (ours); all of that is success.
"""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from schemas.deployments import SwapDriver
from services.nodeagent.adapters.registry import ADAPTERS
from services.nodeagent.engine_client import EngineClient, EngineProblem
from services.nodeagent.mover.driver import (
    YES,
    Broken,
    Parked,
    Standing,
    StillParked,
    Support,
    SwapTarget,
    Woken,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One POST."""

    path: str
    body: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What an engine understands."""

    name: SwapDriver
    park: tuple[Call, ...]
    wake: tuple[Call, ...]
    """Weights before the cache: that is what a repeat must find again, and what fails when memory is short."""
    whole_wake: tuple[Call, ...]
    """For our own engines, which do both at once."""
    link_fraction: float
    """Of the link that its copies were seen to reach."""


def _tags(*tags: str) -> bytes:
    return msgspec.json.encode({"tags": tags})


SLEEP: Final = Protocol(
    name=SwapDriver.HTTP_SLEEP,
    # Without `mode` vLLM aborts what runs. Nothing does here, but a request may have come another way.
    park=(Call(path="/sleep?level=1&mode=wait"),),
    wake=(Call(path="/wake_up?tags=weights"), Call(path="/wake_up?tags=kv_cache")),
    whole_wake=(Call(path="/wake_up"),),
    link_fraction=0.4,
)
RELEASE: Final = Protocol(
    name=SwapDriver.HTTP_RELEASE,
    park=(Call(path="/release_memory_occupation", body=_tags("kv_cache", "weights")),),
    wake=(
        Call(path="/resume_memory_occupation", body=_tags("weights")),
        Call(path="/resume_memory_occupation", body=_tags("kv_cache")),
    ),
    whole_wake=(Call(path="/resume_memory_occupation"),),
    link_fraction=0.22,
)


class _Told(msgspec.Struct, kw_only=True):
    copied_bytes: int | None = None
    map_s: float = 0.0
    copy_s: float = 0.0


class OverHttp:
    """One of these protocols, against the engines of this host."""

    is_wake_repeatable = True
    """Engines roll a failed wake back; see `wake`."""
    residue_bytes = None

    def __init__(self, protocol: Protocol, engines: EngineClient) -> None:
        self._protocol = protocol
        self._engines = engines

    @property
    def name(self) -> SwapDriver:
        return self._protocol.name

    async def support(self, gpu_uuids: Collection[str]) -> dict[str, Support]:
        return dict.fromkeys(gpu_uuids, YES)

    def estimate_s(self, size_bytes: int, *, link_bytes_per_s: float) -> float:
        return size_bytes / (self._protocol.link_fraction * link_bytes_per_s)

    async def prepare(self, target: SwapTarget) -> None:
        """The engine keeps its own copies."""

    async def park(self, target: SwapTarget) -> Parked:
        try:
            told = [await self._do(call, target) for call in self._protocol.park]
        except EngineProblem as error:
            raise Broken(f"it did not go to sleep: {error}") from error
        return Parked(
            copied_bytes=_copied(target, told),
            host_bytes=target.replica.deployment.engine.weights_bytes,
        )

    async def wake(self, target: SwapTarget) -> Woken:
        """All of it, or none: what came back before a call failed is put to sleep again."""
        told: list[_Told] = []
        is_ours = ADAPTERS[target.replica.deployment.engine.kind].is_ours
        for call in self._protocol.whole_wake if is_ours else self._protocol.wake:
            try:
                told.append(await self._do(call, target))
            except EngineProblem as error:
                raise await self._after_failure(target, error, has_begun=bool(told)) from error
        return Woken(
            copied_bytes=_copied(target, told),
            map_s=sum(answer.map_s for answer in told),
            copy_s=sum(answer.copy_s for answer in told),
        )

    async def _after_failure(self, target: SwapTarget, error: EngineProblem, *, has_begun: bool) -> Exception:
        if has_begun:
            with contextlib.suppress(EngineProblem):
                for call in self._protocol.park:
                    await self._do(call, target)
        standing = await self.standing(target)
        if standing is not Standing.PARKED:
            return Broken(f"{error}; it is {standing} now")
        return StillParked(str(error), short_by_bytes=error.short_by_bytes)

    async def standing(self, target: SwapTarget) -> Standing:
        try:
            state = await self._engines.state(target.endpoint, target.replica.deployment.engine.kind)
        except EngineProblem as error:
            raise Broken(str(error)) from error
        match state.state:
            case "resident":
                adapter = ADAPTERS[target.replica.deployment.engine.kind]
                can_tell = adapter.is_ours or bool(adapter.sleeping_route)
                return Standing.RESIDENT if can_tell else Standing.UNTOLD
            case "asleep":
                return Standing.PARKED
            case "failed":
                raise Broken(state.failure or "it has failed")
            case _:
                return Standing.BETWEEN

    async def forget(self, target: SwapTarget) -> None:
        """Nothing is kept for it."""

    async def _do(self, call: Call, target: SwapTarget) -> _Told:
        content = await self._engines.post(f"{target.endpoint}{call.path}", timeout_s=target.timeout_s, body=call.body)
        try:
            return msgspec.json.decode(content, type=_Told | None) or _Told()
        except msgspec.MsgspecError:
            return _Told()  # Another engine's words about its success.


def _copied(target: SwapTarget, told: Sequence[_Told]) -> int:
    """Engines that do not say copy all weights each time, out as well as in."""
    known = [answer.copied_bytes for answer in told if answer.copied_bytes is not None]
    return sum(known) if known else target.replica.deployment.engine.weights_bytes

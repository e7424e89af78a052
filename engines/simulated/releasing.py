"""SGLang's routes for letting device memory go and taking it back, over the same engine as vLLM's sleep mode."""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from engines.errors import EngineError, WakeFailedError
from engines.http import Changes, json_response
from engines.simulated.engine import WAKE_TAGS, Engine

KNOWN_TAGS: Final = WAKE_TAGS | {"cuda_graph"}
"""This engine has no CUDA graphs, so that tag moves nothing."""


class Occupation(msgspec.Struct, kw_only=True):
    """The body of both routes. Without tags: all of it."""

    tags: list[str] | None = None


class ReleaseRoutes:
    """``POST /release_memory_occupation`` and ``/resume_memory_occupation``; success is an empty JSON value."""

    def __init__(self, engine: Engine, changes: Changes) -> None:
        self._engine = engine
        self._changes = changes

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/release_memory_occupation", self.release)
        app.router.add_post("/resume_memory_occupation", self.resume)

    async def release(self, request: web.Request) -> web.Response:
        """Weights and KV memory go together here; asked for one of them, it refuses."""
        try:
            tags = _tags(await request.read())
            if tags != WAKE_TAGS:
                raise ValueError(f"this engine releases weights and kv_cache together, not {sorted(tags)} alone")
            if self._engine.serving.in_flight_count:
                raise ValueError("release_memory_occupation should be called only when no request is running")
            await self._changes.finish(self._engine.sleep(level=1, is_waiting=False, timeout_s=None))
        except (ValueError, EngineError) as error:
            return _refused(str(error))
        return json_response(None)

    async def resume(self, request: web.Request) -> web.Response:
        try:
            await self._changes.finish(self._engine.wake(_tags(await request.read())))
        except (ValueError, EngineError, WakeFailedError) as error:
            return _refused(str(error))
        return json_response(None)


def _tags(body: bytes) -> frozenset[str]:
    """Those that mean something here. Raises `ValueError`."""
    try:
        told = msgspec.json.decode(body, type=Occupation) if body.strip() else Occupation()
    except msgspec.MsgspecError as error:
        raise ValueError(f"invalid request body: {error}") from error
    tags = KNOWN_TAGS if told.tags is None else frozenset(told.tags)
    if not tags <= KNOWN_TAGS:
        raise ValueError(f"unknown tags {sorted(tags - KNOWN_TAGS)}; known: {sorted(KNOWN_TAGS)}")
    return tags & WAKE_TAGS


def _refused(message: str) -> web.Response:
    return json_response({"error": {"message": message}}, status=400)

"""The routes that whoever runs the engine uses: health, metrics, vLLM's and SGLang's ways to sleep, ours at /sublet."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from engines.errors import invalid
from engines.http import Changes, json_response
from engines.simulated.engine import WAKE_TAGS, Engine
from engines.simulated.releasing import ReleaseRoutes
from engines.simulated.reports import EngineState

VERSION = "0.1.0-simulated"


class BudgetRequest(msgspec.Struct, kw_only=True):
    memory_bytes: int


class AdministrationRoutes:
    """Handlers over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changes = Changes()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/version", self.version)
        app.router.add_get("/is_sleeping", self.is_sleeping)
        app.router.add_post("/sleep", self.sleep)
        app.router.add_post("/wake_up", self.wake_up)
        ReleaseRoutes(self._engine, self._changes).add_to(app)
        app.router.add_get("/sublet/state", self.state)
        app.router.add_post("/sublet/budget", self.budget)
        app.router.add_get("/sublet/weights", self.weights)
        app.router.add_post("/sublet/weights", self.update_weights)

    async def health(self, _: web.Request) -> web.Response:
        """200 while the engine is alive, asleep too, as vLLM answers; 503 while it loads and after it failed."""
        is_well = self._engine.state in {EngineState.RESIDENT, EngineState.ASLEEP}
        return web.Response(status=200 if is_well else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        engine = self._engine
        page = engine.serving.metrics.page(engine.gauges(), model=engine.settings.model, device=engine.device_label)
        return web.Response(text=page, content_type="text/plain", charset="utf-8")

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"version": VERSION, "engine": "sublet-simulated"})

    async def is_sleeping(self, _: web.Request) -> web.Response:
        return json_response({"is_sleeping": self._engine.is_asleep})

    async def sleep(self, request: web.Request) -> web.Response:
        level = request.query.get("level", "1")
        if level not in {"0", "1"}:
            raise invalid(f"level must be 0 or 1, got {level!r}; level 2 is not simulated.", param="level")
        is_waiting = waits(request.query)
        timeout_s = timeout(request.query.get("timeout_s"))
        change = self._engine.sleep(level=int(level), is_waiting=is_waiting, timeout_s=timeout_s)
        return json_response(await self._changes.finish(change))

    async def wake_up(self, request: web.Request) -> web.Response:
        tags = frozenset(request.query.getall("tags", [])) or WAKE_TAGS
        if not tags <= WAKE_TAGS:
            raise invalid(f"tags must be weights or kv_cache, got {sorted(tags - WAKE_TAGS)}.", param="tags")
        return json_response(await self._changes.finish(self._engine.wake(tags)))

    async def state(self, _: web.Request) -> web.Response:
        engine = self._engine
        batcher = engine.serving.batcher
        return json_response(
            {
                "state": engine.state.value,
                "transition": engine.transition,
                "is_paused": engine.is_paused,
                "failure": engine.failure or None,
                "engine": "simulated",
                "model": engine.settings.model,
                "device": engine.device_label,
                "in_flight": engine.serving.in_flight_count,
                "running": batcher.running_count,
                "waiting": batcher.waiting_count,
                "weights_bytes": engine.weights_bytes,
                "kv_bytes": engine.kv_bytes,
                "kv_used_bytes": batcher.used_blocks * batcher.geometry.block_bytes,
                "context_bytes": engine.context_bytes,
                "held_bytes": engine.held_bytes,
                "is_brokered": engine.is_brokered,
                "gpus": engine.shares,
                "budget_bytes": engine.target_bytes,
                "context_tokens_max": engine.serving.tokens_max,
                "weights_generation": engine.weights_generation,
                "is_bulk_checked": engine.is_bulk_checked,
                "steps": engine.serving.step_count,
                "preemptions": batcher.preemption_count,
                "gpu_sharing": engine.pace.sharing.mode if engine.pace.sees_neighbours else "alone",
            }
        )

    async def weights(self, _: web.Request) -> web.Response:
        digest = await self._engine.weights_digest()
        return json_response({"weights_generation": self._engine.weights_generation, "digest": digest})

    async def update_weights(self, _: web.Request) -> web.Response:
        return json_response(await self._changes.finish(self._engine.update_weights()))

    async def budget(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read(), type=BudgetRequest)
        except msgspec.DecodeError as error:
            raise invalid(f"Invalid request body: {error}.", code="invalid_request_body") from error
        return json_response(await self._changes.finish(self._engine.set_budget(body.memory_bytes)))


def waits(query: Any) -> bool:
    """Whether running requests may end first: `wait=false` or vLLM's `mode=abort` says no. Default: yes."""
    mode = query.get("mode", "wait")
    wait = query.get("wait", "true").lower()
    if mode not in {"wait", "abort"}:
        raise invalid(f"mode must be wait or abort, got {mode!r}.", param="mode")
    if wait not in {"true", "false", "1", "0"}:
        raise invalid(f"wait must be true or false, got {wait!r}.", param="wait")
    return mode == "wait" and wait in {"true", "1"}


def timeout(text: str | None) -> float | None:
    """The longest wait for running requests, seconds; None: as long as they take."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise invalid(f"timeout_s must be a number of seconds, got {text!r}.", param="timeout_s")
    return value

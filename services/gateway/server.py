"""The HTTP side: which path is answered by what."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp import web

from services.gateway import models, readiness, refusals
from services.gateway.downstream import Downstream
from services.gateway.readiness import Facts
from services.gateway.refusals import Refusal
from services.gateway.routes import RouteTable
from services.gateway.serving import Serving
from services.gateway.wishes import request_id_of

ENGINE_ROUTES: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""Passed to engines as they are; each names its model in the body."""
SIGNAL_AGES_MAX: Final = 3.0
"""Sampling intervals that may pass without a signal before readiness says so."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Readiness = Callable[[], Facts]

log = logging.getLogger("gateway")


def application(serving: Serving, *, facts: Readiness) -> web.Application:
    """The gateway's routes. `facts` tells what readiness is judged by."""

    def routes() -> RouteTable:
        return serving.runtime.core.routes

    async def list_models(request: web.Request) -> web.StreamResponse:
        caller = serving.caller_of(request)
        if isinstance(caller, Refusal):
            return await _refused(request, caller)
        return _json(request, models.model_list(routes(), caller.tenant, now_s=serving.runtime.now_s()))

    async def one_model(request: web.Request) -> web.StreamResponse:
        caller = serving.caller_of(request)
        if isinstance(caller, Refusal):
            return await _refused(request, caller)
        name = request.match_info["model"]
        deployment = routes().find(caller.tenant, name)
        if deployment is None:
            known = (other.spec.name for other in routes().of_tenant(caller.tenant))
            return await _refused(request, refusals.unknown_model(name, known))
        return _json(request, models.model_body(routes(), deployment, now_s=serving.runtime.now_s()))

    async def healthz(_: web.Request) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.StreamResponse:
        body = readiness.report(routes(), facts(), now_s=serving.runtime.now_s())
        return _json(request, body, status=200 if body["ready"] else 503)

    async def metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(body=serving.metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4"})

    app = web.Application(middlewares=[_errors], client_max_size=serving.settings.request_bytes_max)
    for path in ENGINE_ROUTES:
        app.router.add_post(path, serving.generate)
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{model:.+}", one_model)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What aiohttp refuses by itself gets OpenAI's form too."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return await _refused(request, refusals.unknown_route(request.method, request.path))
    except web.HTTPMethodNotAllowed as error:
        refusal = refusals.wrong_method(request.method, request.path, sorted(error.allowed_methods))
        response = await _refused(request, refusal)
        response.headers["Allow"] = error.headers["Allow"]
        return response


async def _refused(request: web.Request, refusal: Refusal) -> web.StreamResponse:
    return await Downstream(request, request_id=request_id_of(request)).refuse(refusal)


def _json(request: web.Request, body: Any, *, status: int = 200) -> web.Response:
    headers = {"Content-Type": "application/json", "x-request-id": request_id_of(request)}
    return web.Response(status=status, body=msgspec.json.encode(body), headers=headers)

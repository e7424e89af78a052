"""The holder's two HTTP sides: engine control on a private socket, route leases on TCP."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import anyio.to_thread
import msgspec
from aiohttp import web

from schemas.holders import (
    BrokerProcessView,
    EngineStart,
    EngineStop,
    EngineView,
    HolderRefused,
    HolderView,
    RouteClose,
    RouteLeaseWish,
    RouteOpen,
)
from services.holder.broker import BrokerKeeper
from services.holder.engines import Engines
from services.holder.refusals import Refused
from services.holder.routes import Routes

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Arguments and environment of an engine are a few KiB.
BODY_BYTES_MAX: Final = 1024 * 1024
WAIT_S_MAX: Final = 60.0

log = logging.getLogger(__name__)


def _broker_view(broker: BrokerKeeper | None) -> BrokerProcessView | None:
    if broker is None:
        return None
    return BrokerProcessView(
        pid=broker.pid, restart_count=broker.restart_count, engine_socket=str(broker.engine_socket.absolute()),
        control_socket=str(broker.control_socket.absolute()), log_path=str(broker.log_path),
    )  # fmt: skip


def control_app(
    *, holder_id: str, engines: Engines, routes: Routes, broker: BrokerKeeper | None = None
) -> web.Application:
    """For the node agent, on the private socket: whoever can connect may start programs."""

    async def view(_: web.Request) -> web.Response:
        leftover = await anyio.to_thread.run_sync(engines.leftover_namespaces)
        return answer(
            HolderView(
                holder_id=holder_id, engines=engines.views(), open_ids=routes.table.open_ids(),
                closed_ids=routes.table.closed_ids(), leftover_namespaces=leftover, broker=_broker_view(broker),
            )
        )  # fmt: skip

    async def start(request: web.Request) -> web.Response:
        return answer(engines.start(await read(request, EngineStart)))

    async def show(request: web.Request) -> web.Response:
        return answer(engines.view(replica_of(request)))

    async def open_gate(request: web.Request) -> web.Response:
        return answer(engines.open_gate(replica_of(request), lease_epoch=epoch_of(request)))

    async def stop(request: web.Request) -> web.Response:
        wish = await read(request, EngineStop)
        epoch = epoch_of(request)
        return answer(await engines.stop(replica_of(request), lease_epoch=epoch, grace_s=wish.grace_s))

    async def wait(request: web.Request) -> web.Response:
        timeout_s = min(WAIT_S_MAX, number_of(request, "timeout_s", float, WAIT_S_MAX))
        seen: EngineView = await engines.wait(replica_of(request), lease_epoch=epoch_of(request), timeout_s=timeout_s)
        return answer(seen)

    async def forget(request: web.Request) -> web.Response:
        engines.forget(replica_of(request), lease_epoch=epoch_of(request))
        routes.forget(replica_of(request))
        return web.Response(status=204)

    async def open_route(request: web.Request) -> web.Response:
        wish = await read(request, RouteOpen)
        routes.open(wish.replica_id, endpoint=wish.endpoint)
        return web.Response(status=204)

    async def close_route(request: web.Request) -> web.Response:
        wish = await read(request, RouteClose)
        return answer(await routes.close(wish.replica_id))

    app = web.Application(middlewares=[refusals], client_max_size=BODY_BYTES_MAX)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/view", view)
    app.router.add_post("/engines", start)
    app.router.add_get("/engines/{replica}", show)
    app.router.add_delete("/engines/{replica}", forget)
    app.router.add_post("/engines/{replica}/gate", open_gate)
    app.router.add_post("/engines/{replica}/stop", stop)
    app.router.add_get("/engines/{replica}/wait", wait)
    app.router.add_post("/routes/open", open_route)
    app.router.add_post("/routes/close", close_route)
    return app


def lease_app(*, routes: Routes, token: str) -> web.Application:
    """For gateways, on TCP. It tells and takes nothing but which replicas get requests."""
    expected = f"Bearer {token}".encode()

    async def lease(request: web.Request) -> web.Response:
        shown = request.headers.get("Authorization", "").encode(errors="replace")
        if token and not hmac.compare_digest(shown, expected):
            raise Refused("a route lease needs the holder's token: Authorization: Bearer …", status=401)
        return answer(await routes.lease(await read(request, RouteLeaseWish)))

    app = web.Application(middlewares=[refusals], client_max_size=BODY_BYTES_MAX)
    app.router.add_get("/healthz", healthz)
    app.router.add_post("/routes/lease", lease)
    return app


async def healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


@web.middleware
async def refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What we refuse, and what is asked wrongly, is answered with a sentence."""
    try:
        return await handler(request)
    except Refused as refused:
        return answer(HolderRefused(reason=refused.reason), status=refused.status)
    except msgspec.MsgspecError as error:
        return answer(HolderRefused(reason=f"the body is not as expected: {error}"), status=400)
    except web.HTTPException as error:
        return answer(HolderRefused(reason=error.reason), status=error.status)
    except Exception:  # A bug of ours must not take the engines down with it.
        log.exception("request failed", extra={"http_method": request.method, "http_path": request.path})
        return answer(HolderRefused(reason="the holder failed on this request; its log says why"), status=500)


async def read(request: web.Request, kind: type[T]) -> T:
    return msgspec.json.decode(await request.read(), type=kind)


def answer(body: msgspec.Struct, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", status=status)


def replica_of(request: web.Request) -> str:
    """The replica in the path, with its slashes written as %2F."""
    return request.match_info["replica"]


def epoch_of(request: web.Request) -> int | None:
    """`?lease_epoch=`: act on this start of the replica only."""
    return number_of(request, "lease_epoch", int, None)


def number_of(request: web.Request, name: str, kind: type[T], default: T | None) -> T:
    """A number in the query. Raises `Refused` for one that is none."""
    text = request.query.get(name)
    if text is None:
        return default  # type: ignore[return-value]
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise Refused(f"{name} must be a number, not {text!r}", status=400) from error

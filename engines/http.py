"""The HTTP side that both engines share: JSON and error bodies, changes that outlive their caller, start and stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engines.errors import EngineError, LoadFailedError, WakeFailedError, invalid
from engines.process import EXIT_FAILED, EXIT_OK, LibraryRecords, Log, process_age_s, stop_on_signals

JSON = "application/json"
# A prompt of 131,072 tokens is about half a MiB; this leaves room for chats with long histories.
BODY_BYTES_MAX = 16 << 20
CLIENT_HUNG_UP = 499  # nginx's code

T = TypeVar("T")


def json_response(body: Any, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type=JSON)


def error_body(error: EngineError) -> bytes:
    """The OpenAI error body."""
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}
    )


def error_response(error: EngineError) -> web.Response:
    """An OpenAI error body; 503 says when to come back."""
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return web.Response(status=error.status, body=error_body(error), content_type=JSON, headers=headers)


def wake_failed_response(error: WakeFailedError) -> web.Response:
    return json_response({"error": error.message, "free_bytes": error.free_bytes}, status=500)


def errors_as_bodies(log: Log) -> Middleware:
    """A middleware by which every refusal, and every bug, leaves as an OpenAI error body."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except EngineError as error:
            return error_response(error)
        except WakeFailedError as error:
            return wake_failed_response(error)
        except web.HTTPRequestEntityTooLarge as error:
            message = f"{error.reason}: at most {BODY_BYTES_MAX} bytes."
            return error_response(invalid(message, code="too_large", status=413))
        except web.HTTPClientError as error:
            code = "not_found" if error.status == 404 else "method_not_allowed"
            message = f"{error.reason}: {request.method} {request.path}."
            return error_response(invalid(message, code=code, status=error.status))
        except ConnectionError:
            return web.Response(status=CLIENT_HUNG_UP)  # nobody reads it
        except web.HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 (an answer for the client, a line for the operator)
            log.error("request failed", path=request.path, reason=repr(error))
            message = f"The engine has a bug: {error!r}."
            return error_response(EngineError(message, status=500, kind="internal_server_error", code="bug"))

    return middleware


class Changes:
    """Changes of an engine's life that end even when their caller goes away: half a sleep would be a leak."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def finish(self, change: Coroutine[Any, Any, T]) -> T:
        """The change's result; cancelling the caller does not cancel it."""
        task = asyncio.ensure_future(change)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: its caller may be gone, and the engine has logged what matters


class Workload(Protocol):
    """What `serve` runs."""

    async def load(self) -> None:
        """Get ready. Raises `LoadFailedError`."""

    async def run(self) -> None:
        """Work until cancelled."""

    async def close(self) -> None:
        """End within a second and a half, and free the device. Called once, also when `load` did not end."""


async def serve(workload: Workload, app: web.Application, *, host: str, port: int, log: Log) -> int:
    """HTTP first, so that health can be asked; then load, work, and stop on a signal. The exit code."""
    stop = asyncio.Event()
    stop_on_signals(stop, log)
    logging.getLogger().addHandler(LibraryRecords(log))
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,  # a client that hangs up cancels its handler, which frees its KV memory
        shutdown_timeout=0.5,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        log.error("cannot listen", host=host, port=port, reason=str(error))
        await runner.cleanup()
        return EXIT_FAILED
    log.info("listening", host=host, port=runner.addresses[0][1], start_s=round(process_age_s(), 3))
    life = asyncio.create_task(_load_and_run(workload))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({life, stopping}, return_when=asyncio.FIRST_COMPLETED)
    code = EXIT_OK
    try:
        if life.done():
            life.result()
    except LoadFailedError as error:
        log.error(error.message, **error.fields)
        code = EXIT_FAILED
    await workload.close()
    for task in (life, stopping):
        task.cancel()
    await runner.cleanup()
    log.info("stopped", exit_code=code)
    return code


async def _load_and_run(workload: Workload) -> None:
    await workload.load()
    await workload.run()

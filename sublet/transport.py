"""NATS, as the client uses it: a stored publish with its answer, and request and reply."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Connection

from sublet.client import Outgoing
from sublet.context import START_IT, Context
from sublet.errors import Refused, Unreachable

CONNECT_TIMEOUT_S: Final = 3.0
# One attempt to store a command; the same bytes and id are sent again until the deadline, and stored once.
STORE_ATTEMPT_S: Final = 2.0
STORE_PAUSE_S: Final = 0.2


class NatsTransport:
    """One connection. Closing it loses nothing: every command was acknowledged by the server before its answer."""

    def __init__(self, connection: Connection, denials: list[str]) -> None:
        self._connection = connection
        self._denials = denials
        """Permission violations that the server has told; they reach us beside the call that caused them."""

    @classmethod
    @asynccontextmanager
    async def open(cls, context: Context) -> AsyncIterator[NatsTransport]:
        """Connect within 3 s, or at once find that no server listens. Raises `Unreachable` or `Refused`."""
        denials: list[str] = []
        connection = await _connect(context, denials)
        try:
            yield cls(connection, denials)
        finally:
            with suppress(nats.errors.Error, TimeoutError):
                await asyncio.shield(connection.close())

    async def command(self, outgoing: Outgoing, *, timeout_s: float) -> bytes | None:
        """Subscribe first, then store: the server takes both in this order, so no answer is missed."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        subscription = await self._connection.subscribe(outgoing.answer_subject, max_msgs=1)
        try:
            await self._store(outgoing, deadline_s=deadline_s)
            remaining_s = deadline_s - asyncio.get_running_loop().time()
            message = await subscription.next_msg(timeout=max(0.01, remaining_s))
        except nats.errors.TimeoutError:
            self._raise_denial()
            return None
        finally:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()
        return bytes(message.data)

    async def _store(self, outgoing: Outgoing, *, deadline_s: float) -> None:
        """Publish until the inbox has acknowledged; the id makes repeating harmless."""
        clock = asyncio.get_running_loop().time
        headers = {"Nats-Msg-Id": outgoing.id, "traceparent": outgoing.traceparent}
        stream = self._connection.jetstream()
        while True:
            attempt_s = min(STORE_ATTEMPT_S, max(0.05, deadline_s - clock()))
            try:
                await stream.publish(outgoing.subject, outgoing.body, timeout=attempt_s, headers=headers)
            except (
                nats.errors.TimeoutError,
                nats.js.errors.NoStreamResponseError,
                nats.js.errors.ServiceUnavailableError,
            ) as error:
                self._raise_denial()
                if clock() + STORE_PAUSE_S >= deadline_s:
                    raise Unreachable(
                        "the command was not stored: the event server's inbox does not answer", fix=START_IT
                    ) from error
            except nats.js.errors.APIError as error:
                raise Refused(
                    f"the event server did not store the command: {error.description}", code="not_stored"
                ) from error
            else:
                return
            await asyncio.sleep(STORE_PAUSE_S)

    async def request(self, subject: str, body: bytes, *, timeout_s: float, traceparent: str) -> bytes:
        service = subject.split(".")[3]
        try:
            reply = await self._connection.request(
                subject, body, timeout=timeout_s, headers={"traceparent": traceparent}
            )
        except nats.errors.NoRespondersError as error:
            self._raise_denial()
            raise Unreachable(
                f"{service} does not answer: the event server is up, but no {service} is active", fix=START_IT
            ) from error
        except nats.errors.TimeoutError as error:
            self._raise_denial()
            raise Unreachable(f"{service} did not answer within {timeout_s:g} s", fix=START_IT) from error
        return bytes(reply.data)

    def _raise_denial(self) -> None:
        if self._denials:
            raise Refused(
                f"the event server does not allow it: {self._denials[0]}",
                fix="use credentials of this tenant: check tenant and nkey_seed_path in the context file",
                code="not_allowed",
            )


async def _connect(context: Context, denials: list[str]) -> Connection:
    """A connection, or the reason why there is none; the library itself would try for minutes."""
    servers = [url.strip() for url in context.nats_url.split(",")]
    first_errors: list[BaseException] = []
    all_refused = asyncio.Event()

    async def note(error: Exception) -> None:
        if "permissions violation" in str(error).lower():
            denials.append(str(error).removeprefix("nats: "))
        first_errors.append(error)
        if len(first_errors) >= len(servers):
            all_refused.set()

    connecting = asyncio.ensure_future(
        nats.connect(
            servers=servers,
            name="sublet",
            nkeys_seed_str=context.nkey_seed() or None,
            inbox_prefix=(context.inbox_prefix or f"_INBOX_{context.tenant}").encode(),
            error_cb=note,
            connect_timeout=CONNECT_TIMEOUT_S,
            reconnect_time_wait=0.25,
            max_reconnect_attempts=-1,
        )
    )
    refused = asyncio.ensure_future(all_refused.wait())
    await asyncio.wait({connecting, refused}, timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    refused.cancel()
    if connecting.done() and not connecting.cancelled() and connecting.exception() is None:
        return connecting.result()
    connecting.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await connecting
    raise _why_not(_without_credentials(context.nats_url), first_errors)


def _without_credentials(urls: str) -> str:
    """Addresses as they may be shown."""
    return re.sub(r"//[^/@,]*@", "//", urls)


def _why_not(url: str, errors: list[BaseException]) -> Unreachable | Refused:
    text = str(errors[0]) if errors else f"no answer within {CONNECT_TIMEOUT_S:g} s"
    if "authorization" in text.lower():
        return Refused(
            f"the event server at {url} does not accept these credentials",
            fix="check nkey_seed_path in the context file; `make up` writes both anew",
            code="not_allowed",
        )
    return Unreachable(f"the event server at {url} cannot be reached", cause=text.removeprefix("nats: "), fix=START_IT)

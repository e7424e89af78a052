"""The bus over NATS JetStream. nats-py carries the bytes and reconnects; all else is ours (docs/adr/0010)."""

import asyncio
import base64
import logging
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import anyio
import msgspec
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import ProtocolError
from nats.protocol.parser import Parser as NatsPyParser

from kit.bus import (
    APPEND_ENTRIES_MAX,
    Acknowledged,
    AppendRefused,
    AppendUnknown,
    BusError,
    Entry,
    Forbidden,
    NoAnswer,
    Received,
    Stored,
    Stream,
    subject_matches,
)
from kit.nats_connection import ASK_TIMEOUT_S, Answer, Connection, Receive, Unanswered
from kit.nats_lease import Leases
from kit.nats_parser import Parser, ProtocolViolation
from kit.nats_reading import NatsReading
from kit.nats_wire import (
    DEDUPLICATION_HEADER,
    NO_MESSAGE_FOUND,
    TRACE_HEADER,
    ApiError,
    append_error,
    fact_block,
    frame,
    header_block,
    parsed_headers,
    service_inbox,
    status_of,
    stored_message,
    unix_seconds,
)

CONNECT_TIMEOUT_S: Final = 10.0
"""For the first connection; afterwards it reconnects for ever."""
BATCH_ENTRY_TIMEOUT_S: Final = 0.005
"""More for each entry of a batch: server 2.12 syncs them one by one, 0.5 ms each on a quiet disk (2.15: 0.03)."""
RECONNECT_WAIT_S: Final = 0.1
PING_INTERVAL_S: Final = 2
PINGS_OUTSTANDING_MAX: Final = 2
"""A server that fell silent is left for another within 6 s, about as fast as a cluster chooses a new leader."""
CLOSE_TIMEOUT_S: Final = 3.0
CANCEL_AGAIN_S: Final = 0.05
STORE_TIMEOUT_S: Final = 15.0
"""A three-node cluster chooses a new leader within 10 s."""
STORE_BACKOFF_FIRST_S: Final = 0.05
STORE_BACKOFF_MAX_S: Final = 1.0
PENDING_BYTES_MAX: Final = 8 * 1024 * 1024
"""Waiting for a peer that does not read. Beyond it nothing is taken: questions fail, what is fleeting is dropped."""
WRITE_BYTES_MAX: Final = 128 * 1024
"""Collected within one turn of the loop before it is written."""

log = logging.getLogger(__name__)


class _Incoming(Parser):
    """In the place of nats-py's parser, which keeps all lines that are no messages."""

    def __init__(self, receivers: Mapping[bytes, Receive], others: NatsPyParser) -> None:
        super().__init__(receivers, others.parse)
        self._others = others

    def reset(self) -> None:
        super().reset()
        self._others.reset()

    async def parse(self, data: bytes) -> None:
        try:
            await super().parse(data)
        except ProtocolViolation as error:
            raise ProtocolError(str(error)) from error  # The one that makes nats-py connect anew.


class _Client(Client):
    """nats-py as a `kit.nats_connection.Transport`.

    Messages reach their receiver in the read loop (`kit.nats_parser`); nats-py's parser gets the other lines. For that,
    private names of nats-py are used; `tests/integration/bus` guards the list.
    """

    def __init__(self) -> None:
        super().__init__()
        self._receivers: dict[bytes, Receive] = {}
        self._ps = _Incoming(self._receivers, self._ps)  # type: ignore[assignment]  # Has all that is used of one.
        self._on_denied: Callable[[str], None] = log.warning
        self._outgoing: list[bytes] = []
        """Sent in this turn of the loop, not yet written: one write costs about as much as twenty messages."""
        self._outgoing_bytes = 0
        self._is_stalled = False

    async def start(
        self, url: str, connection: Connection, *, nkey_seed: str | None, tls: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        """Connects, or raises `Forbidden` or `BusError` with a sentence that says why not."""
        refusal, is_starting = "", True

        async def on_error(error: Exception) -> None:
            nonlocal refusal
            log.debug("NATS connection", extra={"reason": str(error)})
            if "authorization violation" in str(error).lower() and is_starting:
                refusal = str(error)
                scope.cancel()

        async def on_lost() -> None:
            connection.lost()

        async def on_back() -> None:
            connection.back()

        self._on_denied = connection.denied
        with anyio.move_on_after(timeout_s) as scope:
            await self.connect(
                servers=[server.strip() for server in url.split(",")],
                error_cb=on_error,
                disconnected_cb=on_lost,
                reconnected_cb=on_back,
                name=connection.user,
                connect_timeout=2,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # Passed on to asyncio.sleep.
                max_reconnect_attempts=-1,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=PINGS_OUTSTANDING_MAX,
                nkeys_seed_str=nkey_seed,
                tls=tls,
            )
        is_starting = False
        if refusal:
            raise Forbidden(f"the NATS server at {url} does not know this key: {refusal}")
        if not self.is_connected:
            raise BusError(f"no NATS server answers at {url} within {timeout_s} s: {self.last_error}")

    async def stop(self) -> None:
        """Closed within `CLOSE_TIMEOUT_S`, whatever state it is in; none of its tasks is left."""
        self._write_outgoing()
        tasks = (self._reading_task, self._ping_interval_task, self._flusher_task, self._reconnection_task)
        # A task of its own: closing during a reconnect can end with a cancellation that nobody asked for.
        closing = asyncio.ensure_future(self.close())
        with anyio.CancelScope(shield=True):
            await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_S)
            running = {task for task in (closing, *tasks) if task is not None and not task.done()}
            ends_at = time.monotonic() + CLOSE_TIMEOUT_S
            # Again and again: while it reconnects, nats-py takes a cancellation for a failed try and goes on.
            while running and time.monotonic() < ends_at:
                for task in running:
                    task.cancel()
                _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
        if closing.done() and not closing.cancelled() and (error := closing.exception()):
            log.debug("closing the NATS connection", extra={"reason": repr(error)})
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    # ---- kit.nats_connection.Transport -------------------------------------------------------------------------

    def send(self, frames: bytes) -> bool:
        if not self.is_connected or (self._is_stalled and self._still_stalled()):
            return False
        self._put(frames)
        return True

    def _put(self, frames: bytes) -> None:
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._write_outgoing)
        self._outgoing.append(frames)
        self._outgoing_bytes += len(frames)
        if self._outgoing_bytes > WRITE_BYTES_MAX:
            self._write_outgoing()

    def _write_outgoing(self) -> None:
        """One write for all that a turn of the loop sent. If the connection went within it, that is dropped."""
        frames = b"".join(self._outgoing)
        self._outgoing.clear()
        self._outgoing_bytes = 0
        if frames and self.is_connected and self._transport is not None:
            self._transport.write(frames)
            self._is_stalled = self._still_stalled()

    def _still_stalled(self) -> bool:
        """Whether more waits for the peer to read it than may."""
        writer = getattr(self._transport, "_io_writer", None)
        self._is_stalled = writer is not None and writer.transport.get_write_buffer_size() > PENDING_BYTES_MAX
        return self._is_stalled

    def add_subscription(self, subject: str, queue: str, receive: Receive) -> int:
        self._sid += 1
        self._receivers[b"%d" % self._sid] = receive
        self._subs[self._sid] = Subscription(self, self._sid, subject, queue=queue)
        # Also to a peer that does not read now: nobody would send it again. A new connection gets it from nats-py.
        self._put(f"SUB {subject} {queue} {self._sid}\r\n".encode())
        return self._sid

    def remove_subscription(self, sid: int) -> None:
        self._subs.pop(sid, None)
        # Nothing to tell a server that is away; and a reader that nobody closed goes after the loop has ended.
        if self._receivers.pop(b"%d" % sid, None) is not None and self.is_connected:
            self._put(b"UNSUB %d\r\n" % sid)

    def ping(self) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self.is_connected and self._transport is not None:
            # Behind all that was sent before; and the answers to PINGs, of which nats-py writes some, come in order.
            self._write_outgoing()
            self._pongs.append(future)
            self._transport.write(b"PING\r\n")
        return future

    async def drained(self) -> None:
        """Returns when the peer reads fast enough for more."""
        if self._transport is not None:
            if self._outgoing_bytes > WRITE_BYTES_MAX // 2:
                self._write_outgoing()
            try:
                await self._transport.drain()  # type: ignore[no-untyped-call]
            except OSError:
                return  # The read loop sees it too, and reconnects.

    # ---- overridden --------------------------------------------------------------------------------------------

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:
            self._on_denied(err_msg)
            return
        # nats-py would close for good; we come back, for ever.
        log.warning("NATS server error", extra={"reason": err_msg})
        await self._process_op_err(NatsError(err_msg))


class NatsBus:
    """One connection; enter it to connect. See `kit.bus.Bus`. For asyncio, with or without uvloop."""

    def __init__(
        self,
        url: str,
        nkey_seed: str | None = None,
        name: str = "anonymous",
        *,
        inbox_prefix: str = "",
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """`url` may name several servers, with commas. `name` is the user whose permissions these are."""
        self._url = url
        self._nkey_seed = nkey_seed
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._client = _Client()
        self._connection = Connection(self._client, user=name, inbox_prefix=inbox_prefix or service_inbox(name))
        self._leases = Leases(self._connection)
        self._replies: dict[str, tuple[str, bytes]] = {}
        """{prefix: (id of the last entry that was not acknowledged in time, where its answers come)}"""
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._callback_tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        try:
            await self._client.start(
                self._url,
                self._connection,
                nkey_seed=self._nkey_seed,
                tls=self._tls,
                timeout_s=self._connect_timeout_s,
            )
        except BaseException:
            await self._client.stop()
            raise
        self._connection.open()
        self._connection.on_back = self._start_callbacks
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._connection.close()
        for task in self._callback_tasks:
            task.cancel()
        await self._client.stop()

    # ---- stored ------------------------------------------------------------------------------------------------

    async def append(self, prefix: str, entries: Sequence[Entry], *, last_seq: int) -> Acknowledged:
        """See `kit.bus.Bus`."""
        assert 0 < len(entries) <= APPEND_ENTRIES_MAX, len(entries)
        assert all(subject_matches(prefix, entry.subject) for entry in entries), prefix
        check = [
            ("Nats-Expected-Last-Subject-Sequence", str(last_seq)),
            ("Nats-Expected-Last-Subject-Sequence-Subject", prefix),
        ]
        final = entries[-1]
        if len(entries) == 1:
            return await self._append(prefix, final, fact_block(check, final), before=())
        # The check is on the first; all or none are stored. A new attempt is a new batch to the server: what is left of
        # an old one is dropped by it after a while.
        batch_id = secrets.token_hex(8)
        before = []
        for number, entry in enumerate(entries[:-1], start=1):
            batch = [("Nats-Batch-Id", batch_id), ("Nats-Batch-Sequence", str(number))]
            headers = fact_block([*batch, *check] if number == 1 else batch, entry)
            before.append((entry.subject, frame(entry.subject, entry.body, headers=headers)))
        commit = [
            ("Nats-Batch-Id", batch_id),
            ("Nats-Batch-Sequence", str(len(entries))),
            ("Nats-Batch-Commit", "1"),
        ]
        return await self._append(prefix, final, fact_block(commit, final), before=before)

    async def _append(
        self, prefix: str, entry: Entry, headers: bytes, *, before: Sequence[tuple[str, bytes]]
    ) -> Acknowledged:
        unanswered_id, reply = self._replies.pop(prefix, ("", b""))
        if unanswered_id != entry.id:
            reply = self._connection.new_reply()
        timeout_s = ASK_TIMEOUT_S + BATCH_ENTRY_TIMEOUT_S * len(before)
        try:
            answer = await self._connection.ask(
                entry.subject, entry.body, headers=headers, before=before, timeout_s=timeout_s, reply=reply
            )
        except Unanswered as error:
            self._replies[prefix] = (entry.id, reply)
            raise AppendUnknown(str(error)) from error
        except Forbidden as error:
            raise AppendRefused(str(error)) from error
        return Acknowledged(last_seq=_acknowledged_seq(answer))

    async def publish_stored(self, subject: str, body: bytes, *, id: str, traceparent: str = "") -> int:
        """See `kit.bus.Bus`. The server's table of ids makes resending harmless."""
        headers = [(DEDUPLICATION_HEADER, id)]
        if traceparent:
            headers.append((TRACE_HEADER, traceparent))
        block = header_block(headers)
        backoff_s = STORE_BACKOFF_FIRST_S
        reply = self._connection.new_reply()
        ends_at = time.monotonic() + STORE_TIMEOUT_S
        while True:
            try:
                return _acknowledged_seq(await self._connection.ask(subject, body, headers=block, reply=reply))
            except Forbidden as error:
                raise AppendRefused(str(error)) from error
            except (Unanswered, AppendUnknown) as error:
                if time.monotonic() + backoff_s > ends_at:
                    raise AppendUnknown(f"not stored within {STORE_TIMEOUT_S} s: {error}") from error
            await anyio.sleep(backoff_s)
            backoff_s = min(STORE_BACKOFF_MAX_S, backoff_s * 2)

    async def last(self, prefix: str) -> Stored | None:
        """See `kit.bus.Bus`."""
        try:
            answered = await self._connection.api(f"STREAM.MSG.GET.{Stream.HISTORY}", {"last_by_subj": prefix})
        except ApiError as error:
            if error.error_code == NO_MESSAGE_FOUND:
                return None
            raise
        found = answered["message"]
        return stored_message(
            found["seq"],
            unix_seconds(found["time"]),
            found["subject"],
            base64.b64decode(found.get("data", "")),
            base64.b64decode(found.get("hdrs", "")),
        )

    def read(self, stream: Stream, filters: Sequence[str], *, after_seq: int, stream_id: str = "") -> NatsReading:
        """See `kit.bus.Bus`."""
        return NatsReading(self._connection, stream, tuple(filters), after_seq=after_seq, stream_id=stream_id)

    # ---- fleeting ----------------------------------------------------------------------------------------------

    async def publish(self, subject: str, body: bytes, *, traceparent: str = "", reply_subject: str = "") -> None:
        """See `kit.bus.Bus`. A forbidden subject is logged and counted: the server tells later, and nobody waits."""
        headers = header_block([(TRACE_HEADER, traceparent)]) if traceparent else b""
        self._client.send(frame(subject, body, reply=reply_subject, headers=headers))
        await self._client.drained()

    @asynccontextmanager
    async def subscribe(
        self, subject: str, receive: Callable[[Received], None], *, queue: str = ""
    ) -> AsyncIterator[None]:
        """See `kit.bus.Bus`."""

        def receive_raw(subject: bytes, reply: bytes, headers: bytes | None, body: bytes) -> None:
            trace = parsed_headers(headers).get(b"traceparent", b"") if headers else b""
            receive(
                Received(
                    subject=subject.decode(),
                    body=body,
                    reply_subject=reply.decode(),
                    traceparent=trace.decode(errors="replace"),
                )
            )

        sid = await self._connection.subscribe(subject, receive_raw, queue=queue)
        try:
            yield
        finally:
            self._client.remove_subscription(sid)

    async def request(self, subject: str, body: bytes, *, timeout_s: float, traceparent: str = "") -> bytes:
        """See `kit.bus.Bus`."""
        headers = header_block([(TRACE_HEADER, traceparent)]) if traceparent else b""
        try:
            answer = await self._connection.ask(subject, body, headers=headers, timeout_s=timeout_s)
        except Unanswered as error:
            raise NoAnswer(f"{subject}: {error}") from error
        if status_of(answer.headers)[0]:
            raise NoAnswer(f"nobody answers on {subject}")
        return answer.body

    async def acquire_lease(self, name: str, holder: str, *, term_s: float) -> bool:
        """See `kit.bus.Bus`."""
        return await self._leases.acquire(name, holder, term_s=term_s)

    # ---- about the connection ----------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def denied_count(self) -> int:
        """How often the server refused something for want of a permission."""
        return self._connection.denied_count

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """See `kit.bus.Bus`."""
        self._callbacks.append(callback)

    async def api(self, name: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call of JetStream's API, for administration. Raises `kit.nats_wire.ApiError`, `BusError`."""
        return await self._connection.api(name, request)

    def _start_callbacks(self) -> None:
        for callback in self._callbacks:
            task = asyncio.ensure_future(callback())
            self._callback_tasks.add(task)
            task.add_done_callback(self._callback_tasks.discard)


class _Acknowledgement(msgspec.Struct):
    seq: int = 0
    error: dict[str, Any] | None = None


_ACKNOWLEDGEMENT: Final = msgspec.json.Decoder(_Acknowledgement)


def _acknowledged_seq(answer: Answer) -> int:
    if status_of(answer.headers)[0]:
        raise AppendUnknown("no stream takes it now")
    try:
        acknowledged = _ACKNOWLEDGEMENT.decode(answer.body)
    except msgspec.MsgspecError as error:
        raise AppendUnknown(f"the answer is no acknowledgement: {error}") from error
    if acknowledged.error is not None:
        raise append_error(acknowledged.error)
    return acknowledged.seq

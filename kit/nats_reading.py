"""An ordered read of a stream: pull requests kept open, re-created behind the last message when anything seems wrong.

The consumer lives in the server's memory, takes no acknowledgements and is thrown away at the first doubt: a gap in its
numbering, silence for longer than its heartbeats allow, an error status, a reconnect.
"""

import asyncio
import json
import logging
import secrets
from collections import deque
from typing import Any, Final, Self

import anyio

from kit.bus import EXPIRING_STREAMS, CaughtUp, HistoryGone, Stored, Stream, subject_matches
from kit.nats_connection import Connection, Unanswered
from kit.nats_wire import (
    STREAM_NOT_FOUND,
    ApiError,
    delivery_of,
    disjoint_filters,
    frame,
    parsed_headers,
    status_of,
    stored_message,
)

# A pull is renewed when what is asked for and not handled falls below this, so at most twice as many wait in memory,
# and a slow reader holds the server back.
PULL_MESSAGES: Final = 1000
PULL_BYTES: Final = 8 * 1024 * 1024
PULL_EXPIRES_S: Final = 30.0
HEARTBEAT_S: Final = 0.5
SILENCE_MAX_S: Final = 2.5 * HEARTBEAT_S
"""Two heartbeats missed. Together with a reconnect it stays below the 2 s that the port promises."""
RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 0.25
CONSUMER_INACTIVE_S: Final = 5.0
"""After this the server removes a consumer that nobody pulls from."""

# Statuses that end one pull and no more; the number of messages that it did not get comes with them.
_PULL_ENDED: Final = frozenset({"message size exceeds maxbytes", "batch completed"})

log = logging.getLogger(__name__)


class _Source:
    """One consumer and what it delivered. Its callback runs on the loop's thread."""

    def __init__(
        self,
        connection: Connection,
        stream: Stream,
        *,
        sieve: tuple[str, ...],
        buffer: deque[Stored | CaughtUp],
        wake: asyncio.Event,
    ) -> None:
        """What matches none of `sieve` is skipped; an empty one lets everything through."""
        self.name = f"read-{secrets.token_hex(8)}"
        self.problem = ""
        """Why it must be replaced; empty while it is sound."""
        self.position = 0
        """All that matches up to this stream sequence is in the buffer or handled."""
        self.end_when_created = CaughtUp(last_seq=0)
        self.missing_until_end: int | None = None
        """Messages still to come until what was in the stream at creation is delivered; None when nobody asks."""
        self.has_told_end = False
        self._connection = connection
        self._stream = stream
        self._sieve = sieve
        self._buffer = buffer
        self._wake = wake
        self._inbox = connection.new_inbox()
        self._sid = connection.transport.add_subscription(self._inbox, "", self._receive)
        self.pull_subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{self.name}"
        self._delivered_count = 0
        self._asked_count = 0
        self._heard_at_s = asyncio.get_running_loop().time()

    def pull(self) -> None:
        """Ask for more, if little is on its way."""
        if self._asked_count + len(self._buffer) > PULL_MESSAGES:
            return
        if not self._asked_count:
            self._heard_at_s = asyncio.get_running_loop().time()
        request = {
            "batch": PULL_MESSAGES,
            "max_bytes": PULL_BYTES,
            "expires": int(PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
        }
        pull = frame(self.pull_subject, json.dumps(request).encode(), reply=self._inbox)
        if not self._connection.transport.send(pull):
            self.fail("not connected")
        self._asked_count += PULL_MESSAGES

    def check_silence(self) -> None:
        silent_s = asyncio.get_running_loop().time() - self._heard_at_s
        if self._asked_count and silent_s > SILENCE_MAX_S:
            self.fail(f"silent for {silent_s:.1f} s")

    def fail(self, problem: str) -> None:
        self.problem = self.problem or problem
        self._wake.set()

    def close(self) -> None:
        self.problem = self.problem or "closed"
        self._connection.transport.remove_subscription(self._sid)

    def tell_end(self) -> None:
        """Puts `CaughtUp` behind what was delivered so far."""
        self.missing_until_end = None
        self.has_told_end = True
        self.position = max(self.position, self.end_when_created.last_seq)
        self._buffer.append(CaughtUp(last_seq=self.position, stream_id=self.end_when_created.stream_id))

    def _receive(self, subject: bytes, reply: bytes, headers: bytes | None, body: bytes) -> None:
        self._heard_at_s = asyncio.get_running_loop().time()
        if self.problem:
            return
        if not reply.startswith(b"$JS.ACK."):
            self._receive_status(headers)
            return
        seq, delivery, time_s, waiting_count = delivery_of(reply)
        self._asked_count -= 1
        self._delivered_count += 1
        if delivery != self._delivered_count:
            self.fail(f"delivery {delivery} came as number {self._delivered_count}")
            return
        self.position = seq
        text = subject.decode()
        if not self._sieve or any(subject_matches(pattern, text) for pattern in self._sieve):
            self._buffer.append(stored_message(seq, time_s, text, body, headers))
        if self.missing_until_end is not None:
            self.missing_until_end -= 1
            if self.missing_until_end <= 0 or not waiting_count:
                self.tell_end()
        self._wake.set()

    def _receive_status(self, headers: bytes | None) -> None:
        status, text = status_of(headers)
        if status == 100:
            if self.missing_until_end is not None and self._stream in EXPIRING_STREAMS:
                # What was counted has expired since; nothing more comes.
                self.tell_end()
                self._wake.set()
            return
        if status == 408 or (status == 409 and text.lower() in _PULL_ENDED):
            unused = parsed_headers(headers).get(b"nats-pending-messages", b"")
            self._asked_count = max(0, self._asked_count - int(unused)) if unused.isdigit() else 0
            self._wake.set()
            return
        self.fail(f"status {status} {text}".strip())


class NatsReading:
    """See `kit.bus.Reading`."""

    def __init__(
        self, connection: Connection, stream: Stream, filters: tuple[str, ...], *, after_seq: int, stream_id: str
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._filters = disjoint_filters(filters)
        self._sieve = () if set(self._filters) <= set(filters) else filters
        self._position = after_seq
        """All that matches up to this stream sequence is in the buffer or handled; not kept up while a source lives."""
        self._stream_id = stream_id
        self._is_caught_up = False
        self._is_closed = False
        self._source: _Source | None = None
        self._buffer: deque[Stored | CaughtUp] = deque()
        self._wake = asyncio.Event()
        connection.followers.add(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Stored | CaughtUp:
        while not self._is_closed:
            if self._buffer:
                return self._buffer.popleft()
            source = self._source
            if source is None or source.problem:
                source = await self._open()
            source.pull()
            await self._wait(source)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `kit.bus.Reading`. Waits for nothing."""
        self._is_closed = True
        self._connection.followers.discard(self)
        self._drop_source()
        self._wake.set()

    def __del__(self) -> None:
        self._drop_source()

    def connection_changed(self) -> None:
        """The consumer is gone, or will be: it lives in the memory of a server that we lost."""
        if self._source is not None:
            self._source.fail("the connection was lost")
        self._wake.set()

    async def _wait(self, source: _Source) -> None:
        self._wake.clear()
        if self._buffer or source.problem:
            return
        with anyio.move_on_after(SILENCE_MAX_S):
            await self._wake.wait()
        if not self._wake.is_set():
            source.check_silence()
        if source.pull_subject.lower() in self._connection.denied_publishes:
            raise self._connection.forbidden(f"read the stream {self._stream}")

    def _drop_source(self) -> None:
        if self._source is not None:
            self._position = max(self._position, self._source.position)
            self._is_caught_up = self._is_caught_up or self._source.has_told_end
            self._source.close()
            self._source = None

    async def _open(self) -> _Source:
        """A new consumer behind all that has been received; tries until there is one."""
        retry_s = RETRY_FIRST_S
        if self._source is not None:
            log.info("reading again", extra={"stream": str(self._stream), "reason": self._source.problem})
        while True:
            self._drop_source()
            await self._connection.until_connected()
            try:
                return await self._create_source()
            except Unanswered:
                pass
            except ApiError as error:
                if error.error_code == STREAM_NOT_FOUND and self._stream_id:
                    raise HistoryGone(f"there is no stream {self._stream} any more") from error
                if error.error_code != STREAM_NOT_FOUND and not error.is_transient:
                    raise
            await anyio.sleep(retry_s)
            retry_s = min(RETRY_MAX_S, retry_s * 2)

    async def _create_source(self) -> _Source:
        info = await self._connection.api(f"STREAM.INFO.{self._stream}")
        self._check_stream(info)
        source = self._source = _Source(
            self._connection, self._stream, sieve=self._sieve, buffer=self._buffer, wake=self._wake
        )
        source.position = self._position
        # With one filter its subject names it, so that permissions can bound what a reader may see.
        subject = f"CONSUMER.CREATE.{self._stream}.{source.name}"
        config = {
            "name": source.name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._position + 1,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(CONSUMER_INACTIVE_S * 1e9),
        }
        if len(self._filters) == 1:
            subject = f"{subject}.{self._filters[0]}"
            config["filter_subject"] = self._filters[0]
        else:
            config["filter_subjects"] = self._filters
        request = {"stream_name": self._stream, "config": config, "action": "create"}
        created = await self._connection.api(subject, request)
        if not self._is_caught_up:
            source.end_when_created = CaughtUp(last_seq=info["state"]["last_seq"], stream_id=self._stream_id)
            source.missing_until_end = created["num_pending"]
            if source.missing_until_end == 0:
                source.tell_end()
        elif created["num_pending"] == 0:
            source.position = max(source.position, info["state"]["last_seq"])
        return source

    def _check_stream(self, info: dict[str, Any]) -> None:
        stream_id = info["created"]
        self._stream_id = self._stream_id or stream_id
        first_seq, last_seq = info["state"]["first_seq"], info["state"]["last_seq"]
        if stream_id != self._stream_id:
            raise HistoryGone(f"{self._stream} is another stream than the one read before")
        if self._position > last_seq:
            raise HistoryGone(f"{self._stream} ends at {last_seq}, before {self._position}")
        if self._position < first_seq - 1:
            if self._stream not in EXPIRING_STREAMS:
                raise HistoryGone(f"{self._stream} starts at {first_seq}, after {self._position}", first_seq=first_seq)
            self._position = first_seq - 1

"""What a NATS server sends, taken apart: messages go straight to their receivers, all else is somebody else's.

In a long read this is the hottest code there is. A message costs one search for its line's end, one split and two
slices; no task, no queue, no parsed headers.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from kit.nats_connection import Receive

LINE_BYTES_MAX: Final = 64 * 1024
"""Longer than any control line of a server (its own limit is 4,096 by default; INFO may have more)."""

log = logging.getLogger(__name__)


class ProtocolViolation(Exception):
    """These bytes are no NATS protocol: the connection must be made anew."""


class Parser:
    """Keeps what is incomplete until the rest arrives."""

    def __init__(self, receivers: Mapping[bytes, Receive], control: Callable[[bytes], Awaitable[None]]) -> None:
        """`receivers`: {subscription's number in ASCII: receiver}. `control` gets every other line with its end."""
        self._receivers = receivers
        self._control = control
        self._chunks: list[bytes] = []
        self._chunks_bytes = 0
        self._needed_bytes = 0
        """Until so many are there, another look at the chunks would be in vain."""

    def reset(self) -> None:
        """A new connection: what came over the old one is void."""
        self._forget()

    def _forget(self) -> None:
        self._chunks.clear()
        self._chunks_bytes = self._needed_bytes = 0

    async def parse(self, data: bytes) -> None:
        """Take what arrived. Raises `ProtocolViolation`."""
        if self._chunks:
            self._chunks.append(data)
            self._chunks_bytes += len(data)
            if self._chunks_bytes < self._needed_bytes:
                return
            data = b"".join(self._chunks)
            self._forget()
        at = 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            begin = line_end + 2
            if data.startswith((b"MSG ", b"HMSG "), at):
                try:
                    end = self._deliver(data[at:line_end].split(), data, begin)
                except ValueError as error:
                    raise ProtocolViolation(f"malformed: {data[at:line_end][:100]!r}") from error
                if end > len(data):
                    self._keep(data[at:], needed_bytes=end - at)
                    return
                at = end
            else:
                await self._control(data[at:begin])
                at = begin
        if at < len(data):
            if len(data) - at > LINE_BYTES_MAX:
                raise ProtocolViolation("a line without an end")
            self._keep(data[at:], needed_bytes=0)

    def _keep(self, rest: bytes, *, needed_bytes: int) -> None:
        self._chunks.append(rest)
        self._chunks_bytes = len(rest)
        self._needed_bytes = needed_bytes

    def _deliver(self, words: list[bytes], data: bytes, begin: int) -> int:
        """Where the message's frame ends; delivered, if that is within the data. Raises `ValueError`."""
        size = int(words[-1])
        end = begin + size + 2
        if end > len(data):
            return end
        if words[0] == b"MSG":
            subject, sid, *reply, _ = words[1:]
            header_end, headers = begin, None
        else:
            subject, sid, *reply, header_size, _ = words[1:]
            header_end = begin + int(header_size)
            headers = data[begin:header_end]
        if data[end - 2 : end] != b"\r\n" or not begin <= header_end <= end - 2 or len(reply) > 1:
            raise ValueError
        receive = self._receivers.get(sid)
        if receive is not None:
            try:
                receive(subject, reply[0] if reply else b"", headers, data[header_end : end - 2])
            except Exception:
                # A receiver's bug must not end the read loop, which would leave a connection that looks alive.
                log.exception("a receiver failed", extra={"subject": subject.decode(errors="replace")})
        return end

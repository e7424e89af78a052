"""Lines and descriptors over Unix stream sockets."""

import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

import anyio.abc
import msgspec
from anyio.streams.buffered import BufferedByteReceiveStream

from schemas.brokers import DESCRIPTORS_MAX

LINE_BYTES_MAX: Final = 256 * 1024
"""Of a question. The longest names sixteen GPUs."""

_encoder: Final = msgspec.json.Encoder()


class Connection:
    """One peer. Call `say` from one task at a time."""

    def __init__(self, stream: anyio.abc.UNIXSocketStream) -> None:
        self._stream = stream
        self._lines = BufferedByteReceiveStream(stream)

    @property
    def peer_pid(self) -> int:
        """As this process's pid namespace has it; 0 when the peer is not in it."""
        raw = self._stream.extra(anyio.abc.SocketAttribute.raw_socket)  # noqa: S610  # A socket, no query.
        pid, _, _ = struct.unpack("3i", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(pid)

    async def hear(self) -> bytes | None:
        """The next line without its end; None when the peer has gone, or says more than anybody would."""
        try:
            return await self._lines.receive_until(b"\n", LINE_BYTES_MAX)
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound):
            return None
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return None

    async def say(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """One line, with copies of the descriptors beside it. A peer that has gone hears nothing, and that is all."""
        line = _encoder.encode(message) + b"\n"
        batches = [descriptors[at : at + DESCRIPTORS_MAX] for at in range(0, len(descriptors), DESCRIPTORS_MAX)]
        try:
            for batch in batches:
                part, line = (line, b"") if batch is batches[-1] else (line[:1], line[1:])
                await self._stream.send_fds(part, list(batch))
            if line:
                await self._stream.send(line)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return

    async def close(self) -> None:
        await self._stream.aclose()


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

"""The node agent's side of the memory broker: one line of JSON each way over its private socket."""

from typing import Final, TypeVar

import anyio
import msgspec
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

from schemas.brokers import (
    AccountClose,
    AccountOpen,
    BrokerDone,
    BrokerLook,
    BrokerMessage,
    BrokerRefused,
    BrokerView,
    HostReserve,
    ImageForget,
)

T = TypeVar("T", bound=msgspec.Struct)

QUICK_S: Final = 5.0
LINE_BYTES_MAX: Final = 4 * 1024 * 1024
"""A view of 256 accounts is a few hundred KiB."""
REFUSED: Final = b'{"refused"'


class BrokerProblem(Exception):
    """The broker refused, or cannot be reached; `short_by_bytes` when memory was missing."""

    def __init__(self, reason: str, *, short_by_bytes: int = 0) -> None:
        super().__init__(reason)
        self.short_by_bytes = short_by_bytes


class BrokerClient:
    """A connection for each question: a restarted broker is met by the next one."""

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path

    async def look(self) -> BrokerView:
        return await self._ask(BrokerLook(), BrokerView)

    async def open(self, account: AccountOpen) -> None:
        await self._ask(account, BrokerDone)

    async def close(self, account: AccountClose) -> None:
        await self._ask(account, BrokerDone)

    async def reserve(self, wish: HostReserve) -> None:
        await self._ask(wish, BrokerDone)

    async def forget(self, deployment_id: str) -> None:
        """The images of a deployment that will not come back."""
        await self._ask(ImageForget(deployment_id=deployment_id), BrokerDone)

    async def _ask(self, question: BrokerMessage, kind: type[T]) -> T:
        try:
            with anyio.fail_after(QUICK_S):
                async with await anyio.connect_unix(self._path) as stream:
                    line = await _answered(stream, msgspec.json.encode(question))
        except (OSError, TimeoutError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead) as error:
            raise BrokerProblem(f"the memory broker does not answer ({type(error).__name__})") from error
        try:
            if line.startswith(REFUSED):
                refused = msgspec.json.decode(line, type=BrokerRefused)
                raise BrokerProblem(refused.refused, short_by_bytes=refused.short_by_bytes)
            return msgspec.json.decode(line, type=kind)
        except msgspec.MsgspecError as error:
            raise BrokerProblem(f"the memory broker answered what cannot be read: {error}") from error


async def _answered(stream: ByteStream, question: bytes) -> bytes:
    await stream.send(question + b"\n")
    return await BufferedByteReceiveStream(stream).receive_until(b"\n", LINE_BYTES_MAX)

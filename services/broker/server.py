"""The two sockets: one connection, one peer, one question at a time."""

import itertools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import anyio
import anyio.abc
import msgspec
from msgspec import Struct

from schemas.brokers import (
    AccountClose,
    AccountOpen,
    BrokerDone,
    BrokerLook,
    EngineHello,
    HostReserve,
    ImageForget,
    ImageRestore,
    ImageSeal,
    MemoryAsk,
    MemoryReturn,
    Prefetch,
)
from services.broker.broker import Broker, Say
from services.broker.core import Account
from services.broker.refusals import Refused
from services.broker.wire import Connection

AgentAsk: TypeAlias = AccountOpen | AccountClose | ImageForget | HostReserve | Prefetch | BrokerLook
EngineAsk: TypeAlias = MemoryAsk | MemoryReturn | ImageSeal | ImageRestore

_agent_asks: Final = msgspec.json.Decoder(AgentAsk)
_engine_asks: Final = msgspec.json.Decoder(EngineAsk)
_hellos: Final = msgspec.json.Decoder(EngineHello)

CONNECTIONS_MAX: Final = 1024
"""Of engines at a time; one more is closed at once. Each costs a descriptor, of which a process has some thousands."""

HELLO_WITHIN_S: Final = 30.0
"""Anybody on the host may connect; who shows no key for so long is sent away. Engines wait less for their account."""

log = logging.getLogger(__name__)


@asynccontextmanager
async def serving(broker: Broker, *, engine_socket: Path, control_socket: Path) -> AsyncIterator[None]:
    """Both sockets, for the length of the block."""
    connection_ids = itertools.count(1)
    taken = 0

    async def engine(stream: anyio.abc.SocketStream) -> None:
        assert isinstance(stream, anyio.abc.UNIXSocketStream)
        nonlocal taken
        if taken >= CONNECTIONS_MAX:
            await stream.aclose()
            return
        taken += 1
        try:
            await _contained(Connection(stream), _Engine(broker, connection_id=next(connection_ids)).serve)
        finally:
            taken -= 1

    async def agent(stream: anyio.abc.SocketStream) -> None:
        assert isinstance(stream, anyio.abc.UNIXSocketStream)
        await _contained(Connection(stream), _Agent(broker).serve)

    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        serve_all: list[Callable[[], Coroutine[Any, Any, None]]] = []
        for path, mode, serve in ((control_socket, 0o600, agent), (engine_socket, 0o666, engine)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            # The mask and not a later chmod: nobody else may connect in between.
            mask = os.umask(0o777 & ~mode)
            try:
                listener = await stack.enter_async_context(await anyio.create_unix_listener(path))
            finally:
                os.umask(mask)
            serve_all.append(partial(listener.serve, serve))
        # Only now: whoever is answered on one finds the other too.
        for serve_one in serve_all:
            tasks.start_soon(serve_one)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()
            for path in (control_socket, engine_socket):
                path.unlink(missing_ok=True)


async def _contained(connection: Connection, serve: Callable[[Connection], Awaitable[None]]) -> None:
    """A peer's end ends its connection alone."""
    try:
        await serve(connection)
    finally:
        with anyio.CancelScope(shield=True):
            await connection.close()


class _Agent:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def serve(self, connection: Connection) -> None:
        while (line := await connection.hear()) is not None:
            try:
                answer = await self._answer(_agent_asks.decode(line))
            except Refused as refused:
                answer = refused.message()
            except msgspec.DecodeError as error:
                answer = Refused(f"that is no question: {error}").message()
            await connection.say(answer)

    async def _answer(self, wish: AgentAsk) -> Struct:
        match wish:
            case AccountOpen():
                return self._broker.open_account(wish)
            case AccountClose():
                return await self._broker.close_account(wish)
            case ImageForget():
                return self._broker.forget(wish)
            case HostReserve():
                return self._broker.reserve(wish)
            case Prefetch():
                return await self._broker.prefetch(wish)
            case BrokerLook():
                return self._broker.view()


class _Engine:
    def __init__(self, broker: Broker, *, connection_id: int) -> None:
        self._broker = broker
        self._connection_id = connection_id

    async def serve(self, connection: Connection) -> None:
        account = None
        with anyio.move_on_after(HELLO_WITHIN_S):
            account = await self._hello(connection)
        if account is None:
            return

        async def say(message: Struct, descriptors: Sequence[int]) -> None:
            await connection.say(message, descriptors)

        try:
            while (line := await connection.hear()) is not None:
                try:
                    answer = await self._answer(account, _engine_asks.decode(line), say)
                except Refused as refused:
                    answer = refused.message()
                except msgspec.DecodeError as error:
                    answer = Refused(f"that is no question: {error}").message()
                if answer is not None:
                    await connection.say(answer)
        finally:
            self._broker.accounts.disconnected(account, self._connection_id)

    async def _hello(self, connection: Connection) -> Account | None:
        """The account whose key was shown; after a refusal the engine may say hello again."""
        while (line := await connection.hear()) is not None:
            try:
                account = self._broker.hello(
                    _hellos.decode(line), connection_id=self._connection_id, pid=connection.peer_pid
                )
            except Refused as refused:
                await connection.say(refused.message())
            except msgspec.DecodeError as error:
                await connection.say(Refused(f"say hello first: {error}").message())
            else:
                await connection.say(BrokerDone())
                return account
        return None

    async def _answer(self, account: Account, wish: EngineAsk, say: Say) -> Struct | None:
        match wish:
            case MemoryAsk():
                await self._broker.ask(account, wish, connection_id=self._connection_id, say=say)
                return None
            case MemoryReturn():
                return await self._broker.give_back(account, wish, connection_id=self._connection_id)
            case ImageSeal():
                return await self._broker.seal(account, wish)
            case ImageRestore():
                await self._broker.restore(account, wish, connection_id=self._connection_id, say=say)
                return None

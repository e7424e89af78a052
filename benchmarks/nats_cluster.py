"""Three nats-servers of one cluster on this host, each to be killed, paused and started again by name."""

import os
import signal
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import anyio

from kit.bus import BusError, Stream
from kit.bus_nats import NatsBus
from kit.nats_server import ClusterConfig, GiB, NatsServer, ServerConfig, ensure_streams_soon

NODE_COUNT = 3
_LOOK_EVERY_S = 0.1


@dataclass(slots=True)
class NatsCluster:
    """Enter it with `async with`: then every stream is there, on three servers that sync before they answer."""

    directory: Path
    """For each server's file, log and, unless there is a `store_directory`, store."""
    store_directory: Path | None = None
    max_file_store_bytes: int = GiB
    servers: dict[str, NatsServer] = field(default_factory=dict)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack, repr=False)
    _bus: NatsBus | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """All three, as a client's setting names them."""
        return ",".join(server.url for server in self.servers.values())

    def __post_init__(self) -> None:
        ports = free_ports(NODE_COUNT)
        routes = tuple(f"nats://127.0.0.1:{port}" for port in ports)
        for number, port in enumerate(ports, start=1):
            name = f"n{number}"
            config = ServerConfig(
                store_directory=(self.store_directory or self.directory) / name / "store",
                max_file_store_bytes=self.max_file_store_bytes,
                server_name=name,
                cluster=ClusterConfig(name="sublet", listen=f"127.0.0.1:{port}", routes=routes),
            )
            self.servers[name] = NatsServer(self.directory / name, config)

    async def __aenter__(self) -> Self:
        try:
            self._stack.callback(self.kill_all)  # Servers without a quorum take long to end in order.
            await self.start_all()
            self._bus = await self._stack.enter_async_context(NatsBus(self.url, name="cluster"))
            await ensure_streams_soon(self._bus, replica_count=NODE_COUNT, timeout_s=60)
            await self.until_current()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()

    async def start_all(self) -> None:
        for server in self.servers.values():
            await server.start_async()

    def kill_all(self) -> None:
        for server in self.servers.values():
            server.kill()

    def kill(self, name: str) -> None:
        self.servers[name].kill()

    async def start(self, name: str) -> None:
        await self.servers[name].start_async()

    def pause(self, name: str) -> None:
        """Silent, with its connections open, until `resume`."""
        os.kill(self.servers[name].pid, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        os.kill(self.servers[name].pid, signal.SIGCONT)

    async def leader(self, stream: Stream = Stream.HISTORY) -> str:
        """The server that leads the stream now; waits for an election."""
        while True:
            described = await self._describe(stream)
            if name := described.get("leader"):
                return str(name)
            await anyio.sleep(_LOOK_EVERY_S)

    async def until_current(self, stream: Stream = Stream.HISTORY) -> None:
        """Returns when every replica of the stream is there and holds all of it."""
        while True:
            described = await self._describe(stream)
            others = described.get("replicas", [])
            current_count = sum(bool(other.get("current")) and not other.get("offline") for other in others)
            if described.get("leader") and current_count == NODE_COUNT - 1:
                return
            await anyio.sleep(_LOOK_EVERY_S)

    async def _describe(self, stream: Stream) -> dict[str, Any]:
        assert self._bus is not None, "not entered"
        try:
            return dict((await self._bus.api(f"STREAM.INFO.{stream}")).get("cluster") or {})
        except BusError:
            return {}  # Nobody leads it now.


def free_ports(count: int) -> list[int]:
    """On the loopback interface; nobody holds them until they are used."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()

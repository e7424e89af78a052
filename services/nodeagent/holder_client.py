"""The node agent's side of its holder: engines and routes over the private socket."""

from typing import Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from schemas.holders import (
    EngineStart,
    EngineStop,
    EngineView,
    HolderRefused,
    HolderView,
    RouteClose,
    RouteClosed,
    RouteOpen,
)
from services.nodeagent.runtimes.api import RuntimeProblem

T = TypeVar("T", bound=msgspec.Struct)

QUICK_S: Final = 10.0
"""For everything that does not wait on purpose."""
CLOSE_S: Final = 10.0
"""A close waits for gateways at most one lease term, 1 s."""


class HolderProblem(RuntimeProblem):
    """The holder refused, or cannot be reached."""


class HolderClient:
    """One session over the unix socket."""

    def __init__(self, socket_path: str) -> None:
        connector = aiohttp.UnixConnector(path=socket_path, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, base_url="http://holder")

    async def close(self) -> None:
        await self._session.close()

    async def view(self) -> HolderView:
        return await self._call("GET", "/view", HolderView)

    async def engine(self, replica_id: str) -> EngineView | None:
        """None when the holder knows no such engine."""
        try:
            return await self._call("GET", f"/engines/{quote(replica_id, safe='')}", EngineView)
        except HolderProblem as problem:
            if problem.status == 404:
                return None
            raise

    async def start(self, wish: EngineStart) -> EngineView:
        return await self._call("POST", "/engines", EngineView, wish)

    async def open_gate(self, replica_id: str, *, lease_epoch: int) -> EngineView:
        return await self._call("POST", _path(replica_id, "gate", lease_epoch), EngineView)

    async def stop(self, replica_id: str, *, lease_epoch: int, grace_s: float) -> None:
        await self._call(
            "POST",
            _path(replica_id, "stop", lease_epoch),
            EngineView,
            EngineStop(grace_s=grace_s),
            timeout_s=grace_s + 30,
        )

    async def wait_for_exit(self, replica_id: str, *, lease_epoch: int, timeout_s: float) -> EngineView:
        path = f"{_path(replica_id, 'wait', lease_epoch)}&timeout_s={timeout_s}"
        return await self._call("GET", path, EngineView, timeout_s=timeout_s + QUICK_S)

    async def forget(self, replica_id: str, *, lease_epoch: int) -> None:
        path = f"/engines/{quote(replica_id, safe='')}?lease_epoch={lease_epoch}"
        try:
            await self._call("DELETE", path, None)
        except HolderProblem as problem:
            if problem.status != 404:
                raise

    async def open_route(self, replica_id: str, endpoint: str) -> None:
        await self._call("POST", "/routes/open", None, RouteOpen(replica_id=replica_id, endpoint=endpoint))

    async def close_route(self, replica_id: str) -> RouteClosed:
        """Returns when no gateway will send it anything any more."""
        return await self._call(
            "POST", "/routes/close", RouteClosed, RouteClose(replica_id=replica_id), timeout_s=CLOSE_S
        )

    async def _call(
        self,
        method: str,
        path: str,
        kind: type[T] | None,
        body: msgspec.Struct | None = None,
        *,
        timeout_s: float = QUICK_S,
    ) -> T:
        data = None if body is None else msgspec.json.encode(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, path, data=data, timeout=timeout) as response:
                content = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise HolderProblem(f"the holder does not answer ({type(error).__name__})") from error
        if status >= 400:
            raise HolderProblem(_reason_in(content, status), status=status)
        if kind is None:
            return None  # type: ignore[return-value]  # Callers that pass no kind use no value.
        return msgspec.json.decode(content, type=kind)


def _path(replica_id: str, verb: str, lease_epoch: int) -> str:
    return f"/engines/{quote(replica_id, safe='')}/{verb}?lease_epoch={lease_epoch}"


def _reason_in(content: bytes, status: int) -> str:
    try:
        return msgspec.json.decode(content, type=HolderRefused).reason
    except msgspec.MsgspecError:
        return f"status {status}"

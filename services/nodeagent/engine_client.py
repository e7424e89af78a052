"""The node agent's side of an engine: is it ready, is it busy, put it to sleep, wake it, ask it for one token."""

from typing import Final

import aiohttp
import anyio
import msgspec

from schemas.deployments import WorkloadKind

STATE_S: Final = 5.0
READY_POLL_S: Final = 0.05
IDLE_POLL_S: Final = 0.01


class EngineProblem(Exception):
    """The engine refused or does not answer; `short_by_bytes` when device memory was missing."""

    def __init__(self, reason: str, *, short_by_bytes: int = 0) -> None:
        super().__init__(reason)
        self.short_by_bytes = short_by_bytes


class EngineState(msgspec.Struct, kw_only=True):
    """What ``GET /sublet/state`` tells."""

    state: str
    in_flight: int = 0
    failure: str | None = None
    weights_bytes: int = 0
    weights_generation: int = 0
    held_bytes: int = 0
    """Device bytes that it says it holds, its context included; 0 when it does not say."""


class _Failure(msgspec.Struct, kw_only=True):
    error: str | dict[str, object] = ""
    free_bytes: int = 0
    requested_bytes: int = 0


class EngineClient:
    """HTTP to all engines of this host."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30))

    async def close(self) -> None:
        await self._session.close()

    async def state(self, endpoint: str) -> EngineState:
        content = await self._call("GET", f"{endpoint}/sublet/state", timeout_s=STATE_S)
        return msgspec.json.decode(content, type=EngineState)

    async def wait_until_ready(self, endpoint: str) -> None:
        """Returns when weights are loaded; raises `EngineProblem` when loading failed. No deadline of its own."""
        while True:
            try:
                state = await self.state(endpoint)
            except EngineProblem:
                state = None
            if state is not None and state.state in ("resident", "asleep"):
                return
            if state is not None and state.state == "failed":
                raise EngineProblem(state.failure or "the engine failed while loading")
            await anyio.sleep(READY_POLL_S)

    async def wait_until_idle(self, endpoint: str, *, timeout_s: float) -> bool:
        """True when nothing is in flight; False when the time ended first."""
        with anyio.move_on_after(timeout_s):
            while (await self.state(endpoint)).in_flight > 0:  # noqa: ASYNC110  # Another process: it cannot set an event.
                await anyio.sleep(IDLE_POLL_S)
            return True
        return False

    async def post(self, url: str, *, timeout_s: float, body: bytes | None = None) -> bytes:
        """What it answered; for swap drivers, which know what they ask."""
        return await self._call("POST", url, timeout_s=timeout_s, body=body)

    async def verify(self, endpoint: str, model: str, kind: WorkloadKind, *, timeout_s: float) -> None:
        """One token, or for training the answer that it is resident: the proof that the weights are usable."""
        if kind is WorkloadKind.TRAINING:
            state = await self.state(endpoint)
            if state.state != "resident":
                raise EngineProblem(f"the job is {state.state} after its wake")
            return
        body = msgspec.json.encode({"model": model, "prompt": "ok", "max_tokens": 1})
        await self._call("POST", f"{endpoint}/v1/completions", timeout_s=timeout_s, body=body)

    async def _call(self, method: str, url: str, *, timeout_s: float, body: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json"} if body is not None else None
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, url, data=body, timeout=timeout, headers=headers) as response:
                content = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineProblem(f"the engine does not answer ({type(error).__name__})") from error
        if status >= 400:
            raise _problem(content, status)
        return content


def _problem(content: bytes, status: int) -> EngineProblem:
    try:
        failure = msgspec.json.decode(content, type=_Failure)
    except msgspec.MsgspecError:
        return EngineProblem(f"the engine answered {status}")
    text = failure.error if isinstance(failure.error, str) else str(failure.error.get("message", status))
    return EngineProblem(text, short_by_bytes=max(0, failure.requested_bytes - failure.free_bytes))

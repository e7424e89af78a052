"""The node agent's side of an engine: is it ready, is it busy, put it to sleep, wake it, ask it for one token."""

from typing import Final

import aiohttp
import anyio
import msgspec

from schemas.deployments import EngineKind, WorkloadKind
from services.nodeagent.adapters.api import Adapter, Gauges, gauge
from services.nodeagent.adapters.registry import ADAPTERS

STATE_S: Final = 5.0
READY_POLL_S: Final = 0.05
IDLE_POLL_S: Final = 0.01
NOT_FOUND: Final = 404


class EngineProblem(Exception):
    """The engine refused or does not answer; `short_by_bytes` when device memory was missing.

    `status` is that of its answer; 0 when there was none.
    """

    def __init__(self, reason: str, *, short_by_bytes: int = 0, status: int = 0) -> None:
        super().__init__(reason)
        self.short_by_bytes = short_by_bytes
        self.status = status


class EngineState(msgspec.Struct, kw_only=True):
    """What ``GET /sublet/state`` tells, or what can be found out of an engine that knows no such route."""

    state: str
    in_flight: int | None = 0
    """None: it does not tell, which is not zero."""
    failure: str | None = None
    weights_bytes: int = 0
    weights_generation: int = 0
    is_bulk_checked: bool = False
    """Its digest is of the whole range of its weights; false where copies move nothing for real."""
    held_bytes: int = 0
    """Device bytes that it says it holds, its context included; 0 when it does not say."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How much an engine has to do."""

    kv_used_fraction: float
    waiting_count: int


class _Failure(msgspec.Struct, kw_only=True):
    error: str | dict[str, object] = ""
    free_bytes: int = 0
    requested_bytes: int = 0


class _Sleeping(msgspec.Struct, kw_only=True):
    is_sleeping: bool


_PROMPT: Final = "The capital of France is"
"""Its next token is beyond doubt for any model, so that rounding never decides between two."""
_ONE_TOKEN: Final[tuple[tuple[str, dict[str, object]], ...]] = (
    ("/v1/completions", {"prompt": _PROMPT, "max_tokens": 1, "temperature": 0}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": _PROMPT}], "max_tokens": 1, "temperature": 0}),
    ("/v1/embeddings", {"input": _PROMPT}),
)
"""An engine that has not the first may have the next: not every one completes, and some embed only."""
_NO_SUCH_ROUTE: Final = frozenset({404, 405, 501})


class EngineClient:
    """HTTP to all engines of this host."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30))

    async def close(self) -> None:
        await self._session.close()

    async def state(self, endpoint: str, kind: EngineKind = EngineKind.SIMULATED) -> EngineState:
        """Raises `EngineProblem` when it does not answer."""
        adapter = ADAPTERS[kind]
        if not adapter.is_ours:
            return await self._found_out(endpoint, adapter)
        content = await self._call("GET", f"{endpoint}/sublet/state", timeout_s=STATE_S)
        return msgspec.json.decode(content, type=EngineState)

    async def _found_out(self, endpoint: str, adapter: Adapter) -> EngineState:
        """Loading, resident or asleep. An engine that cannot be asked whether it sleeps is called resident."""
        if not await self._is_ready(endpoint, adapter.ready_routes):
            return EngineState(state="loading", in_flight=None)
        is_asleep = bool(adapter.sleeping_route) and await self._is_sleeping(endpoint + adapter.sleeping_route)
        in_flight = 0 if is_asleep else await self._in_flight(endpoint, adapter.gauges)
        return EngineState(state="asleep" if is_asleep else "resident", in_flight=in_flight)

    async def _is_ready(self, endpoint: str, routes: tuple[str, ...]) -> bool:
        """As the first of these routes that it has says; not when it has none."""
        for route in routes:
            try:
                await self._call("GET", endpoint + route, timeout_s=STATE_S)
            except EngineProblem as problem:
                if not problem.status:
                    raise
                if problem.status not in _NO_SUCH_ROUTE:
                    return False
            else:
                return True
        return False

    async def _is_sleeping(self, url: str) -> bool:
        """An engine that was started without its sleep mode has no such route."""
        try:
            content = await self._call("GET", url, timeout_s=STATE_S)
        except EngineProblem as problem:
            if problem.status == NOT_FOUND:
                return False
            raise
        try:
            return msgspec.json.decode(content, type=_Sleeping).is_sleeping
        except msgspec.MsgspecError as error:
            raise EngineProblem("the engine does not say whether it sleeps") from error

    async def _in_flight(self, endpoint: str, gauges: Gauges | None) -> int | None:
        """What it runs and what waits there; None when it does not tell both."""
        if gauges is None:
            return None
        try:
            text = (await self._call("GET", endpoint + gauges.route, timeout_s=STATE_S)).decode(errors="replace")
        except EngineProblem as problem:
            if problem.status:
                return None
            raise
        running, waiting = gauge(text, gauges.running), gauge(text, gauges.waiting)
        return None if running is None or waiting is None else round(running + waiting)

    async def load(self, endpoint: str, kind: EngineKind) -> EngineLoad | None:
        """None when it does not tell how full its cache is. Raises `EngineProblem` when it does not answer."""
        gauges = ADAPTERS[kind].gauges
        if gauges is None or not gauges.kv_used_fraction:
            return None
        text = (await self._call("GET", endpoint + gauges.route, timeout_s=STATE_S)).decode(errors="replace")
        used, waiting = gauge(text, gauges.kv_used_fraction), gauge(text, gauges.waiting)
        if used is None:
            return None
        return EngineLoad(kv_used_fraction=min(1.0, max(0.0, used)), waiting_count=round(waiting or 0.0))

    async def wait_until_ready(self, endpoint: str, kind: EngineKind = EngineKind.SIMULATED) -> None:
        """Returns when weights are loaded; raises `EngineProblem` when loading failed. No deadline of its own."""
        while True:
            try:
                state = await self.state(endpoint, kind)
            except EngineProblem:
                state = None
            if state is not None and state.state in ("resident", "asleep"):
                return
            if state is not None and state.state == "failed":
                raise EngineProblem(state.failure or "the engine failed while loading")
            await anyio.sleep(READY_POLL_S)

    async def wait_until_idle(
        self, endpoint: str, *, timeout_s: float, kind: EngineKind = EngineKind.SIMULATED
    ) -> bool:
        """True when nothing is in flight; False when the time ended first, also for one that does not tell."""
        with anyio.move_on_after(timeout_s):
            while (await self.state(endpoint, kind)).in_flight != 0:  # noqa: ASYNC110  # Another process sets no event.
                await anyio.sleep(IDLE_POLL_S)
            return True
        return False

    async def post(self, url: str, *, timeout_s: float, body: bytes | None = None) -> bytes:
        """What it answered; for swap drivers, which know what they ask."""
        return await self._call("POST", url, timeout_s=timeout_s, body=body)

    async def get(self, url: str, *, timeout_s: float) -> bytes:
        """What it answered."""
        return await self._call("GET", url, timeout_s=timeout_s)

    async def verify(self, endpoint: str, model: str, kind: WorkloadKind, *, timeout_s: float) -> str:
        """One token, or for training that it is resident: the proof that the weights are usable. Gives the token.

        It is the likeliest one, so that the same weights give the same; empty where the engine gives no text.
        """
        if kind is WorkloadKind.TRAINING:
            state = await self.state(endpoint)
            if state.state != "resident":
                raise EngineProblem(f"the job is {state.state} after its wake")
            return ""
        for route, content in _ONE_TOKEN:
            body = msgspec.json.encode({"model": model, **content})
            try:
                return _text_in(await self._call("POST", f"{endpoint}{route}", timeout_s=timeout_s, body=body))
            except EngineProblem as problem:
                if problem.status not in _NO_SUCH_ROUTE or route == _ONE_TOKEN[-1][0]:
                    raise
        return ""

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


class _Message(msgspec.Struct, kw_only=True):
    content: str | None = None


class _Choice(msgspec.Struct, kw_only=True):
    text: str = ""
    message: _Message | None = None


class _Completion(msgspec.Struct, kw_only=True):
    choices: tuple[_Choice, ...] = ()


def _text_in(content: bytes) -> str:
    try:
        choices = msgspec.json.decode(content, type=_Completion).choices
    except msgspec.MsgspecError:
        return ""
    first = choices[0] if choices else _Choice()
    return first.text or (first.message.content or "" if first.message else "")


def _problem(content: bytes, status: int) -> EngineProblem:
    try:
        failure = msgspec.json.decode(content, type=_Failure)
    except msgspec.MsgspecError:
        return EngineProblem(f"the engine answered {status}", status=status)
    text = failure.error if isinstance(failure.error, str) else str(failure.error.get("message", status))
    short_by_bytes = max(0, failure.requested_bytes - failure.free_bytes)
    return EngineProblem(text, short_by_bytes=short_by_bytes, status=status)

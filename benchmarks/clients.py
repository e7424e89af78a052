"""Open-loop clients: every request leaves at its time, whatever became of those before it.

Streaming chat completions over real HTTP, a connection each. A request that the gateway did not accept (nobody
listens, or it says 503 ``gateway_starting`` or ``gateway_stopping``) is sent again, as a load balancer or an OpenAI
client would; everything else that is no complete answer has failed.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import anyio
import msgspec

from benchmarks.trace import Planned

REFUSED_RETRY_S: Final = 0.05
"""Between two attempts to connect where nobody listens."""
NOT_ACCEPTED_CODES: Final = frozenset({"gateway_starting", "gateway_stopping"})
RETRY_AFTER_S_MAX: Final = 1.0
NOT_ACCEPTED_S_MAX: Final = 30.0
"""A request that no gateway accepts for so long has failed."""
REQUEST_S_MAX: Final = 120.0
"""Beyond any hold (30 s) and any answer of this benchmark."""
LINE_BYTES_MAX: Final = 1 << 20
_WORD: Final = "tok "
"""Four characters are one token to the engine, and so is one word."""
_WAITED: Final = re.compile(rb"waited_s=([0-9.]+)")


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _ErrorBody(msgspec.Struct):
    message: str = ""
    code: str | None = None


class _Chunk(msgspec.Struct):
    """One event of a stream, or a whole error body: only what is looked at."""

    choices: list[_Choice] = []
    error: _ErrorBody | None = None


_CHUNKS: Final = msgspec.json.Decoder(_Chunk)
_ENCODER: Final = msgspec.json.Encoder()


@dataclass(slots=True, kw_only=True)
class Sent:
    """One request and what became of it. Times in seconds from the start of the clock."""

    planned: Planned
    sent_s: float
    """When it left; `planned.due_s` is when it should have."""
    end_s: float | None = None
    """None while it is on its way."""
    first_token_s: float | None = None
    """From when it left until the first piece of text, whatever it waited for."""
    held_s: float | None = None
    """How long the gateway held it until its model was resident: the header, else what the client saw."""
    token_count: int = 0
    failure: str = ""
    """Empty when it was answered in full; else a code, or what happened to the connection."""
    is_cut: bool = False
    """The connection broke before the answer was complete."""
    retry_count: int = 0
    """How often it was sent again because no gateway had accepted it."""

    @property
    def is_answered(self) -> bool:
        return self.end_s is not None and not self.failure


class NotAccepted(Exception):
    """No gateway took it; send it again after `after_s`."""

    def __init__(self, reason: str, *, after_s: float) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Failed(Exception):
    """No complete answer."""


@dataclass(slots=True)
class Clients:
    """Sends a plan to one gateway and keeps what it saw."""

    gateway_url: str
    api_key: str
    requests: list[Sent] = field(default_factory=list)
    """In the order in which they left."""
    answered_count: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    _began_s: float = 0.0

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def waiting_count(self) -> int:
        return len(self.requests) - self.answered_count - self.failures.total()

    async def run(self, plan: Iterable[Planned]) -> None:
        """Returns when the last request has ended."""
        self._began_s = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=REQUEST_S_MAX)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        headers = {"Authorization": f"Bearer {self.api_key}"}
        async with (
            aiohttp.ClientSession(
                connector=connector, timeout=timeout, headers=headers, read_bufsize=LINE_BYTES_MAX
            ) as session,
            anyio.create_task_group() as tg,
        ):
            for planned in plan:
                await anyio.sleep(max(0.0, planned.due_s - self.now_s))
                sent = Sent(planned=planned, sent_s=self.now_s)
                self.requests.append(sent)
                tg.start_soon(self._carry, session, sent)

    async def _carry(self, session: aiohttp.ClientSession, sent: Sent) -> None:
        body = _ENCODER.encode(body_of(sent.planned))
        try:
            while True:
                try:
                    await self._attempt(session, sent, body)
                    break
                except NotAccepted as refusal:
                    if self.now_s - sent.sent_s > NOT_ACCEPTED_S_MAX:
                        sent.failure = str(refusal)
                        break
                    sent.retry_count += 1
                    await anyio.sleep(refusal.after_s)
        except Failed as error:
            sent.failure = str(error)
        except (asyncio.TimeoutError, TimeoutError):  # noqa: UP041  (two names in Python 3.11 documentation, one class)
            sent.failure = "timeout"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            sent.failure, sent.is_cut = f"cut ({type(error).__name__})", True
        sent.end_s = self.now_s
        if sent.failure:
            self.failures[sent.failure] += 1
        else:
            self.answered_count += 1

    async def _attempt(self, session: aiohttp.ClientSession, sent: Sent, body: bytes) -> None:
        url = f"{self.gateway_url}/v1/chat/completions"
        try:
            response = await session.post(url, data=body, headers={"Content-Type": "application/json"})
        except aiohttp.ClientConnectorError as error:
            raise NotAccepted("no gateway listens", after_s=REFUSED_RETRY_S) from error
        async with response:
            if response.status != 200:
                raise _refusal(response.status, await response.read(), response.headers.get("Retry-After", ""))
            await self._read(response, sent)

    async def _read(self, response: aiohttp.ClientResponse, sent: Sent) -> None:
        """The stream to its end mark. Raises `Failed` for an error in it."""
        header = response.headers.get("x-sublet-held-ms")
        if header is not None:
            sent.held_s = int(header) / 1000
        async for line in response.content:
            if line.startswith(b":"):
                # A heartbeat of a held request came before the header could tell: what the stream tells is a lower
                # bound, and the first token below replaces it.
                waited = _WAITED.search(line)
                sent.held_s = float(waited[1]) if waited else sent.held_s
            elif line.startswith(b"data: [DONE]"):
                return
            elif line.startswith(b"data: "):
                self._take(line[6:], sent, is_held_known=header is not None)
        raise Failed("incomplete")

    def _take(self, event: bytes, sent: Sent, *, is_held_known: bool) -> None:
        try:
            chunk = _CHUNKS.decode(event)
        except msgspec.MsgspecError:
            raise Failed("unreadable") from None
        if chunk.error is not None:
            raise Failed(chunk.error.code or chunk.error.message or "error")
        if any(choice.delta.content for choice in chunk.choices):
            sent.token_count += 1
            if sent.first_token_s is None:
                sent.first_token_s = self.now_s - sent.sent_s
                if not is_held_known:
                    sent.held_s = sent.first_token_s


def body_of(planned: Planned) -> dict[str, object]:
    """A chat request with a prompt of about so many tokens."""
    return {
        "model": planned.model,
        "stream": True,
        "max_tokens": planned.output_tokens,
        "messages": [{"role": "user", "content": (_WORD * planned.input_tokens).rstrip()}],
    }


def _refusal(status: int, body: bytes, retry_after: str) -> NotAccepted | Failed:
    try:
        error = _CHUNKS.decode(body).error or _ErrorBody()
    except msgspec.MsgspecError:
        error = _ErrorBody()
    code = error.code or f"status {status}"
    if status == 503 and code in NOT_ACCEPTED_CODES:
        after_s = float(retry_after) if retry_after.isdecimal() else RETRY_AFTER_S_MAX
        return NotAccepted(code, after_s=min(after_s, RETRY_AFTER_S_MAX))
    return Failed(code)

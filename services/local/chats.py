"""Chat requests through the gateway, as any OpenAI client would send them, with the times that a user sees."""

import time
from dataclasses import dataclass
from typing import Any, Final, Self

import aiohttp
import anyio
import msgspec

REQUEST_TIMEOUT_S: Final = 120.0
ENGINE_TIMEOUT_S: Final = 5.0


class RequestFailed(Exception):
    """The gateway's answer to a request was an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """One streamed answer."""

    first_token_s: float
    """From before the request was sent to the first piece of text."""
    whole_s: float
    token_count: int
    state_at_arrival: str
    """What the gateway said of the model when the request came: ``resident``, ``parked``, …"""
    held_s: float


class Chats:
    """One HTTP session to a gateway."""

    def __init__(self, base_url: str, *, api_key: str) -> None:
        headers = {"authorization": f"Bearer {api_key}"}
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        self._session = aiohttp.ClientSession(base_url, headers=headers, timeout=timeout)

        # Without the key: engines are not to see it.
        self._engines = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ENGINE_TIMEOUT_S))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        with anyio.CancelScope(shield=True):  # Also when Ctrl-C ends the block: closing waits.
            await self._session.close()
            await self._engines.close()

    async def state_of(self, endpoint: str) -> dict[str, Any]:
        """What an engine says of itself; empty when it does not answer."""
        try:
            async with self._engines.get(f"{endpoint}/sublet/state") as response:
                state: dict[str, Any] = await response.json()
                return state
        except (aiohttp.ClientError, TimeoutError):
            return {}

    async def chat(self, model: str, *, prompt_words: int = 128, tokens_max: int = 16) -> Chat:
        """One streamed chat. Raises `RequestFailed` with what the gateway said."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": " ".join(["word"] * prompt_words)}],
            "max_tokens": tokens_max,
            "stream": True,
        }
        began_s = time.perf_counter()
        first_token_s, token_count = 0.0, 0
        try:
            async with self._session.post("/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    raise RequestFailed(f"{model}: {response.status} {(await response.text())[:300]}")
                async for line in response.content:
                    text = _text_in(line, model)
                    if text and not first_token_s:
                        first_token_s = time.perf_counter() - began_s
                    token_count += bool(text)
                headers = response.headers
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestFailed(f"{model}: {type(error).__name__} {error}") from error
        if not first_token_s:
            raise RequestFailed(f"{model}: the answer had no text")
        return Chat(
            first_token_s=first_token_s,
            whole_s=time.perf_counter() - began_s,
            token_count=token_count,
            state_at_arrival=headers.get("x-sublet-state", ""),
            held_s=float(headers.get("x-sublet-held-ms", 0)) / 1000,
        )


def _text_in(line: bytes, model: str) -> str:
    """The text of one server-sent event; '' for comments, roles and the end. Raises `RequestFailed` for an error."""
    if not line.startswith(b"data: {"):
        return ""
    event: dict[str, Any] = msgspec.json.decode(line.removeprefix(b"data: "))
    if "error" in event:
        raise RequestFailed(f"{model}: {event['error'].get('message', event['error'])}")
    choices = event.get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")

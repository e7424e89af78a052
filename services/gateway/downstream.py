"""The way back to the client. Whatever happens, it ends with an answer or with exactly one typed error."""

from typing import Final

import msgspec
from aiohttp import web

from services.gateway.refusals import Refusal

EVENT_STREAM: Final = "text/event-stream"
_ENCODER: Final = msgspec.json.Encoder()


class Downstream:
    """One client's answer. Until something was sent, an error has a status of its own; later it is an SSE event."""

    def __init__(self, request: web.Request, *, request_id: str) -> None:
        self.headers = {"x-request-id": request_id}
        self.status = 0
        """What the client saw; 0 until something was sent."""
        self.code = ""
        """Of the error that ended it; empty when none did."""
        self._request = request
        self._request_id = request_id
        self._stream: web.StreamResponse | None = None

    @property
    def has_begun(self) -> bool:
        return self._stream is not None

    async def begin(self) -> None:
        """Send the headers of a stream, unless a heartbeat did."""
        if self._stream is not None:
            return
        headers = {
            **self.headers,
            "Content-Type": EVENT_STREAM,
            "Cache-Control": "no-cache",
            # Proxies such as nginx would collect the stream and hand it out late.
            "X-Accel-Buffering": "no",
        }
        stream = web.StreamResponse(status=200, headers=headers)
        self.status = 200
        await stream.prepare(self._request)
        self._stream = stream

    async def heartbeat(self, text: str) -> None:
        """A comment line, which clients skip: keeps proxies from cutting a silent connection."""
        await self.begin()
        await self.write(f": {text}\n\n".encode())

    async def write(self, chunk: bytes) -> None:
        assert self._stream is not None
        await self._stream.write(chunk)

    async def end(self) -> web.StreamResponse:
        assert self._stream is not None
        await self._stream.write_eof()
        return self._stream

    async def whole(self, status: int, body: bytes, content_type: str) -> web.StreamResponse:
        """An answer that is not streamed."""
        self.status = status
        return web.Response(status=status, body=body, headers={**self.headers, "Content-Type": content_type})

    async def refuse(self, refusal: Refusal) -> web.StreamResponse:
        """The one typed error. After it no `[DONE]` follows, so that nobody takes the answer for complete."""
        self.code = refusal.code
        body = _ENCODER.encode(refusal.body(self._request_id))
        if self._stream is not None:
            await self.write(b"data: " + body + b"\n\n")
            return await self.end()
        headers = dict(self.headers)
        if refusal.retry_after is not None:
            headers["Retry-After"] = refusal.retry_after
        if refusal.state:
            headers.setdefault("x-sublet-state", refusal.state)
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self.status = refusal.status
        headers["Content-Type"] = "application/json"
        return web.Response(status=refusal.status, body=body, headers=headers)

"""The connection pool to engines: one POST, and whether its answer has begun or the request came back untouched."""

from dataclasses import dataclass
from typing import Final

import aiohttp
import msgspec

from services.gateway.actions import Bounce
from services.gateway.downstream import EVENT_STREAM
from services.gateway.settings import GatewaySettings

ASLEEP_CODES: Final = frozenset({"model_asleep", "engine_asleep", "asleep"})


class _ErrorText(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorText = msgspec.field(default_factory=_ErrorText)


_ERROR: Final = msgspec.json.Decoder(_ErrorBody)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """The engine took the request and sent nothing for too long. It may be at work: it is not sent again."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """An answer that has begun. A stream has `first` and goes on in `response`; all else is whole in `first`."""

    response: aiohttp.ClientResponse
    status: int
    content_type: str
    is_stream: bool
    first: bytes


@dataclass(slots=True)
class _Attempt:
    is_reused: bool = False


def is_asleep(body: bytes) -> bool:
    """True when an engine's error says that it is parked."""
    try:
        error = _ERROR.decode(body).error
    except msgspec.MsgspecError:
        return False
    return error.code in ASLEEP_CODES or "is asleep" in error.message or "is sleeping" in error.message


class Upstream:
    """All connections to engines. Idle ones are kept, so that a request costs no handshake."""

    def __init__(self, settings: GatewaySettings) -> None:
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.upstream_connections_max, keepalive_timeout=30.0),
            # Bytes pass through as they are; engines set no cookies.
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[tracing],
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.silence_timeout_s
            ),
            read_bufsize=2**18,
        )

    async def close(self) -> None:
        await self.session.close()

    async def post(self, url: str, *, body: bytes, headers: dict[str, str]) -> Answer | Bounce | Silent:
        """The answer once its first bytes are there. Until then nothing is lost: the request can go elsewhere."""
        attempt = _Attempt()
        outcome = await self._post_once(url, body, headers, attempt)
        if outcome is Bounce.CUT and attempt.is_reused:
            # The engine closed an idle connection just when we used it; that says nothing about the engine.
            outcome = await self._post_once(url, body, headers, _Attempt())
        return outcome

    async def _post_once(
        self, url: str, body: bytes, headers: dict[str, str], attempt: _Attempt
    ) -> Answer | Bounce | Silent:
        try:
            response = await self.session.post(
                url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=attempt
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return Bounce.UNREACHABLE
        except aiohttp.SocketTimeoutError:
            return Silent()
        except (aiohttp.ClientError, OSError):
            return Bounce.CUT
        try:
            answer = await _begun(response)
        except aiohttp.SocketTimeoutError:
            answer = Silent()
        except (aiohttp.ClientError, OSError):
            answer = Bounce.CUT
        except BaseException:
            response.close()
            raise
        if not isinstance(answer, Answer):
            response.close()
        return answer


async def _begun(response: aiohttp.ClientResponse) -> Answer | Bounce | Silent:
    content_type = response.headers.get("Content-Type", "application/json")
    is_stream = response.status == 200 and content_type.startswith(EVENT_STREAM)
    first = await response.content.readany() if is_stream else await response.read()
    if is_stream and not first:
        return Bounce.CUT
    # vLLM and our engine may notice only after their headers that they are being parked.
    error = first.removeprefix(b"data: ") if is_stream and first.startswith(b'data: {"error"') else b""
    if is_asleep(first if response.status == 503 else error):
        return Bounce.ASLEEP
    return Answer(
        response=response, status=response.status, content_type=content_type, is_stream=is_stream, first=first
    )


async def _note_reuse(_: aiohttp.ClientSession, context: object, __: object) -> None:
    attempt = getattr(context, "trace_request_ctx", None)
    if isinstance(attempt, _Attempt):
        attempt.is_reused = True

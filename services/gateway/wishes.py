"""What a client asks for: its headers and the few fields of its body that routing needs."""

import math
import re
import secrets
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import msgspec
from aiohttp import web

from services.gateway import refusals
from services.gateway.refusals import Refusal
from services.gateway.routes import Caller

REQUEST_ID_MAX: Final = 128
_REQUEST_ID: Final = re.compile(r"^[\x21-\x7e]+$")
_TRACEPARENT: Final = re.compile(r"^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class Head(msgspec.Struct):
    """The part of a request's body that the gateway reads; the rest passes through."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None


_HEAD: Final = msgspec.json.Decoder(Head)
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NONE: Final = msgspec.Raw(b"null")
_TRUE: Final = msgspec.Raw(b"true")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A request that can be served, as far as its form goes."""

    model: str
    is_stream: bool
    hides_usage: bool
    """The usage was asked for by this gateway only, and is not to be shown."""
    body: bytes
    patience_s: float | None


def request_id_of(request: web.Request) -> str:
    """The client's own id if it can be used in a header, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if len(given) <= REQUEST_ID_MAX and _REQUEST_ID.match(given) else f"req-{secrets.token_hex(12)}"


def traceparent_of(request: web.Request) -> str:
    """The client's trace context, or empty when there is none that can be used."""
    given = request.headers.get("traceparent", "")
    return given if _TRACEPARENT.match(given) else ""


def key_hash_of(request: web.Request) -> str | None:
    """The hash of the key that came with the request; None without one."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    key = key.strip()
    return sha256(key.encode(errors="replace")).hexdigest() if scheme.lower() == "bearer" and key else None


def open_caller(tenant: str) -> Caller:
    """Whoever comes without a key where none is needed."""
    return Caller(tenant=tenant, key_id="")


def patience_of(request: web.Request) -> float | Refusal | None:
    """Seconds that the client will wait for the model; None when it does not say."""
    given = request.headers.get("x-sublet-timeout-s")
    if given is None:
        return None
    try:
        patience_s = float(given)
    except ValueError:
        patience_s = math.nan
    if not 0 < patience_s < math.inf:
        return refusals.bad_request(f"The header x-sublet-timeout-s must be seconds above 0, not '{given[:40]}'.")
    return patience_s


async def read_wish(request: web.Request, *, bytes_max: int, meter_streams: bool) -> Wish | Refusal:
    """The wish in this request, or what is wrong with it in one sentence."""
    patience_s = patience_of(request)
    if isinstance(patience_s, Refusal):
        return patience_s
    if (request.content_length or 0) > bytes_max:
        return refusals.body_too_large(bytes_max)
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        return refusals.body_too_large(bytes_max)
    try:
        head = _HEAD.decode(body)
    except msgspec.ValidationError as error:
        return refusals.bad_request(f"The body is not a request: {error}.", param=_param_of(str(error)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return refusals.bad_request(f"The body is not valid JSON: {error}.")
    is_stream = bool(head.stream)
    shows_usage = head.stream_options is not None and bool(head.stream_options.include_usage)
    hides_usage = is_stream and meter_streams and not shows_usage
    return Wish(
        model=head.model,
        is_stream=is_stream,
        hides_usage=hides_usage,
        body=_with_usage(body) if hides_usage else body,
        patience_s=patience_s,
    )


def _with_usage(body: bytes) -> bytes:
    """The same request, asking for its token usage too."""
    fields = _FIELDS.decode(body)
    given = fields.get("stream_options", _NONE)
    options = {} if bytes(given).strip() == b"null" else _FIELDS.decode(given)
    fields["stream_options"] = msgspec.Raw(msgspec.json.encode({**options, "include_usage": _TRUE}))
    return msgspec.json.encode(fields)


def _param_of(message: str) -> str | None:
    """The field that msgspec complains about, from ``... - at `$.model` `` or ``missing required field `model` ``."""
    found = re.search(r"`\$?\.?([A-Za-z_]+)[^`]*`$", message)
    return found.group(1) if found else None

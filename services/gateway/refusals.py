"""Every way in which the gateway says no, as values: status, code, one sentence, and when to try again."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One typed error in OpenAI's form. `code` is for programs, `message` for people."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    model: str = ""
    state: str = ""

    @property
    def retry_after(self) -> str | None:
        """The header's value: whole seconds, at least one, rounded up so that the retry does not come too early."""
        return None if self.retry_after_s is None else str(max(1, math.ceil(self.retry_after_s)))

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON body; `sublet` holds what OpenAI's form has no place for."""
        more: dict[str, Any] = {"code": self.code, "request_id": request_id}
        if self.retry_after_s is not None:
            more["retry_after_s"] = round(self.retry_after_s, 3)
        if self.model:
            more["model"] = self.model
            more["explain"] = f"sublet explain {self.model}"
        if self.state:
            more["state"] = self.state
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "sublet": more,
            }
        }


def missing_key() -> Refusal:
    return Refusal(
        status=401,
        type="authentication_error",
        code="missing_api_key",
        message="This gateway needs an API key: send the header 'Authorization: Bearer sk-...'. "
        "`sublet keys new` makes one.",
    )


def wrong_key() -> Refusal:
    return Refusal(
        status=401,
        type="authentication_error",
        code="invalid_api_key",
        message="The API key is unknown or was revoked. `sublet keys new` makes a new one.",
    )


def bad_request(message: str, param: str | None = None) -> Refusal:
    return Refusal(status=400, type="invalid_request_error", code="bad_request", message=message, param=param)


def body_too_large(bytes_max: int) -> Refusal:
    return Refusal(
        status=413,
        type="invalid_request_error",
        code="body_too_large",
        message=f"The body is larger than {bytes_max} bytes, this gateway's SUBLET_GATEWAY_REQUEST_BYTES_MAX.",
    )


def unknown_route(method: str, path: str) -> Refusal:
    return Refusal(
        status=404, type="invalid_request_error", code="unknown_route", message=f"There is no route {method} {path}."
    )


def wrong_method(method: str, path: str, allowed: Iterable[str]) -> Refusal:
    return Refusal(
        status=405,
        type="invalid_request_error",
        code="wrong_method",
        message=f"{path} is asked with {' or '.join(allowed)}, not {method}.",
    )


def unknown_model(model: str, known: Iterable[str]) -> Refusal:
    """`known` are the models of the same tenant; others are never named."""
    names = sorted(known)
    close = difflib.get_close_matches(model, names, n=1, cutoff=0.5)
    if close:
        hint = f" Did you mean '{close[0]}'?"
    elif names:
        hint = f" Yours are: {', '.join(names[:10])}{', ...' if len(names) > 10 else '.'}"
    else:
        hint = " You have none yet; `sublet deploy` makes one."
    return Refusal(
        status=404,
        type="invalid_request_error",
        code="model_not_found",
        message=f"There is no model '{model}'.{hint}",
        param="model",
    )


def retired(model: str) -> Refusal:
    return Refusal(
        status=404,
        type="invalid_request_error",
        code="model_not_found",
        message=f"The model '{model}' was retired while the request waited.",
        param="model",
    )


def starting(retry_after_s: float) -> Refusal:
    return Refusal(
        status=503,
        type="service_unavailable_error",
        code="gateway_starting",
        message="This gateway has not read the fleet's history yet; /readyz says what it waits for.",
        retry_after_s=retry_after_s,
    )


def stopping() -> Refusal:
    return Refusal(
        status=503,
        type="service_unavailable_error",
        code="gateway_stopping",
        message="This gateway is shutting down; try again.",
        retry_after_s=1.0,
    )


def hold_full(model: str, *, scope: str, state: str, retry_after_s: float) -> Refusal:
    return Refusal(
        status=429,
        type="rate_limit_error",
        code="hold_full",
        message=f"Too many requests wait for {scope} already; '{model}' is {state}.",
        retry_after_s=retry_after_s,
        model=model,
        state=state,
    )


def model_loading(model: str, *, state: str, eta_s: float, patience_s: float) -> Refusal:
    return Refusal(
        status=503,
        type="service_unavailable_error",
        code="model_loading",
        message=f"The model '{model}' is {state} and will be back in about {eta_s:.1f} s, after this request's "
        f"deadline of {patience_s:g} s. Its return has been asked for.",
        retry_after_s=eta_s,
        model=model,
        state=state,
    )


def deadline_passed(model: str, *, state: str, waited_s: float, retry_after_s: float, problem: str) -> Refusal:
    why = f" {problem}" if problem else ""
    return Refusal(
        status=504,
        type="timeout_error",
        code="deadline_exceeded",
        message=f"The model '{model}' did not come back within {waited_s:.1f} s; it is {state}.{why}",
        retry_after_s=retry_after_s,
        model=model,
        state=state,
    )


def engine_failed(model: str, *, reason: str, retry_after_s: float) -> Refusal:
    return Refusal(
        status=503,
        type="service_unavailable_error",
        code="engine_failed",
        message=f"The engine of '{model}' failed and is not being tried again: {reason}",
        retry_after_s=retry_after_s,
        model=model,
        state="failed",
    )


def engine_cut(model: str, count: int) -> Refusal:
    """Not tried for ever: the request itself may be what kills the engine."""
    return Refusal(
        status=502,
        type="server_error",
        code="engine_cut",
        message=f"The engine of '{model}' dropped this request {count} times before it answered.",
        model=model,
    )


def answer_broken(model: str, why: str) -> Refusal:
    """After the first byte: the answer cannot be repeated, but its end is never silent."""
    return Refusal(
        status=502,
        type="server_error",
        code="answer_broken",
        message=f"The engine of '{model}' broke off in the middle of the answer ({why}); it is incomplete.",
        model=model,
    )


def answer_late(model: str, after_s: float) -> Refusal:
    return Refusal(
        status=504,
        type="timeout_error",
        code="engine_timeout",
        message=f"The engine of '{model}' sent nothing for {after_s:g} s.",
        model=model,
    )

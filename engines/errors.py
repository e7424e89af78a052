"""What can go wrong in an engine, by who has to know: a client, whoever wakes the engine, whoever starts it."""

from __future__ import annotations


class EngineError(Exception):
    """A request that cannot be served, as the client will read it: an HTTP status and an OpenAI error body."""

    def __init__(self, message: str, *, status: int, kind: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param


def unavailable(message: str, code: str) -> EngineError:
    """Not now: the client may try again."""
    return EngineError(message, status=503, kind="service_unavailable_error", code=code)


def invalid(message: str, *, code: str = "invalid_value", param: str | None = None, status: int = 400) -> EngineError:
    """The client's mistake."""
    return EngineError(message, status=status, kind="invalid_request_error", code=code, param=param)


class LoadFailedError(Exception):
    """The engine cannot start; `fields` belong into the log line."""

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


class WakeFailedError(Exception):
    """Waking did not work; the engine is asleep as before (or failed, if `is_fatal`)."""

    def __init__(self, message: str, *, free_bytes: int | None, is_fatal: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.free_bytes = free_bytes
        self.is_fatal = is_fatal


class NotSealedError(Exception):
    """The content could not be kept in host memory; nothing was let go, and the engine is resident as before."""


class DamagedError(Exception):
    """What lies in device memory is not what was put there."""

    def __init__(self, offsets_bytes: tuple[int, ...]) -> None:
        super().__init__(f"device memory differs from its host copy at offsets {list(offsets_bytes)}")
        self.offsets_bytes = offsets_bytes

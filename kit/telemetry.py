"""Traces and logs. One trace follows a request or a deployment through every service.

Spans go to an OTLP endpoint when ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set, else as JSON lines to the file named by
``SUBLET_TRACE_FILE``, else nowhere. The decision whether to sample is made once, where a trace begins; an unsampled
trace costs one string comparison per handler.
"""

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

Attribute = str | int | float | bool
SAMPLED_SUFFIX: Final = "-01"


class Span(Protocol):
    """A running span, or the stand-in for one that is not recorded."""

    traceparent: str
    """To be passed on; '' when there is no trace at all."""

    def set(self, key: str, value: str | float | bool) -> None: ...  # noqa: FBT001  # A value, no switch.


class _Unrecorded:
    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, key: str, value: str | float | bool) -> None:  # noqa: FBT001
        return None


class _Recorded:
    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def set(self, key: str, value: str | float | bool) -> None:  # noqa: FBT001
        self._span.set_attribute(key, value)


class Tracer:
    """Makes spans for one service. Without an exporter, every span is the cheap stand-in."""

    def __init__(self, otel_tracer: Any | None, provider: Any | None, *, root_ratio: float) -> None:
        self._tracer = otel_tracer
        self._provider = provider
        self._root_ratio = root_ratio

    @contextmanager
    def span(
        self,
        name: str,
        *,
        parent: str = "",
        attributes: Mapping[str, Attribute] | None = None,
        is_root: bool = False,
    ) -> Iterator[Span]:
        """A span under `parent` (a traceparent). Recorded when the parent is sampled, or, with `is_root`, by ratio."""
        if self._tracer is None:
            yield _Unrecorded(parent or (new_traceparent(is_sampled=False) if is_root else ""))
            return
        if not parent and is_root:
            parent = new_traceparent(is_sampled=secrets.randbelow(10_000) < self._root_ratio * 10_000)
            context = None if parent.endswith(SAMPLED_SUFFIX) else False
        else:
            context = _context_of(parent) if parent.endswith(SAMPLED_SUFFIX) else False
        if context is False:
            yield _Unrecorded(parent)
            return
        with self._tracer.start_as_current_span(
            name, context=context or _empty_context(), attributes=attributes
        ) as span:
            yield _Recorded(span)

    def shutdown(self) -> None:
        """Send what is left; bounded to a few seconds by the exporter's own time-out."""
        if self._provider is not None:
            self._provider.shutdown()


def new_traceparent(*, is_sampled: bool) -> str:
    """A fresh W3C trace context."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{'01' if is_sampled else '00'}"


def _empty_context() -> Any:
    from opentelemetry.context import Context

    return Context()


def _context_of(traceparent: str) -> Any:
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    _, trace_id, span_id, _ = traceparent.split("-")
    parent = SpanContext(
        trace_id=int(trace_id, 16), span_id=int(span_id, 16), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
    )
    return set_span_in_context(NonRecordingSpan(parent), _empty_context())


def tracer(service: str, *, node: str = "") -> Tracer:
    """The service's tracer, as the environment asks for it."""
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    trace_file = os.environ.get("SUBLET_TRACE_FILE")
    ratio = float(os.environ.get("SUBLET_TRACE_RATIO", "0.05" if not endpoint else "1.0"))
    if not endpoint and not trace_file:
        return Tracer(None, None, root_ratio=0.0)
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

    exporter: SpanExporter
    if endpoint:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    else:
        exporter = _file_exporter(Path(str(trace_file)))
    attributes = {"service.name": f"sublet-{service}", **({"sublet.node": node} if node else {})}
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    return Tracer(provider.get_tracer("sublet"), provider, root_ratio=ratio)


def _file_exporter(path: Path) -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class JsonLines(SpanExporter):
        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            lines = [json.dumps(json.loads(span.to_json(indent=None))) for span in spans]
            with path.open("a") as file:
                file.write("\n".join(lines) + "\n")
            return SpanExportResult.SUCCESS

    return JsonLines()


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: constant message, values as fields."""

    _STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in self._STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging() -> None:
    """JSON lines on stderr; the level from ``SUBLET_LOG_LEVEL`` (info by default)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=os.environ.get("SUBLET_LOG_LEVEL", "INFO").upper(), handlers=[handler], force=True)
    logging.getLogger("nats").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)

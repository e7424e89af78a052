"""Traces and logs. One trace follows a request or a deployment through every service.

Spans go to an OTLP endpoint when ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set, else as JSON lines to the file named by
``SUBLET_TRACE_FILE``, else nowhere. The decision whether to sample is made once, where a trace begins; an unsampled
trace costs one string comparison per handler.
"""

import json
import logging
import os
import random
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:  # OpenTelemetry is loaded only where spans are exported.
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter

    from kit.span_export import SpanBatches

Attribute = str | int | float | bool
SAMPLED_SUFFIX: Final = "-01"
_TRACEPARENT: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01")


class Span(Protocol):
    """A running span, or the stand-in for one that is not recorded."""

    traceparent: str
    """To be passed on; '' when there is no trace at all."""

    def set(self, key: str, value: str | float | bool) -> None: ...  # noqa: FBT001  # A value, no switch.


class _Unrecorded:
    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def set(self, key: str, value: str | float | bool) -> None:  # noqa: FBT001
        return None


class _Recorded:
    __slots__ = ("_attributes", "_batches", "_began_ns", "_name", "_parent_id", "_span_id", "_trace_id", "traceparent")

    def __init__(
        self,
        batches: "SpanBatches",
        name: str,
        *,
        trace_id: str,
        parent_id: str,
        attributes: Mapping[str, Attribute] | None,
    ) -> None:
        self._batches = batches
        self._name = name
        self._trace_id = trace_id
        self._parent_id = parent_id
        self._attributes: dict[str, Attribute] | None = dict(attributes) if attributes else None
        # Not a secret, and never 0, which stands for no span.
        self._span_id = f"{random.getrandbits(64) or 1:016x}"
        self.traceparent = f"00-{trace_id}-{self._span_id}{SAMPLED_SUFFIX}"

    def __enter__(self) -> Span:
        self._began_ns = time.time_ns()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        has_failed = kind is not None and issubclass(kind, Exception)
        self._batches.add(
            EndedSpan(
                self._name,
                self._trace_id,
                self._span_id,
                self._parent_id,
                self._began_ns,
                time.time_ns(),
                self._attributes,
                kind.__qualname__ if kind is not None and has_failed else "",
                str(error) if has_failed else "",
            )
        )

    def set(self, key: str, value: str | float | bool) -> None:  # noqa: FBT001
        if self._attributes is None:
            self._attributes = {}
        self._attributes[key] = value


class EndedSpan(NamedTuple):
    """One span, over. Ids in hexadecimal; `parent_id` is empty for the first of its trace."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    """Since the epoch, as `ended_ns`."""
    ended_ns: int
    attributes: Mapping[str, Attribute] | None
    error_type: str
    """Empty when it ended well."""
    error_text: str


class Tracer:
    """Makes spans for one service. Without an exporter, every span is the cheap stand-in."""

    def __init__(self, exporter: "SpanExporter | None", resource: "Resource | None", *, root_ratio: float) -> None:
        """`resource` describes the service; `root_ratio` of the traces that begin here are recorded."""
        self._root_ratio = root_ratio
        self._batches: SpanBatches | None = None
        if exporter is not None:
            from kit import span_export

            assert resource is not None
            self._batches = span_export.SpanBatches(exporter, resource)

    def span(
        self,
        name: str,
        *,
        parent: str = "",
        attributes: Mapping[str, Attribute] | None = None,
        is_root: bool = False,
    ) -> AbstractContextManager[Span]:
        """A span under `parent` (a traceparent). Recorded when the parent is sampled, or, with `is_root`, by ratio.

        A parent that is no traceparent is passed on and not followed.
        """
        batches = self._batches
        if batches is None:
            return _Unrecorded(parent or (new_traceparent(is_sampled=False) if is_root else ""))
        if not parent and is_root:
            is_sampled = secrets.randbelow(10_000) < self._root_ratio * 10_000
            begun = new_traceparent(is_sampled=is_sampled)
            if not is_sampled:
                return _Unrecorded(begun)
            return _Recorded(batches, name, trace_id=begun[3:35], parent_id="", attributes=attributes)
        if not parent.endswith(SAMPLED_SUFFIX) or _TRACEPARENT.fullmatch(parent) is None:
            return _Unrecorded(parent)
        return _Recorded(batches, name, trace_id=parent[3:35], parent_id=parent[36:52], attributes=attributes)

    @property
    def dropped_count(self) -> int:
        """Spans that were lost because the exporter was slower than they came."""
        return self._batches.dropped_count if self._batches is not None else 0

    def shutdown(self) -> None:
        """Send what is left; bounded to a few seconds."""
        if self._batches is not None:
            self._batches.shutdown()


def new_traceparent(*, is_sampled: bool) -> str:
    """A fresh W3C trace context."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{'01' if is_sampled else '00'}"


def tracer(service: str, *, node: str = "") -> Tracer:
    """The service's tracer, as the environment asks for it."""
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    trace_file = os.environ.get("SUBLET_TRACE_FILE")
    ratio = float(os.environ.get("SUBLET_TRACE_RATIO", "0.05" if not endpoint else "1.0"))
    if not endpoint and not trace_file:
        return Tracer(None, None, root_ratio=0.0)
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter

    exporter: SpanExporter
    if endpoint:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    else:
        exporter = _file_exporter(Path(str(trace_file)))
    attributes = {"service.name": f"sublet-{service}", **({"sublet.node": node} if node else {})}
    return Tracer(exporter, Resource.create(attributes), root_ratio=ratio)


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

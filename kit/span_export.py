"""Ended spans on their way out: kept as plain values, turned into OpenTelemetry's form and exported by a thread.

The SDK's own span costs its maker 20 to 30 us (locks, contexts, limits, a random id from the system); a service ends
one for each message of a sampled trace. Here the maker pays for a tuple, and the rest happens in batches elsewhere.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from kit.telemetry import EndedSpan

EXPORT_EVERY_S: Final = 0.5
BATCH_SPANS_MAX: Final = 512
WAKE_AT_SPANS: Final = 2048
"""So many waiting are exported at once."""
WAITING_SPANS_MAX: Final = 16_384
"""More are dropped and counted: an exporter that is down must not fill the memory."""
SHUTDOWN_TIMEOUT_S: Final = 5.0

_SCOPE: Final = InstrumentationScope("sublet")
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)

log = logging.getLogger(__name__)


class SpanBatches:
    """Takes spans from any thread and never waits for the exporter."""

    def __init__(self, exporter: SpanExporter, resource: Resource) -> None:
        self.dropped_count = 0
        self._exporter = exporter
        self._resource = resource
        self._waiting: deque[EndedSpan] = deque()
        self._is_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
        self._thread.start()

    def add(self, span: EndedSpan) -> None:
        if len(self._waiting) >= WAITING_SPANS_MAX:
            self.dropped_count += 1
            return
        self._waiting.append(span)
        if len(self._waiting) == WAKE_AT_SPANS:
            self._wake.set()

    def shutdown(self) -> None:
        """Exports what is left, within `SHUTDOWN_TIMEOUT_S`."""
        self._is_over = True
        self._wake.set()
        self._thread.join(SHUTDOWN_TIMEOUT_S)
        self._exporter.shutdown()

    def _run(self) -> None:
        is_over = False
        while not is_over:
            self._wake.wait(EXPORT_EVERY_S)
            self._wake.clear()
            is_over = self._is_over
            while self._waiting:
                batch = list(islice(self._waiting, BATCH_SPANS_MAX))
                self._export(batch)
                for _ in batch:
                    self._waiting.popleft()

    def _export(self, batch: Sequence[EndedSpan]) -> None:
        try:
            self._exporter.export([readable(span, self._resource) for span in batch])
        except Exception:
            # Traces are not worth a service. Exporters report their usual failures by themselves.
            log.exception("spans were not exported", extra={"span_count": len(batch)})


def readable(span: EndedSpan, resource: Resource) -> ReadableSpan:
    """In OpenTelemetry's form."""
    trace_id = int(span.trace_id, 16)
    status, events = Status(), []
    if span.error_type:
        status = Status(StatusCode.ERROR, f"{span.error_type}: {span.error_text}")
        told = {"exception.type": span.error_type, "exception.message": span.error_text}
        events.append(Event("exception", told, span.ended_ns))
    return ReadableSpan(
        name=span.name,
        context=SpanContext(trace_id, int(span.span_id, 16), is_remote=False, trace_flags=_SAMPLED),
        parent=SpanContext(trace_id, int(span.parent_id, 16), is_remote=True, trace_flags=_SAMPLED)
        if span.parent_id
        else None,
        resource=resource,
        attributes=span.attributes,
        events=events,
        status=status,
        start_time=span.began_ns,
        end_time=span.ended_ns,
        instrumentation_scope=_SCOPE,
    )

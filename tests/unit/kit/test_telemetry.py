"""Spans: what is recorded, what is passed on, and what an exporter gets."""

import threading
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from kit import span_export
from kit.telemetry import Tracer, new_traceparent

SAMPLED = "00-11112222333344445555666677778888-1234567812345678-01"
UNSAMPLED = "00-11112222333344445555666677778888-1234567812345678-00"


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        self.spans.extend(spans)
        return SpanExportResult.SUCCESS


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def tracer(kept: Kept) -> Iterator[Tracer]:
    made = Tracer(kept, Resource.create({"service.name": "sublet-test"}), root_ratio=1.0)
    yield made
    kept.gate.set()
    made.shutdown()


def test_a_span_continues_its_parents_trace_and_is_exported_in_full(tracer: Tracer, kept: Kept) -> None:
    with tracer.span("outer", parent=SAMPLED, attributes={"model": "m"}) as outer:
        outer.set("count", 3)
        with tracer.span("inner", parent=outer.traceparent):
            pass
    tracer.shutdown()

    inner, found = kept.spans
    assert found.name == "outer"
    assert dict(found.attributes or {}) == {"model": "m", "count": 3}
    assert found.resource.attributes["service.name"] == "sublet-test"
    assert f"{found.parent.span_id:016x}" == "1234567812345678"  # type: ignore[union-attr]
    assert f"{found.context.trace_id:032x}" == "11112222333344445555666677778888"
    assert inner.parent.span_id == found.context.span_id  # type: ignore[union-attr]
    assert found.start_time <= inner.start_time <= inner.end_time <= found.end_time  # type: ignore[operator]
    assert '"name": "outer"' in found.to_json()


def test_a_failure_is_told_and_passed_on(tracer: Tracer, kept: Kept) -> None:
    with pytest.raises(ValueError, match="no such model"), tracer.span("work", parent=SAMPLED):
        raise ValueError("no such model")
    tracer.shutdown()

    (span,) = kept.spans
    assert span.status.description == "ValueError: no such model"
    assert dict(span.events[0].attributes or {})["exception.type"] == "ValueError"


@pytest.mark.parametrize(
    "parent", ["", UNSAMPLED, "x-01", "00-zz-01", "00-" + "1" * 32 + "-1-01", "-01", "ü" * 40 + "-01"]
)
def test_what_is_not_sampled_or_no_traceparent_is_passed_on_unrecorded(tracer: Tracer, kept: Kept, parent: str) -> None:
    with tracer.span("work", parent=parent) as span:
        span.set("count", 1)
        assert span.traceparent == parent
    tracer.shutdown()

    assert kept.spans == []


def test_a_root_begins_a_trace(tracer: Tracer, kept: Kept) -> None:
    with tracer.span("request", is_root=True) as span:
        assert span.traceparent.endswith("-01")
    tracer.shutdown()

    assert kept.spans[0].parent is None


def test_a_root_without_an_exporter_still_has_a_trace_to_pass_on() -> None:
    with Tracer(None, None, root_ratio=0.0).span("request", is_root=True) as span:
        assert span.traceparent.endswith("-00")


def test_an_exporter_that_hangs_costs_spans_and_no_memory(
    tracer: Tracer, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_export, "WAITING_SPANS_MAX", 10)
    kept.gate.clear()
    for _ in range(25):
        with tracer.span("work", parent=SAMPLED):
            pass
    assert tracer.dropped_count == 15
    kept.gate.set()
    tracer.shutdown()

    assert len(kept.spans) == 10


def test_an_exporter_that_fails_costs_its_batch_only(tracer: Tracer, kept: Kept) -> None:
    kept.failure = RuntimeError("collector")
    with tracer.span("work", parent=SAMPLED):
        pass
    tracer.shutdown()

    assert kept.spans == []


def test_new_traces_differ() -> None:
    assert new_traceparent(is_sampled=True) != new_traceparent(is_sampled=True)

"""Numbers for Prometheus. Labels are bounded: a model beyond the first few hundred is counted as ``other``."""

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway.runtime import Runtime

OTHER: Final = "other"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Metrics:
    """One registry per gateway, so that several can live in one test process."""

    def __init__(self, runtime: Runtime, *, models_max: int) -> None:
        self.registry = CollectorRegistry()
        self._models_max = models_max
        self._models: set[str] = set()
        self.requests = Counter(
            "sublet_gateway_requests",
            "Requests that are over, by status and error code.",
            ("model", "status", "code"),
            registry=self.registry,
        )
        self.hold_seconds = Histogram(
            "sublet_gateway_hold_seconds",
            "Time that released requests spent waiting for their model.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_byte_seconds = Histogram(
            "sublet_gateway_first_byte_seconds",
            "From arrival to the first byte of the answer, the hold included.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.bounces = Counter(
            "sublet_gateway_bounces",
            "Requests that a replica gave back before its answer began.",
            ("reason",),
            registry=self.registry,
        )
        self.tokens = Counter(
            "sublet_gateway_tokens", "Tokens as engines counted them.", ("model", "kind"), registry=self.registry
        )
        self.registry.register(_State(runtime, self))

    def label(self, model: str) -> str:
        """The model's own name while there is room for it. Only names of deployments may come here."""
        if model in self._models:
            return model
        if len(self._models) >= self._models_max:
            return OTHER
        self._models.add(model)
        return model

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges, read from the core when somebody asks."""

    def __init__(self, runtime: Runtime, metrics: Metrics) -> None:
        self._runtime = runtime
        self._metrics = metrics

    def collect(self) -> Iterable[GaugeMetricFamily]:
        core = self._runtime.core
        in_flight = GaugeMetricFamily("sublet_gateway_in_flight", "Requests at replicas.", labels=["model"])
        held = GaugeMetricFamily("sublet_gateway_held", "Requests that wait for their model.", labels=["model"])
        sums: dict[str, list[int]] = {}
        for deployment_id, deployment in core.routes.deployments.items():
            label = self._metrics.label(deployment.spec.name)
            load = core.loads.models.get(deployment_id)
            hold = core.holds.holds.get(deployment_id)
            total = sums.setdefault(label, [0, 0])
            total[0] += 0 if load is None else load.in_flight_count
            total[1] += 0 if hold is None else len(hold.waiting)
        for label, (in_flight_count, held_count) in sorted(sums.items()):
            in_flight.add_metric([label], in_flight_count)
            held.add_metric([label], held_count)
        held_bytes = GaugeMetricFamily("sublet_gateway_held_bytes", "Bytes of bodies that wait.")
        held_bytes.add_metric([], core.holds.byte_count)
        dropped = GaugeMetricFamily("sublet_gateway_signals_dropped", "Signals that the bus did not take, since start.")
        dropped.add_metric([], self._runtime.signals.dropped_count)
        return [in_flight, held, held_bytes, dropped]

"""The engine's figures under vLLM's names, so that whatever reads vLLM reads this engine too."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engines.prometheus import Histogram, Page, label_text

# vLLM's buckets.
TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TOKEN_BOUNDS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0
)  # fmt: skip
REQUEST_BOUNDS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What the engine knows at the moment of a scrape."""

    running_count: int
    waiting_count: int
    kv_used_fraction: float
    block_count: int
    block_tokens: int
    is_asleep: bool
    preemption_count: int
    prefix_asked_tokens: int
    prefix_found_tokens: int
    slowed_s: float  # that steps took longer because of other engines on the GPU


@dataclass(slots=True)
class Metrics:
    """Sums and distributions since the process began."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    late_s: float = 0.0  # how far real time ran ahead of modelled time: above zero the machine is too slow
    ended: Counter[str] = field(default_factory=Counter)  # by finish reason
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    inter_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS_S))
    whole: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_S))
    queue: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_S))

    def page(self, gauges: Gauges, *, model: str, device: str) -> str:
        """The text of `GET /metrics`."""
        labels = {"model_name": model, "engine": "0"}
        page = Page()
        page.value("vllm:num_requests_running", "gauge", "Requests in the batch.", gauges.running_count, labels)
        page.value("vllm:num_requests_waiting", "gauge", "Requests waiting for room.", gauges.waiting_count, labels)
        page.value("vllm:kv_cache_usage_perc", "gauge", "KV cache used, 0 to 1.", gauges.kv_used_fraction, labels)
        sleep_lines = [
            f"vllm:engine_sleep_state{label_text({**labels, 'sleep_state': state})} {int(is_on)}"
            for state, is_on in (
                ("awake", not gauges.is_asleep),
                ("weights_offloaded", gauges.is_asleep),
                ("discard_all", False),
            )
        ]
        page.family("vllm:engine_sleep_state", "gauge", "The state that is 1 holds.", sleep_lines)
        page.value("vllm:num_preemptions_total", "counter", "Requests preempted.", gauges.preemption_count, labels)
        asked, found = gauges.prefix_asked_tokens, gauges.prefix_found_tokens
        page.value("vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up.", asked, labels)
        page.value("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found.", found, labels)
        page.value("vllm:prompt_tokens_total", "counter", "Prompt tokens.", self.prompt_tokens, labels)
        page.value("vllm:generation_tokens_total", "counter", "Generated tokens.", self.generation_tokens, labels)
        success_lines = [
            f"vllm:request_success_total{label_text({**labels, 'finished_reason': reason})} {self.ended[reason]}"
            for reason in ("stop", "length", "abort")
        ]
        page.family("vllm:request_success_total", "counter", "Requests ended, by reason.", success_lines)
        histograms = (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token.", self.ttft),
            ("vllm:inter_token_latency_seconds", "Between two tokens of a request.", self.inter_token),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", self.whole),
            ("vllm:request_queue_time_seconds", "From arrival to admission.", self.queue),
        )
        for name, description, histogram in histograms:
            page.family(name, "histogram", description, histogram.lines(name, labels))
        sizes = {"block_size": str(gauges.block_tokens), "num_gpu_blocks": str(gauges.block_count)}
        page.value("vllm:cache_config_info", "gauge", "Sizes of the KV cache.", 1, {**labels, **sizes})
        page.value("sublet_engine_late_seconds_total", "counter", "Real beyond modelled time.", self.late_s, labels)
        page.value(
            "sublet_engine_neighbour_seconds_total",
            "counter",
            "Time that steps took longer because of other engines on the GPU.",
            gauges.slowed_s,
            labels,
        )
        page.value("sublet_engine_info", "gauge", "What this engine runs on.", 1, {**labels, "device": device})
        return page.text()

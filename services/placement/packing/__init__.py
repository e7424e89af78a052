"""Which node and which of its GPUs an ask should get: exact, without messages, for the service and the benchmarks."""

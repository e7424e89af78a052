"""The whole of Sublet on one host: for `make up`, `make demo`, end-to-end tests and benchmarks."""

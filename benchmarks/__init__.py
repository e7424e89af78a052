"""Every figure that the project states, measured again by one command: ``python -m benchmarks NAME``."""

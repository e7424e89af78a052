"""What every service needs and what is not about GPUs: the bus, history, the two shells, settings, telemetry."""

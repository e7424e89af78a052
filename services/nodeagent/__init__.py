"""The node agent: grants leases on its host's GPUs, enforces them, runs engines, and moves weights."""

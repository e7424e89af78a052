"""A training job for hosts without one: it holds memory, steps, checkpoints, and yields its GPU with no step lost."""

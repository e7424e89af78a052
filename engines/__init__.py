"""Workloads for hosts without a real engine: `simulated` serves OpenAI routes, `training` steps and checkpoints.

Both hold real device memory through `devices`; `engines.model` says how fast they are. See docs/engines.md.
"""

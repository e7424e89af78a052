"""Owns the memory that engines of one host borrow: device memory in large handles, pinned host memory, and the link."""

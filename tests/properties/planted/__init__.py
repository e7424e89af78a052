"""Faults planted in copies of services and of the shell, to show that the checks can fail.

Nothing in production code knows of them: each is a replacement that a test hands in. `python -m benchmarks planted`
tells how many seeds each one needs until a check finds it.
"""

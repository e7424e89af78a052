"""The timing model of an inference engine: how long a step takes, which requests share it, what memory they hold.

Pure: no clock, no I/O. The simulated engine drives it in real time, a simulator can drive it in virtual time.
"""

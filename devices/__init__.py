"""The hardware port: GPUs, their memory and copies. `devices.api` is the contract; see docs/devices.md."""

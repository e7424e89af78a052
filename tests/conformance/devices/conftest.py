"""The contract lies in modules of its own: its assertions are explained like those of tests."""

import pytest

for part in ("inventory", "memory", "processes"):
    pytest.register_assert_rewrite(f"tests.conformance.devices.contract_{part}")

from tests.conformance.devices.contract_tools import device, process, uuid  # noqa: E402

__all__ = ["device", "process", "uuid"]

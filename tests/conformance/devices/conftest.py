"""The contract is a module of its own: its assertions are explained like those of tests."""

import pytest

pytest.register_assert_rewrite("tests.conformance.devices.contract")

from tests.conformance.devices.contract import device, process, uuid  # noqa: E402

__all__ = ["device", "process", "uuid"]

"""The server of these tests."""

from tests.fixtures.nats import own_nats_server

__all__ = ["own_nats_server"]

"""The server for the NATS half of the suite."""

from tests.fixtures.nats import nats_server, nats_url, own_nats_server

__all__ = ["nats_server", "nats_url", "own_nats_server"]

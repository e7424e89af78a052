"""Grade `broker` with a real memory broker: given when it holds the whole GPU, not given when it does not."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import softgpu
from kit.process import free_port
from schemas.deployments import EngineKind
from schemas.units import GiB, MiB
from tests.integration.test_guard import NOT_SUPPORTED, offered
from tests.integration.test_holder import ROOT, can_connect, holder_process, until
from tests.integration.test_node_several_gpus import CONTEXT_BYTES, SHARE_BYTES, hands_on, replica
from tests.unit.engines.running import software_host

pytestmark = pytest.mark.anyio
RESERVE_BYTES = 48 * MiB


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="softgpu-test-", dir="/dev/shm"))
    host = softgpu.Host(
        folder / "host", gpus=1, profile="test-1", total_bytes=256 * MiB, context_bytes=8 * MiB
    ).create()
    host.set_fault("nvmlDeviceGetMemoryLimits_v1", times=-1, code=NOT_SUPPORTED)
    yield host
    host.remove()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def broker(host: softgpu.Host, folder: Path, *, hold: str, reserve_bytes: int = RESERVE_BYTES) -> Iterator[list[str]]:
    """A running one; the words that tell a guard where it is."""
    environment = {
        **os.environ, **host.environment(), "SUBLET_BROKER_STATE_DIR": str(folder), "SUBLET_BROKER_HOLD": hold,
        "SUBLET_BROKER_RESERVE_BYTES": str(reserve_bytes - 8 * MiB), "SUBLET_BROKER_ARENA_DIR": str(folder / "arena"),
        "SUBLET_BROKER_HOST_BUDGET_BYTES": str(8 * GiB), "SUBLET_BROKER_BLOCK_BYTES": str(64 * MiB),
        "SUBLET_BROKER_PIECE_BYTES_MAX": str(64 * MiB),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "services", "broker"], env=environment, cwd=ROOT)
    try:
        yield [f"broker={folder}"]
    finally:
        process.terminate()
        process.wait(timeout=60)


async def test_the_grade_broker_is_given_when_a_direct_allocation_beyond_the_reserve_is_refused(
    tmp_path: Path, host: softgpu.Host
) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()):
        with broker(host, tmp_path / "b", hold="all") as words:
            await until(lambda: can_connect(tmp_path / "b" / "control.sock"))
            told = await offered(tmp_path, host, *words)

    [(grade, reason)] = told["grades"]
    assert "broker" == grade, reason
    assert "a live allocation beyond the reserve was refused" in reason
    assert "needs driver R615" in reason, "why it is not the grade above"
    assert 0 == told["foreign_bytes"], "what the broker holds is ours"


async def test_a_broker_that_leaves_memory_free_gives_no_such_grade(tmp_path: Path, host: softgpu.Host) -> None:
    async with holder_process(tmp_path, free_port(), **host.environment()):
        with broker(host, tmp_path / "b", hold="lent-only") as words:
            await until(lambda: can_connect(tmp_path / "b" / "control.sock"))
            told = await offered(tmp_path, host, *words)

    [(grade, reason)] = told["grades"]
    assert "cooperative" == grade
    assert "does not hold the whole GPU" in reason


async def test_an_engine_lives_in_what_the_broker_lends_where_nothing_else_is_to_be_had(tmp_path: Path) -> None:
    """Its account and its context together are its grant; the driver has no limit for it."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    reserve_bytes = 2 * GiB  # As the agent's default.
    with software_host(phantom=True, gpus=2, total_bytes=16 * GiB, context_bytes=CONTEXT_BYTES) as host:
        host.set_fault("nvmlDeviceGetMemoryLimits_v1", times=-1, code=NOT_SUPPORTED)
        with broker(host, tmp_path / "b", hold="all", reserve_bytes=reserve_bytes - CONTEXT_BYTES):
            sockets = {name: tmp_path / "b" / f"{name}.sock" for name in ("control", "engines")}
            await until(lambda: can_connect(sockets["control"]))
            settings = {
                "broker_socket": str(sockets["control"]), "broker_engine_socket": str(sockets["engines"]),
            }  # fmt: skip
            async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED), **settings) as hands:
                started = await hands.do("start")

                assert "EngineStarted" == started["kind"], started
                assert "broker" == started["result"]["grade"]
                assert 2 * (SHARE_BYTES - CONTEXT_BYTES) == started["result"]["enforced_bytes"]
                assert [] == started["limits"]
                await hands.do("stop")

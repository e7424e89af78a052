"""Every swap driver with real processes on software GPUs: holder, engine, checkpointer and the agent's own hands."""

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import softgpu
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec, SwapDriver
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import MiB
from tests.integration.test_node_several_gpus import Hands, hands_on
from tests.unit.engines.running import SMALL_CONTEXT_BYTES, software_host

pytestmark = pytest.mark.anyio

SHARE_BYTES = 96 * MiB
WEIGHTS_BYTES = 32 * MiB


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    """Two small GPUs whose copies move every byte."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with software_host(phantom=False, gpus=2, total_bytes=256 * MiB, context_bytes=SMALL_CONTEXT_BYTES) as made:
        yield made


@pytest.fixture
def images(host: softgpu.Host) -> Path:
    """Where frozen processes are kept; goes with the host."""
    return host.state_dir.parent / f"{host.state_dir.name}-images"


def proposal(host: softgpu.Host, driver: SwapDriver, *, gpu_count: int = 1) -> ReplicaProposal:
    return ReplicaProposal(
        replica_id="r-1",
        deployment_id="d",
        tenant="default",
        deployment=DeploymentSpec(
            name="mistral-7b-instruct-v0.3",
            engine=EngineSpec(
                kind=EngineKind.SIMULATED,
                weights_bytes=WEIGHTS_BYTES * gpu_count,
                swap_driver=driver,
                arguments={"time-scale": "0.01"},
            ),
            share=ShareSpec(request_bytes=SHARE_BYTES, gpu_count=gpu_count),
        ),
        shares=tuple(
            ShareProposal(
                replica_id="r-1",
                shard_index=index,
                gpu_uuid=uuid,
                request_bytes=SHARE_BYTES,
                limit_bytes=SHARE_BYTES,
            )
            for index, uuid in enumerate(host.uuids()[:gpu_count])
        ),
    )


@contextlib.asynccontextmanager
async def started(
    tmp_path: Path, host: softgpu.Host, images: Path, driver: SwapDriver, *, gpu_count: int = 1, **settings: object
) -> AsyncIterator[tuple[Hands, dict[str, Any]]]:
    """Hands, and what they told of the start."""
    more = {"images_dir": str(images), "lock_timeout_s": 20.0} | settings
    try:
        async with hands_on(tmp_path, host, proposal(host, driver, gpu_count=gpu_count), **more) as hands:
            told = await hands.do("start")
            assert "EngineStarted" == told["kind"], told
            yield hands, told
    finally:
        shutil.rmtree(images, ignore_errors=True)


def engine_bytes(host: softgpu.Host, told: dict[str, Any]) -> list[int]:
    """What the engine's process uses on each GPU."""
    return [
        sum(process["used_bytes"] for process in device["processes"] if "-m engines " in _command(process["pid"]))
        for device in host.status()["devices"]
    ]


def kept(images: Path) -> list[str]:
    """Files with frozen memory."""
    return [path.name for path in images.glob("*/*/GPU*")]


def _command(pid: int) -> str:
    """Empty when it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


CASES = [
    (SwapDriver.HTTP_SLEEP, False),
    (SwapDriver.HTTP_RELEASE, False),
    (SwapDriver.CHECKPOINT, False),
    (SwapDriver.CHECKPOINT, True),
    (SwapDriver.SLEEP_CHECKPOINT, False),
]


@pytest.mark.parametrize("gpu_count", [1, 2])
@pytest.mark.parametrize(("driver", "is_plain"), CASES)
async def test_a_replica_leaves_its_gpus_and_comes_back_whole_by_every_driver(
    tmp_path: Path, host: softgpu.Host, images: Path, driver: SwapDriver, is_plain: bool, gpu_count: int
) -> None:
    residue_bytes = SMALL_CONTEXT_BYTES if driver in (SwapDriver.HTTP_SLEEP, SwapDriver.HTTP_RELEASE) else 0
    async with started(tmp_path, host, images, driver, gpu_count=gpu_count, is_checkpoint_plain=is_plain) as (
        hands,
        told,
    ):
        resident = engine_bytes(host, told)

        parked = await hands.do("park")
        assert "EngineParked" == parked["kind"], parked
        assert [residue_bytes] * gpu_count == parked["result"]["residues"] == engine_bytes(host, told)[:gpu_count]
        assert (driver, "host") == (parked["result"]["swap_driver"], parked["result"]["tier"])

        woken = await hands.do("wake")
        assert "EngineWoken" == woken["kind"], woken
        assert resident == engine_bytes(host, told)
        assert woken["result"]["copied_bytes"] > 0

        stopped = await hands.do("stop")
        assert "EngineStopped" == stopped["kind"], stopped
        assert [] == kept(images), "nothing of its memory is left in the host's"


async def test_a_replica_parked_by_a_stop_leaves_nothing_and_can_be_started_again(
    tmp_path: Path, host: softgpu.Host, images: Path
) -> None:
    async with started(tmp_path, host, images, SwapDriver.RESTART) as (hands, _):
        parked = await hands.do("park")
        assert "EngineParked" == parked["kind"], parked
        assert ([0], "nowhere") == (parked["result"]["residues"], parked["result"]["tier"])
        assert [0, 0] == parked["used"]

        assert "EngineStarted" == (await hands.do("start"))["kind"]

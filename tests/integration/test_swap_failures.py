"""What goes wrong in a swap, and what becomes of the engine: each with real processes on a software GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import softgpu
from schemas.deployments import SwapDriver
from schemas.units import MiB
from tests.integration.test_holder import ROOT
from tests.integration.test_swap_drivers import SHARE_BYTES, engine_bytes, host, images, kept, started

__all__ = ["host", "images"]

pytestmark = pytest.mark.anyio

NEVER = -1
UNKNOWN = 999
HOG = """
import sys
from devices.cuda import CudaDevice
device = CudaDevice(sys.argv[1]); region = device.allocate(int(sys.argv[2])); print("held", flush=True)
sys.stdin.readline()
"""


def frozen_pid(images: Path) -> int:
    return int(next(path.parent.name for path in images.glob("*/*/about.json")))


class Hog:
    """A stranger that holds memory of the first GPU."""

    def __init__(self, host: softgpu.Host, size_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOG, host.uuids()[0], str(size_bytes)],
            cwd=ROOT, env={**os.environ, **host.environment()}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert b"held\n" == self._process.stdout.readline()

    def go(self) -> None:
        self._process.communicate(b"\n")


@pytest.fixture
def hogs(host: softgpu.Host) -> Iterator[list[Hog]]:
    made: list[Hog] = []
    yield made
    for hog in made:
        hog.go()


async def test_nothing_is_restored_before_its_bytes_are_free_and_it_returns_when_they_are(
    tmp_path: Path, host: softgpu.Host, images: Path, hogs: list[Hog]
) -> None:
    """A restore that runs out of memory would leave the process away for ever."""
    async with started(tmp_path, host, images, SwapDriver.CHECKPOINT) as (hands, _):
        await hands.do("park")
        hogs.append(await anyio.to_thread.run_sync(Hog, host, 180 * MiB))

        refused = await hands.do("wake")
        hogs.pop().go()
        woken = await hands.do("wake")

    assert "EngineNotWoken" == refused["kind"], refused
    assert 0 < refused["result"]["short_by_bytes"] <= SHARE_BYTES
    assert "EngineWoken" == woken["kind"], woken


async def test_a_wake_that_the_engine_rolls_back_is_tried_once_more(
    tmp_path: Path, host: softgpu.Host, images: Path
) -> None:
    async with started(tmp_path, host, images, SwapDriver.HTTP_SLEEP) as (hands, _):
        await hands.do("park")
        host.set_fault("cuMemCreate", code="CUDA_ERROR_OUT_OF_MEMORY", times=1)
        woken = await hands.do("wake")

        await hands.do("park")
        host.set_fault("cuMemCreate", code="CUDA_ERROR_OUT_OF_MEMORY", times=NEVER)
        refused = await hands.do("wake")
        host.clear_faults()
        again = await hands.do("wake")

    assert "EngineWoken" == woken["kind"], woken
    assert "EngineNotWoken" == refused["kind"], refused
    assert refused["used"][0] < SHARE_BYTES // 2, "nothing stays of half a wake"
    assert "EngineWoken" == again["kind"], again


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("cuCheckpointProcessLock", "CUDA_ERROR_NOT_READY", "could not be locked"),
        ("cuCheckpointProcessCheckpoint", "CUDA_ERROR_UNKNOWN", "could not be saved"),
        ("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY", "no host memory"),
    ],
)
async def test_a_park_that_fails_leaves_the_engine_serving_with_its_bytes(
    tmp_path: Path, host: softgpu.Host, images: Path, function: str, code: str, words: str
) -> None:
    """A lock that times out, a save that fails, and a host without memory for the image."""
    host.set_fault(function, code=code, times=NEVER)
    async with started(tmp_path, host, images, SwapDriver.CHECKPOINT) as (hands, told):
        resident = engine_bytes(host, told)

        stayed = await hands.do("park")
        after = engine_bytes(host, told)
        host.clear_faults()
        parked, woken = await hands.do("park"), await hands.do("wake")

    assert "EngineStayed" == stayed["kind"], stayed
    assert words in stayed["result"]["reason"]
    assert resident == after
    assert ["EngineParked", "EngineWoken"] == [parked["kind"], woken["kind"]], (parked, woken)


@pytest.mark.parametrize("function", ["nvmlDeviceSetMemoryLimits_v1", "nvmlDeviceGetMemoryLimits_v1"])
async def test_a_driver_that_fails_once_at_a_limit_is_asked_again_in_the_middle_of_a_swap(
    tmp_path: Path, host: softgpu.Host, images: Path, function: str
) -> None:
    async with started(tmp_path, host, images, SwapDriver.HTTP_SLEEP) as (hands, _):
        host.set_fault(function, code=UNKNOWN)
        parked = await hands.do("park")
        host.set_fault(function, code=UNKNOWN)
        woken = await hands.do("wake")

        assert 1 == host.status()["faults"][-1]["hit_count"]
    assert ["EngineParked", "EngineWoken"] == [parked["kind"], woken["kind"]], (parked, woken)


async def test_an_engine_without_a_limit_is_ended_and_no_agent_with_it(
    tmp_path: Path, host: softgpu.Host, images: Path
) -> None:
    async with started(tmp_path, host, images, SwapDriver.HTTP_SLEEP, wake_deadline_s=2.0) as (hands, told):
        await hands.do("park")
        host.set_fault("nvmlDeviceSetMemoryLimits_v1", code=UNKNOWN, times=NEVER)

        lost = await hands.do("wake")

        host.clear_faults()
        assert "EngineLost" == lost["kind"], lost
        assert "its limit cannot be set" in lost["result"]["reason"]
        assert [0, 0] == engine_bytes(host, told)
        assert "EngineStarted" == (await hands.do("start"))["kind"]


@pytest.mark.parametrize("driver", [SwapDriver.CHECKPOINT, SwapDriver.SLEEP_CHECKPOINT])
async def test_a_restore_that_fails_ends_the_engine_and_nothing_is_left_of_it(
    tmp_path: Path, host: softgpu.Host, images: Path, driver: SwapDriver
) -> None:
    async with started(tmp_path, host, images, driver) as (hands, told):
        await hands.do("park")
        host.set_fault("cuCheckpointProcessRestore", code="CUDA_ERROR_UNKNOWN", times=NEVER)

        lost = await hands.do("wake")

        assert "EngineLost" == lost["kind"], lost
        assert "did not come back" in lost["result"]["reason"]
        assert ([0, 0], []) == (engine_bytes(host, told), kept(images))
        host.clear_faults()
        assert "EngineStarted" == (await hands.do("start"))["kind"]


async def test_an_engine_that_dies_while_it_is_parked_is_told_as_lost_and_its_image_goes(
    tmp_path: Path, host: softgpu.Host, images: Path
) -> None:
    async with started(tmp_path, host, images, SwapDriver.CHECKPOINT) as (hands, told):
        await hands.do("park")
        os.kill(frozen_pid(images), signal.SIGKILL)

        lost = await hands.do("wake")

        assert "EngineLost" == lost["kind"], lost
        assert ([0, 0], []) == (engine_bytes(host, told), kept(images))


async def test_an_engine_that_finds_its_own_bytes_wrong_after_a_wake_serves_nobody(
    tmp_path: Path, host: softgpu.Host, images: Path
) -> None:
    async with started(tmp_path, host, images, SwapDriver.HTTP_SLEEP) as (hands, told):
        await hands.do("park")
        host.set_fault("cuMemcpyHtoDAsync", kind="corrupt", times=NEVER)

        lost = await hands.do("wake")

        host.clear_faults()
        assert "EngineLost" == lost["kind"], lost
        assert [0, 0] == engine_bytes(host, told)


async def test_an_engine_that_does_not_notice_is_found_out_by_what_its_weights_showed_before(
    tmp_path: Path, host: softgpu.Host, images: Path
) -> None:
    async with started(tmp_path, host, images, SwapDriver.CHECKPOINT) as (hands, told):
        await hands.do("park")
        for path in images.glob("*/*/GPU*"):  # noqa: ASYNC240
            path.write_bytes(b"\xff" * path.stat().st_size)

        lost = await hands.do("wake")

        assert "EngineLost" == lost["kind"], lost
        assert "its weights are not those that were parked" in lost["result"]["reason"]
        assert [0, 0] == engine_bytes(host, told)


@pytest.mark.parametrize(("word", "should"), [("adopt-parked", "parked"), ("adopt-resident", "resident")])
@pytest.mark.parametrize("is_parked", [True, False])
async def test_a_returning_agent_makes_an_engine_what_its_lease_says(
    tmp_path: Path, host: softgpu.Host, images: Path, word: str, should: str, is_parked: bool
) -> None:
    async with started(tmp_path, host, images, SwapDriver.CHECKPOINT) as (hands, told):
        resident = engine_bytes(host, told)
        if is_parked:
            await hands.do("park")

        adopted: dict[str, Any] = await hands.do(word)

        assert "NoneType" == adopted["kind"], adopted
        assert engine_bytes(host, told) == (resident if should == "resident" else [0, 0])


async def test_images_outlive_the_agent_that_was_killed(tmp_path: Path, host: softgpu.Host, images: Path) -> None:
    """Its checkpointer ends with it; the next one finds the files and brings the process back."""
    async with started(tmp_path, host, images, SwapDriver.CHECKPOINT) as (hands, told):
        resident = engine_bytes(host, told)
        await hands.do("park")
        hands.kill()

        async with hands.again() as next_hands:
            woken = await next_hands.do("wake")

            assert "EngineWoken" == woken["kind"], woken
            assert resident == engine_bytes(host, told)

"""The soak in short, and that its account can fail: a planted leak and a planted damage are told."""

import argparse
import os
import sys
from pathlib import Path

import anyio
import pytest

import softgpu
from benchmarks.history import History
from benchmarks.progress import Progress
from benchmarks.report import Report
from benchmarks.soak import MIXED, soak, soak_settings
from benchmarks.soak_cycles import Cycles
from benchmarks.soak_ledger import left
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR, read_seed
from schemas.deployments import SwapDriver
from services.local.settings import StackSettings
from services.local.stack import LocalStack, running

pytestmark = [pytest.mark.anyio, pytest.mark.nats, pytest.mark.slow, pytest.mark.timeout(600)]
CYCLES = 15
SEED = 7


def settings(tmp_path: Path) -> StackSettings:
    return soak_settings(tmp_path / "state", gpu_count=1, handles_signals=False)


def options() -> argparse.Namespace:
    return argparse.Namespace(cycles=CYCLES, seed=SEED, driver=MIXED, minutes=6.0)


async def test_parks_and_wakes_under_kills_and_faults_leave_nothing(tmp_path: Path) -> None:
    async with running(settings(tmp_path)) as stack:
        report = await _soaked(stack)

    assert [] == [bar.as_json() for bar in report.missed], f"seed {SEED}: {report.table()}"


async def _soaked(stack: LocalStack) -> Report:
    reports: list[Report] = []
    async with NatsBus(stack.nats_url, read_seed(stack.folder.keys, ADMINISTRATOR), ADMINISTRATOR) as bus:
        history = History(bus)
        async with history.following():
            reports.append(await soak(options(), stack, history, Progress()))
    return reports[0]


async def test_a_leak_and_a_wrong_content_are_told(tmp_path: Path) -> None:
    """Device memory that a stray process keeps, and a model whose weights are others than they were."""
    async with running(settings(tmp_path)) as stack:
        host = softgpu.Host(stack.folder.runtime / "gpu", gpus=0)
        code = "from cuda.bindings import driver as d; d.cuInit(0); d.cuDevicePrimaryCtxRetain(0); input()"
        async with (
            NatsBus(stack.nats_url, read_seed(stack.folder.keys, ADMINISTRATOR), ADMINISTRATOR) as bus,
            await anyio.open_process(
                [sys.executable, "-c", code], stdin=-1, env={**os.environ, **host.environment()}
            ) as stray,
        ):
            history = History(bus)
            async with history.following():
                cycles = Cycles(stack, history, Progress(), seed=SEED, drivers=[SwapDriver.HTTP_SLEEP])
                await cycles.deploy()
                await cycles.run(1)
                cycles.expect("other content than before")
                await cycles.check_all()
                leftovers = await left(stack, await cycles.retire())
            stray.terminate()

    assert cycles.wrong, "the digest differs and nobody says so"
    assert leftovers.device_bytes > 0
    assert str(stray.pid) in leftovers.told

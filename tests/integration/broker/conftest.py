import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import softgpu
from devices.api import MiB
from tests.integration.broker.peers import Agent, BrokerProcess, EngineProcess


@dataclass
class World:
    """A software host of real bytes, its broker and engines."""

    folder: Path
    host: softgpu.Host
    broker: BrokerProcess
    engines: list[EngineProcess] = field(default_factory=list)
    agents: list[Agent] = field(default_factory=list)

    @property
    def gpu(self) -> str:
        return self.host.uuids()[0]

    def agent(self) -> Agent:
        self.agents.append(self.broker.agent())
        return self.agents[-1]

    def engine(self, replica_id: str, *, gpu: int = 0) -> EngineProcess:
        self.engines.append(EngineProcess(self.broker, self.host, replica_id, self.host.uuids()[gpu]))
        return self.engines[-1]

    def used_bytes(self, gpu: int = 0) -> int:
        return self.host.status()["devices"][gpu]["used_bytes"]

    def pinned_files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "arena").glob("block-*"))


class MakeWorld:
    def __init__(self) -> None:
        self.worlds: list[World] = []

    def __call__(self, *, gpus: int = 1, total_bytes: int = 512 * MiB, **settings: Any) -> World:
        folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="sublet-broker-test-"))
        host = softgpu.Host(folder / "gpu", gpus=gpus, profile="test-1", total_bytes=total_bytes).create()
        chosen = {
            "host_budget_bytes": 512 * MiB, "block_bytes": 64 * MiB, "piece_bytes_max": 32 * MiB,
            "reserve_bytes": 0, **settings,
        }  # fmt: skip
        self.worlds.append(World(folder, host, BrokerProcess(folder, host, **chosen)))
        return self.worlds[-1]


@pytest.fixture
def world() -> Iterator[MakeWorld]:
    """At the end everything has been given back: device memory, host memory, and the software GPU's own records."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    make = MakeWorld()
    yield make
    findings: list[object] = []
    for one in make.worlds:
        for engine in one.engines:
            engine.kill()
        for agent in one.agents:
            agent.close()
        one.broker.stop()
        findings += one.host.check(is_quiet=True)
        findings += [device["used_bytes"] for device in one.host.status()["devices"] if device["used_bytes"]]
        findings += one.pinned_files()
        one.host.remove()
        shutil.rmtree(one.folder)
    assert not findings, "something was left behind"

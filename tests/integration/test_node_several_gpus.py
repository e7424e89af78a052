"""A replica over two software GPUs, with real processes: holder, engine, driver and the node agent's own hands."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio.to_thread
import msgspec
import pytest

import softgpu
from kit.process import free_port
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec, WorkloadKind
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB, MiB
from tests.integration.test_holder import ROOT, holder_process
from tests.unit.engines.running import software_host

pytestmark = pytest.mark.anyio

SHARE_BYTES = 4 * GiB
CONTEXT_BYTES = 500 * MiB


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with software_host(phantom=True, gpus=2, context_bytes=CONTEXT_BYTES) as made:
        yield made


def replica(
    host: softgpu.Host,
    kind: EngineKind,
    *,
    environment: Mapping[str, str] = MappingProxyType({}),
    compute_portion: float | None = None,
) -> ReplicaProposal:
    return ReplicaProposal(
        replica_id="wide-1",
        deployment_id="d",
        tenant="default",
        deployment=DeploymentSpec(
            name="wide",
            kind=WorkloadKind.TRAINING if kind is EngineKind.TRAINING else WorkloadKind.INFERENCE,
            engine=EngineSpec(kind=kind, weights_bytes=3 * GiB, environment=dict(environment)),
            share=ShareSpec(request_bytes=SHARE_BYTES, gpu_count=2, compute_portion=compute_portion),
        ),
        shares=tuple(
            ShareProposal(
                replica_id="wide-1",
                shard_index=index,
                gpu_uuid=uuid,
                request_bytes=SHARE_BYTES,
                limit_bytes=SHARE_BYTES,
            )
            for index, uuid in enumerate(host.uuids())
        ),
    )


class Hands:
    """The agent's hands in their own process: a word for each effect, an answer for each."""

    def __init__(self, process: "subprocess.Popen[str]", start: "Callable[[], subprocess.Popen[str]]") -> None:
        self._process = process
        self._start = start

    def kill(self) -> None:
        """SIGKILL, as an agent that crashes."""
        self._process.kill()
        self._process.wait()

    @contextlib.asynccontextmanager
    async def again(self) -> AsyncIterator["Hands"]:
        """The next life of the same agent."""
        with self._start() as process:
            yield Hands(process, self._start)
            assert process.stdin is not None
            process.stdin.close()

    async def do(self, word: str) -> dict[str, Any]:
        return await anyio.to_thread.run_sync(self._ask, word)

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(word, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextlib.asynccontextmanager
async def hands_on(
    tmp_path: Path, host: softgpu.Host, proposal: ReplicaProposal, **settings: object
) -> AsyncIterator[Hands]:
    """`settings` of the agent, beside what the tests need."""
    environment = {**os.environ, **host.environment()}
    async with holder_process(tmp_path, free_port(), **host.environment()):
        arguments = [str(tmp_path / "state" / "holder.sock"), str(tmp_path / "agent"), str(host.state_dir)]
        arguments.append(json.dumps(settings))

        def start() -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.node_hands", *arguments],
                env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdin is not None
            print(msgspec.json.encode(proposal).decode(), file=process.stdin, flush=True)
            return process

        with start() as process:
            yield Hands(process, start)
            assert process.stdin is not None
            process.stdin.close()


@pytest.mark.parametrize("kind", [EngineKind.SIMULATED, EngineKind.TRAINING])
async def test_a_replica_over_two_gpus_starts_parks_wakes_and_goes_with_its_bytes_proven_on_both(
    tmp_path: Path, host: softgpu.Host, kind: EngineKind
) -> None:
    async with hands_on(tmp_path, host, replica(host, kind)) as hands:
        started = await hands.do("start")
        assert "EngineStarted" == started["kind"], started
        assert 2 * SHARE_BYTES == started["result"]["enforced_bytes"], "a limit on each GPU, both read back"
        resident = started["used"]
        assert all(SHARE_BYTES - 128 * MiB <= used <= SHARE_BYTES for used in resident), "spread evenly"

        parked = await hands.do("park")
        assert "EngineParked" == parked["kind"], parked
        assert [CONTEXT_BYTES, CONTEXT_BYTES] == parked["used"] == parked["result"]["residues"]
        assert [CONTEXT_BYTES, CONTEXT_BYTES] == [limit for limits in parked["limits"] for limit in limits.values()]

        woken = await hands.do("wake")
        assert "EngineWoken" == woken["kind"], woken
        assert resident == woken["used"]

        stopped = await hands.do("stop")
        assert "EngineStopped" == stopped["kind"], stopped
        assert ([0, 0], []) == (stopped["used"], stopped["limits"]), "nothing is left on either, limits neither"

"""Somebody's own OpenAI-compatible command under the node agent's hands: a real process on the software GPU.

It is our simulated engine, but nobody is told: what is known of it is its command, OpenAI's routes and its gauges.
"""

import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from msgspec import structs

import softgpu
from schemas.deployments import EngineKind, EngineSpec, ShareSpec, SwapDriver
from schemas.placement import ReplicaProposal
from schemas.units import GiB
from tests.integration.test_node_several_gpus import SHARE_BYTES, hands_on, replica
from tests.unit.engines.running import software_host

pytestmark = pytest.mark.anyio

# Prints what it was given, without the secret itself, and becomes the server.
SERVE = """
import os, sys
print("token of", len(os.environ.get("HF_TOKEN", "")), "characters, port", os.environ["PORT"], flush=True)
os.execv(sys.executable, [sys.executable, "-m", "engines", "simulated", *sys.argv[1:]])
"""
COMMAND = (
    sys.executable, "-c", SERVE, "--model", "{model}", "--port", "{port}", "--memory-bytes", "{memory_bytes}",
    "--weights-bytes", str(GiB), "--cold-start-s", "0",
)  # fmt: skip


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with software_host(phantom=True, gpus=1) as made:
        yield made


def own(host: softgpu.Host, **changes: Any) -> ReplicaProposal:
    """One GPU, with a program that nobody knows."""
    proposal = replica(host, EngineKind.OPENAI)
    engine = EngineSpec(
        kind=EngineKind.OPENAI, weights_bytes=GiB, command=(*COMMAND, "--gpu", host.uuids()[0]),
        swap_driver=SwapDriver.RESTART, **changes,
    )  # fmt: skip
    deployment = structs.replace(proposal.deployment, engine=engine, share=ShareSpec(request_bytes=SHARE_BYTES))
    return structs.replace(proposal, deployment=deployment)


async def test_a_command_of_ones_own_starts_within_its_share_serves_and_goes(
    tmp_path: Path, host: softgpu.Host
) -> None:
    """Ready when it lists its models, verified by a token, idle by its gauges; nothing of it stays on the GPU."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "HF_TOKEN").write_text("hf_very-secret\n")
    settings = {"secrets_dir": str(tmp_path / "secrets")}
    async with hands_on(tmp_path, host, own(host, secrets=("HF_TOKEN",)), **settings) as hands:
        started = await hands.do("start")
        assert "EngineStarted" == started["kind"], started
        assert SHARE_BYTES == started["result"]["enforced_bytes"]
        assert 0 < started["used"][0] <= SHARE_BYTES
        endpoint = started["result"]["endpoint"]
        assert endpoint.startswith("http://127.0.0.1:")
        models = await anyio.to_thread.run_sync(lambda: json.load(urllib.request.urlopen(f"{endpoint}/v1/models")))
        assert ["wide"] == [model["id"] for model in models["data"]]

        parked = await hands.do("park")
        assert "EngineParked" == parked["kind"], parked
        assert ([0], [0]) == (parked["result"]["residues"], parked["used"]), "a restart leaves nothing"
        again = await hands.do("start")
        assert "EngineStarted" == again["kind"], again
        stopped = await hands.do("stop")
        assert "EngineStopped" == stopped["kind"], stopped
        assert ([0], []) == (stopped["used"], stopped["limits"])

    log = await anyio.Path(tmp_path / "state" / "logs" / "wide-1.log").read_text()
    assert f"token of 14 characters, port {endpoint.rpartition(':')[2]}" in log
    assert "very-secret" not in log


async def test_a_node_without_its_secret_says_so(tmp_path: Path, host: softgpu.Host) -> None:
    async with hands_on(tmp_path, host, own(host, secrets=("NGC_API_KEY",))) as hands:
        lost = await hands.do("start")

    assert "EngineLost" == lost["kind"], lost
    assert "it needs the secret 'NGC_API_KEY'" in lost["result"]["reason"]

"""A replica in a container under the node agent's own hands: started within its share of a software GPU, asked, found
again by the next agent, stopped.
"""

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from msgspec import structs

import softgpu
from schemas.deployments import EngineKind, EngineSpec, Runtime, ShareSpec
from schemas.placement import ReplicaProposal
from tests.fixtures import docker_engine
from tests.integration.docker.test_containers import ENGINE, NETWORK, docker, node
from tests.integration.test_node_several_gpus import SHARE_BYTES, hands_on, replica
from tests.unit.engines.running import software_host

__all__ = ["node"]  # A fixture of both.
WORDS = Path(__file__).resolve().parents[2] / "unit" / "softgpu"
# A container sees its own cgroup of v2 by itself, but not where v1 is mounted beside it.
HYBRID = Path("/sys/fs/cgroup/unified")
CGROUPS = [f"{HYBRID}:{HYBRID}:ro"] if HYBRID.is_dir() else []
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.docker,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        "docker" not in os.environ.get("SUBLET_TESTS_REQUIRE", "").split(","), reason="`make compose-test` runs these"
    ),
]

# Takes some memory of the GPU, says how large CUDA shows the GPU, and serves.
ON_GPU = """
import ctypes as c, exported as e
e.call("cuInit", 0)
e.call("cuCtxSetCurrent", e.ask("cuDevicePrimaryCtxRetain", c.c_void_p, 0))
address = c.c_uint64(); e.call("cuMemAlloc_v2", c.byref(address), 64 << 20)
free, total = c.c_size_t(), c.c_size_t(); e.call("cuMemGetInfo_v2", c.byref(free), c.byref(total))
print("sees", total.value, "bytes", flush=True)
"""


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with software_host(phantom=True, gpus=1) as made:
        yield made


def in_container(host: softgpu.Host) -> ReplicaProposal:
    proposal = replica(host, EngineKind.OPENAI)
    engine = EngineSpec(
        kind=EngineKind.OPENAI,
        weights_bytes=0,
        image=docker_engine.ensure_base_images().get("PYTHON_IMAGE", "python:3.12-slim-bookworm"),
        command=("python", "-c", ON_GPU + ENGINE),
        environment={"SOFTGPU_DIR": "/softgpu", "LD_LIBRARY_PATH": "/libraries", "PYTHONPATH": "/words"},
        secrets=("HF_TOKEN",),
        runtime=Runtime.DOCKER,
    )
    deployment = structs.replace(proposal.deployment, engine=engine, share=ShareSpec(request_bytes=SHARE_BYTES))
    return structs.replace(proposal, deployment=deployment, shares=proposal.shares[:1])


def models_of(endpoint: str) -> list[str]:
    with urllib.request.urlopen(f"{endpoint}/v1/models", timeout=20) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


async def test_a_replica_in_a_container_outlives_its_agent_and_goes_when_it_is_told(
    tmp_path: Path, host: softgpu.Host, node: str
) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "HF_TOKEN").write_text("hf_very-secret")
    proposal = await anyio.to_thread.run_sync(in_container, host)
    mounts = [f"{host.state_dir}:/softgpu:rw", f"{softgpu.build()}:/libraries:ro", f"{WORDS}:/words:ro", *CGROUPS]
    settings = {
        "node": node,
        "docker_gpu_access": "none",
        "docker_network": NETWORK,
        "docker_mounts": mounts,
        "secrets_dir": str(tmp_path / "secrets"),
    }
    async with hands_on(tmp_path, host, proposal, **settings) as hands:
        started = await hands.do("start")
        assert "EngineStarted" == started["kind"], started
        endpoint = started["result"]["endpoint"]
        assert started["used"][0] > 64 << 20
        if started["result"]["enforced_bytes"]:
            soft = [limit["soft_bytes"] for group in host.status()["groups"] for limit in group["limits"]]
            assert SHARE_BYTES in soft, "its guarantee, which must not outlive its cgroup"
        assert ["chat"] == await anyio.to_thread.run_sync(models_of, endpoint)

        hands.kill()
        async with hands.again() as successor:
            adopted = await successor.do("adopt-resident")
            assert "NoneType" == adopted["kind"], adopted
            assert ["chat"] == await anyio.to_thread.run_sync(models_of, endpoint)
            same = await successor.do("start")
            assert endpoint == same["result"]["endpoint"], "the container that runs is the one that was wished for"
            stopped = await successor.do("stop")
            assert ("EngineStopped", [0]) == (stopped["kind"], stopped["used"])
            groups = host.status()["groups"]
            assert not [limit for group in groups for limit in group["limits"] if limit["soft_bytes"]]

    assert not await anyio.to_thread.run_sync(docker, "ps", "-aq", "--filter", f"label=sublet.node={node}")
    log = await anyio.Path(tmp_path / "agent" / "containers" / "wide-1.log").read_text()
    if started["result"]["enforced_bytes"]:  # A cgroup of its own: the limit stood before the engine looked.
        assert SHARE_BYTES == started["result"]["enforced_bytes"]
        assert f"sees {SHARE_BYTES} bytes" in log
    assert "with 14 secret characters" in log
    assert "stopping" in log
    assert "very-secret" not in log


async def test_what_docker_refuses_is_the_reason_of_the_loss(tmp_path: Path, host: softgpu.Host, node: str) -> None:
    """A GPU that Docker cannot give: this engine has no toolkit of NVIDIA's."""
    proposal = await anyio.to_thread.run_sync(in_container, host)
    engine = structs.replace(proposal.deployment.engine, secrets=())
    proposal = structs.replace(proposal, deployment=structs.replace(proposal.deployment, engine=engine))
    if "nvidia" in await anyio.to_thread.run_sync(docker, "info"):
        pytest.skip("this Docker has NVIDIA's toolkit")
    async with hands_on(tmp_path, host, proposal, node=node, docker_network=NETWORK) as hands:
        lost = await hands.do("start")

    assert "EngineLost" == lost["kind"], lost
    assert "could not select device driver" in lost["result"]["reason"]
    assert not await anyio.to_thread.run_sync(docker, "ps", "-aq", "--filter", f"label=sublet.node={node}")

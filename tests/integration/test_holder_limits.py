"""An engine's namespace is what the driver limits: on the software GPU, with cgroups and without."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import softgpu
from kit.process import free_port
from schemas.holders import EngineView
from tests.integration.test_holder import ROOT, Agent, holder_process

pytestmark = pytest.mark.anyio
LIMIT_BYTES = 64 << 20
ENGINE = (
    "import sys; from devices.cuda import CudaDevice; print('sees', CudaDevice(sys.argv[1]).memory().capacity_bytes)"
)


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    state_dir = Path("/dev/shm") / f"softgpu-test-{uuid.uuid4().hex[:12]}"
    host = softgpu.Host(state_dir, gpus=1, profile="test-1", total_bytes=256 << 20).create()
    yield host
    host.remove()


def with_inventory(host: softgpu.Host, statement: str, *arguments: str) -> str:
    """What the statement prints; `inventory` is the software host's, in a process of its own."""
    code = f"import sys; from devices.nvml import NvmlInventory; inventory = NvmlInventory(); {statement}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **host.environment()}, cwd=ROOT, text=True, capture_output=True, check=True, timeout=60,
    ).stdout  # fmt: skip


async def start_engine(agent: Agent, gpu_uuid: str) -> EngineView:
    return await agent.start("r/1", sys.executable, "-c", ENGINE, gpu_uuid, environment={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("cgroup", ["auto", "off"])
async def test_a_limit_set_behind_the_gate_is_what_the_engine_sees(
    tmp_path: Path, host: softgpu.Host, cgroup: str
) -> None:
    gpu_uuid = with_inventory(host, "print(inventory.gpus()[0].uuid)").strip()
    more = host.environment() | {"SUBLET_HOLDER_CGROUP": cgroup}
    async with holder_process(tmp_path, free_port(), **more) as (_, agent):
        view = await start_engine(agent, gpu_uuid)
        set_limit = f"inventory.set_limit(*sys.argv[1:3], soft_bytes=0, hard_bytes={LIMIT_BYTES})"
        with_inventory(host, set_limit, gpu_uuid, view.namespace)

        await agent.open_gate("r/1")
        ended = await agent.wait("r/1")

        assert ended.exit_code == 0
        assert f"sees {LIMIT_BYTES}\n" in log_of(view)
    has_cgroup = view.namespace.startswith("/")
    assert limited_groups(host) == ([] if has_cgroup else ["sublet-r/1"]), "the holder clears those it takes away"


def limited_groups(host: softgpu.Host) -> list[str]:
    return [group["name"] for group in host.status()["groups"] if any(limit["hard_bytes"] for limit in group["limits"])]


def log_of(view: EngineView) -> str:
    return Path(view.log_path).read_text()

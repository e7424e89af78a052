"""An engine on a MIG instance, with real processes: holder, engine, driver and the node agent's own hands."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import softgpu
from schemas.deployments import DeploymentSpec, EngineSpec, ShareSpec
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import GiB, MiB
from tests.integration.test_node_several_gpus import hands_on

pytestmark = pytest.mark.anyio
SHARE_BYTES = 4 * GiB


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="sublet-mig-") as directory:
        cut = {0: ("1g.10gb", "2g.20gb")}
        yield softgpu.Host(Path(directory), gpus=1, phantom=True, context_bytes=500 * MiB, mig=cut).create()


async def test_an_engine_starts_on_a_mig_instance_without_a_limit_and_leaves_nothing(
    tmp_path: Path, host: softgpu.Host
) -> None:
    uuid = host.mig_uuids()[0]
    share = ShareProposal(
        replica_id="part-1", shard_index=0, gpu_uuid=uuid, request_bytes=SHARE_BYTES, limit_bytes=SHARE_BYTES
    )
    proposal = ReplicaProposal(
        replica_id="part-1",
        deployment_id="d",
        tenant="default",
        deployment=DeploymentSpec(
            name="part", engine=EngineSpec(weights_bytes=3 * GiB), share=ShareSpec(request_bytes=SHARE_BYTES)
        ),
        shares=(share,),
    )
    async with hands_on(tmp_path, host, proposal) as hands:
        started = await hands.do("start")
        assert "EngineStarted" == started["kind"], started
        stopped = await hands.do("stop")

    whole, part, other = started["used"]
    assert (0, 0) == (whole, other)
    assert SHARE_BYTES - 128 * MiB <= part <= SHARE_BYTES
    assert [] == started["limits"], "the hardware keeps it apart; the driver's limits exclude MIG"
    assert ("EngineStopped", [0, 0, 0]) == (stopped["kind"], stopped["used"])

"""The trial of a GPU that misbehaved, with a real process over the software GPU's driver."""

from pathlib import Path

import pytest

import softgpu
from schemas.deployments import EngineKind
from tests.integration.test_node_several_gpus import hands_on, host, replica

__all__ = ["host"]
pytestmark = pytest.mark.anyio


async def test_a_gpu_is_well_when_it_gives_memory_and_not_when_it_does_not(tmp_path: Path, host: softgpu.Host) -> None:
    async with hands_on(tmp_path, host, replica(host, EngineKind.SIMULATED)) as hands:
        well = await hands.do("try")
        host.set_fault("cuMemCreate", times=-1, code="CUDA_ERROR_ECC_UNCORRECTABLE")
        ill = await hands.do("try")
        host.clear_faults()
        host.set_fault("cuMemCreate", times=-1, code="CUDA_ERROR_OUT_OF_MEMORY")
        full = await hands.do("try")
        host.clear_faults()
        host.set_lost(0)
        away = await hands.do("try")

    assert ("GpuTried", "", 3) == (well["kind"], well["result"]["problem"], well["result"]["fault_count"])
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" in ill["result"]["problem"]
    assert ill["result"]["is_conclusive"]
    assert not full["result"]["is_conclusive"], "no room says nothing about the GPU"
    assert "NoneType" == away["kind"], "it is tried when it is back"
    assert [0, 0] == well["used"] == full["used"], "a trial leaves nothing behind"

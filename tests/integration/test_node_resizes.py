"""Grants that change under a serving engine: real processes over the software GPU's driver, and its limits."""

from pathlib import Path

import pytest
from msgspec.structs import replace

import softgpu
from schemas.deployments import EngineKind
from schemas.placement import ReplicaProposal
from schemas.units import MiB
from tests.integration.test_node_several_gpus import CONTEXT_BYTES, SHARE_BYTES, hands_on, host, replica

pytestmark = pytest.mark.anyio
__all__ = ["host"]

REQUEST_MIB = SHARE_BYTES // MiB
GRANT_MIB = REQUEST_MIB + 2048
LESS_MIB = REQUEST_MIB + 1024


@pytest.fixture
def elastic(host: softgpu.Host) -> ReplicaProposal:
    fixed = replica(host, EngineKind.SIMULATED)
    shares = tuple(replace(share, limit_bytes=2 * SHARE_BYTES) for share in fixed.shares)
    return replace(fixed, shares=shares)


async def test_an_engine_grows_to_its_grant_freezes_shrinks_and_comes_back_from_a_park_with_its_request(
    tmp_path: Path, host: softgpu.Host, elastic: ReplicaProposal
) -> None:
    async with hands_on(tmp_path, host, elastic) as hands:
        started = await hands.do("start")
        assert "EngineStarted" == started["kind"], started

        grown = await hands.do(f"resize burst 1 {GRANT_MIB} {REQUEST_MIB}")
        assert "EngineResized" == grown["kind"], grown
        assert all(after > before + 1800 * MiB for after, before in zip(grown["used"], started["used"], strict=True))
        assert [set(limit.values()) for limit in grown["limits"]] == [{GRANT_MIB * MiB}], grown

        frozen = await hands.do(f"resize freeze 2 {REQUEST_MIB} {GRANT_MIB}")
        assert "EngineResized" == frozen["kind"], frozen
        assert all(LESS_MIB * MiB < size <= GRANT_MIB * MiB for size in frozen["result"]["granted_bytes"])

        shrunk = await hands.do(f"resize give_back 3 {LESS_MIB} {GRANT_MIB}")
        assert "EngineResized" == shrunk["kind"], shrunk
        assert all(used <= LESS_MIB * MiB for used in shrunk["used"])
        assert [set(limit.values()) for limit in shrunk["limits"]] == [{LESS_MIB * MiB}], shrunk

        assert "NoneType" == (await hands.do(f"resize burst 1 {GRANT_MIB} {REQUEST_MIB}"))["kind"]

        assert "EngineParked" == (await hands.do("park"))["kind"]
        woken = await hands.do("wake")
        assert "EngineWoken" == woken["kind"], woken
        assert all(used <= SHARE_BYTES for used in woken["used"])
        assert "EngineStopped" == (await hands.do("stop"))["kind"]


async def test_a_borrower_is_checkpointed_with_what_it_holds_within_its_request_and_comes_back_so(
    tmp_path: Path, host: softgpu.Host, elastic: ReplicaProposal
) -> None:
    """Its own way to park is the engine's sleep; the ladder's step is the driver's, and leaves nothing."""
    images = {"images_dir": str(tmp_path / "images"), "lock_timeout_s": 1.0}
    async with hands_on(tmp_path, host, elastic, **images) as hands:
        started = await hands.do("start")
        assert "EngineStarted" == started["kind"], started
        assert "EngineResized" == (await hands.do(f"resize burst 1 {GRANT_MIB} {REQUEST_MIB}"))["kind"]

        parked = await hands.do("checkpoint")
        assert "EngineParked" == parked["kind"], parked
        assert ([0, 0], "checkpoint") == (parked["result"]["residues"], parked["result"]["swap_driver"])
        assert parked["result"]["copied_bytes"] > 0

        woken = await hands.do("thaw")
        assert "EngineWoken" == woken["kind"], woken
        assert all(CONTEXT_BYTES < used <= SHARE_BYTES + CONTEXT_BYTES for used in woken["used"]), woken
        assert "EngineStopped" == (await hands.do("stop"))["kind"]


async def test_an_engine_without_anything_that_takes_a_budget_says_so_once_and_keeps_what_it_had(
    tmp_path: Path, host: softgpu.Host
) -> None:
    fixed = replica(host, EngineKind.TRAINING)
    engine = replace(fixed.deployment.engine, is_elastic=True)
    shares = tuple(replace(share, limit_bytes=2 * SHARE_BYTES) for share in fixed.shares)
    wrong = replace(fixed, shares=shares, deployment=replace(fixed.deployment, engine=engine))
    async with hands_on(tmp_path, host, wrong) as hands:
        assert "EngineStarted" == (await hands.do("start"))["kind"]

        told = await hands.do(f"resize burst 1 {GRANT_MIB} {REQUEST_MIB}")

        assert ("EngineNotResized", False) == (told["kind"], told["result"]["is_able"]), told
        assert all(REQUEST_MIB * MiB <= size <= GRANT_MIB * MiB for size in told["result"]["granted_bytes"])
        assert "EngineStopped" == (await hands.do("stop"))["kind"]

"""Grants that change under a serving engine where the driver has no limits: held by its own budget or the broker."""

import os
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

import softgpu
from schemas.brokers import AccountView
from schemas.deployments import EngineKind
from schemas.placement import ReplicaProposal
from schemas.units import GiB, MiB
from services.nodeagent.broker_client import BrokerClient
from tests.integration.test_guard import NOT_SUPPORTED
from tests.integration.test_guard_broker import broker
from tests.integration.test_holder import can_connect, until
from tests.integration.test_node_several_gpus import CONTEXT_BYTES, SHARE_BYTES, hands_on, host, replica
from tests.unit.engines.running import software_host

pytestmark = pytest.mark.anyio
__all__ = ["host"]

REQUEST_MIB = SHARE_BYTES // MiB
GRANT_MIB = REQUEST_MIB + 2048
LESS_MIB = REQUEST_MIB + 1024
RESERVE_BYTES = 2 * GiB


def elastic(host: softgpu.Host) -> ReplicaProposal:
    fixed = replica(host, EngineKind.SIMULATED)
    shares = tuple(replace(share, limit_bytes=2 * SHARE_BYTES) for share in fixed.shares)
    return replace(fixed, shares=shares)


async def test_an_engine_that_only_its_own_budget_holds_grows_and_shrinks_and_cannot_be_frozen(
    tmp_path: Path, host: softgpu.Host
) -> None:
    host.set_fault("nvmlDeviceGetMemoryLimits_v1", times=-1, code=NOT_SUPPORTED)
    async with hands_on(tmp_path, host, elastic(host)) as hands:
        started = await hands.do("start")
        assert ("EngineStarted", "cooperative") == (started["kind"], started["result"].get("grade")), started

        grown = await hands.do(f"resize burst 1 {GRANT_MIB} {REQUEST_MIB}")
        assert "EngineResized" == grown["kind"], grown
        assert all(after > before + 1800 * MiB for after, before in zip(grown["used"], started["used"], strict=True))
        assert [] == grown["limits"]

        frozen = await hands.do(f"resize freeze 2 {REQUEST_MIB} {GRANT_MIB}")
        assert [GRANT_MIB * MiB] * 2 == frozen["result"]["granted_bytes"], "nothing holds it, so it has what it had"

        shrunk = await hands.do(f"resize give_back 3 {LESS_MIB} {GRANT_MIB}")
        assert "EngineResized" == shrunk["kind"], shrunk
        assert all(used <= LESS_MIB * MiB for used in shrunk["used"])
        assert "EngineStopped" == (await hands.do("stop"))["kind"]


async def test_an_engine_whose_memory_is_the_brokers_grows_freezes_and_shrinks_with_its_account(tmp_path: Path) -> None:
    """Its account and its context together are its grant, at any time."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    with software_host(phantom=True, gpus=2, total_bytes=16 * GiB, context_bytes=CONTEXT_BYTES) as made:
        made.set_fault("nvmlDeviceGetMemoryLimits_v1", times=-1, code=NOT_SUPPORTED)
        with broker(made, tmp_path / "b", hold="all", reserve_bytes=RESERVE_BYTES - CONTEXT_BYTES):
            control, engines = (str(tmp_path / "b" / f"{name}.sock") for name in ("control", "engines"))
            await until(lambda: can_connect(Path(control)))

            async def account() -> AccountView:
                (one,) = (await BrokerClient(control).look()).accounts
                return one

            sockets = {"broker_socket": control, "broker_engine_socket": engines}
            async with hands_on(tmp_path, made, elastic(made), **sockets) as hands:
                started = await hands.do("start")
                assert ("EngineStarted", "broker") == (started["kind"], started["result"].get("grade")), started
                before = await account()

                grown = await hands.do(f"resize burst 1 {GRANT_MIB} {REQUEST_MIB}")
                assert "EngineResized" == grown["kind"], grown
                now = await account()
                most_bytes = GRANT_MIB * MiB - CONTEXT_BYTES
                assert {most_bytes} == set(now.granted_bytes.values())
                assert all(size > before.held_bytes[uuid] + 1800 * MiB for uuid, size in now.held_bytes.items())

                frozen = await hands.do(f"resize freeze 2 {REQUEST_MIB} {GRANT_MIB}")
                assert "EngineResized" == frozen["kind"], frozen
                assert all(LESS_MIB * MiB < size <= GRANT_MIB * MiB for size in frozen["result"]["granted_bytes"])

                shrunk = await hands.do(f"resize give_back 3 {LESS_MIB} {GRANT_MIB}")
                assert "EngineResized" == shrunk["kind"], shrunk
                now = await account()
                assert {LESS_MIB * MiB - CONTEXT_BYTES} == set(now.granted_bytes.values())
                assert all(now.held_bytes[uuid] <= size for uuid, size in now.granted_bytes.items())
                assert "EngineStopped" == (await hands.do("stop"))["kind"]

"""What the weights show: when it is asked anew, and when what is known is enough."""

from typing import Any, cast

import pytest

from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec, WorkloadKind
from schemas.placement import ReplicaProposal
from services.nodeagent.engine_client import EngineState
from services.nodeagent.mover.proof import Proof, shown_again, shown_by

pytestmark = pytest.mark.anyio


class PlayedEngine:
    """Gives tokens; its weights may be updated."""

    def __init__(self, *, is_bulk_checked: bool = True) -> None:
        self.weights_generation = 1
        self.token_count = 0
        self._is_bulk_checked = is_bulk_checked

    async def state(self, endpoint: str, kind: EngineKind) -> EngineState:
        return EngineState(
            state="resident", weights_generation=self.weights_generation, is_bulk_checked=self._is_bulk_checked
        )

    async def verify(self, endpoint: str, model: str, kind: WorkloadKind, *, timeout_s: float) -> str:
        self.token_count += 1
        return f"token of {self.weights_generation}"

    async def get(self, url: str, *, timeout_s: float) -> bytes:
        return b'{"digest": "digest of %d"}' % self.weights_generation


def replica(kind: EngineKind = EngineKind.SIMULATED) -> ReplicaProposal:
    spec = DeploymentSpec(
        name="m", engine=EngineSpec(kind=kind, weights_bytes=60), share=ShareSpec(request_portion=0.5)
    )
    return ReplicaProposal(replica_id="r", deployment_id="d", tenant="t", deployment=spec, shares=())


async def again(engine: PlayedEngine, known: Proof | None, kind: EngineKind = EngineKind.SIMULATED) -> Proof:
    return await shown_again(cast(Any, engine), replica(kind), "http://e", known=known, timeout_s=1.0)


async def test_weights_that_have_not_changed_are_not_asked_for_another_token() -> None:
    engine = PlayedEngine()
    known = await shown_by(cast(Any, engine), replica(), "http://e", timeout_s=1.0)

    assert known == await again(engine, known)
    assert 1 == engine.token_count


@pytest.mark.parametrize("is_bulk_checked", [True, False])
async def test_weights_that_were_updated_show_themselves_anew(is_bulk_checked: bool) -> None:
    engine = PlayedEngine(is_bulk_checked=is_bulk_checked)
    known = await again(engine, None)
    engine.weights_generation = 2

    shown = await again(engine, known)

    assert known != shown
    assert shown == await again(engine, shown)
    assert 2 == engine.token_count


async def test_an_engine_that_does_not_count_its_weights_shows_them_before_each_park() -> None:
    engine = PlayedEngine()
    known = await again(engine, None, EngineKind.VLLM)

    assert known == await again(engine, known, EngineKind.VLLM)
    assert 2 == engine.token_count

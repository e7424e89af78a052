"""What the node agent's hands notice by themselves."""

from typing import Any, cast

import anyio
import pytest

from kit.outcomes import Input
from kit.telemetry import Tracer
from schemas.deployments import DeploymentSpec, EngineSpec, ShareSpec
from schemas.holders import EngineView
from schemas.placement import ReplicaProposal, ShareProposal
from services.nodeagent.effects import NodeEffects
from services.nodeagent.engine_client import EngineState
from services.nodeagent.holder_client import HolderProblem
from services.nodeagent.inputs import AdoptEngine, EngineLost
from services.nodeagent.settings import NodeAgentSettings

pytestmark = pytest.mark.anyio

ENGINE = EngineView(
    replica_id="r", lease_epoch=7, pid=1, started_ticks=1, port=1, is_gated=False, is_alive=True, exit_code=None,
    namespace="sublet-r", log_path="/nowhere",
)  # fmt: skip


class RestartedHolder:
    """Answers for an engine until its first long poll; then it is away, and then it knows nothing."""

    def __init__(self) -> None:
        self.waits = 0

    async def engine(self, replica_id: str) -> EngineView | None:
        return None if self.waits else ENGINE

    async def open_route(self, replica_id: str, endpoint: str) -> None:
        return None

    async def wait_for_exit(self, replica_id: str, *, lease_epoch: int, timeout_s: float) -> EngineView:
        self.waits += 1
        raise HolderProblem("away", status=0 if self.waits == 1 else 404)


class Engines:
    async def state(self, endpoint: str) -> EngineState:
        return EngineState(state="resident")


def replica() -> ReplicaProposal:
    share = ShareProposal(replica_id="r", shard_index=0, gpu_uuid="GPU-0", request_bytes=10, limit_bytes=10)
    spec = DeploymentSpec(name="m", engine=EngineSpec(weights_bytes=10), share=ShareSpec(request_portion=0.5))
    return ReplicaProposal(replica_id="r", deployment_id="d", tenant="t", deployment=spec, shares=(share,))


async def test_engines_that_a_restarted_holder_does_not_know_are_reported_as_lost() -> None:
    """A holder takes its engines along when it dies; until it is told so, the fleet believes that they serve."""
    reported: list[Input] = []
    async with anyio.create_task_group() as watchers:
        effects = NodeEffects(
            NodeAgentSettings(),
            guard=cast(Any, None),
            holder=cast(Any, RestartedHolder()),
            engines=cast(Any, Engines()),
            tracer=Tracer(None, None, root_ratio=0.0),
            watchers=watchers,
            report=reported.append,
        )
        await effects.perform(AdoptEngine(replica=replica(), lease_epoch=7, wake_epoch=0, should_be_parked=False), "")

    assert [EngineLost(replica_id="r", lease_epoch=7, reason="the holder does not know it any more")] == reported

"""What the node agent's hands notice by themselves."""

from collections.abc import Sequence
from typing import Any, cast

import anyio
import pytest

from kit.outcomes import Input
from kit.telemetry import Tracer
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec, WorkloadKind
from schemas.holders import EngineView
from schemas.placement import ReplicaProposal, ShareProposal
from schemas.units import MiB
from services.nodeagent.effects import parking
from services.nodeagent.effects.hands import Hands
from services.nodeagent.effects.performing import NodeEffects
from services.nodeagent.engine_client import EngineProblem, EngineState
from services.nodeagent.holder_client import HolderProblem
from services.nodeagent.inputs import (
    AdoptEngine,
    EngineEffect,
    EngineLost,
    EngineParked,
    EngineWoken,
    ParkEngine,
    WakeEngine,
)
from services.nodeagent.mover.mover import Mover, plain_drivers
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
    async def state(self, endpoint: str, kind: EngineKind) -> EngineState:
        return EngineState(state="resident")


def replica(*gpu_uuids: str, request_bytes: int = 10) -> ReplicaProposal:
    shares = tuple(
        ShareProposal(
            replica_id="r", shard_index=index, gpu_uuid=uuid, request_bytes=request_bytes, limit_bytes=request_bytes
        )
        for index, uuid in enumerate(gpu_uuids or ("GPU-0",))
    )
    spec = DeploymentSpec(name="m", engine=EngineSpec(weights_bytes=10), share=ShareSpec(request_portion=0.5))
    return ReplicaProposal(replica_id="r", deployment_id="d", tenant="t", deployment=spec, shares=shares)


async def test_engines_that_a_restarted_holder_does_not_know_are_reported_as_lost() -> None:
    """A holder takes its engines along when it dies; until it is told so, the fleet believes that they serve."""
    reported: list[Input] = []
    async with anyio.create_task_group() as watchers:
        effects = NodeEffects(
            Hands(
                settings=NodeAgentSettings(),
                guard=cast(Any, None),
                holder=cast(Any, RestartedHolder()),
                engines=cast(Any, Engines()),
                mover=Mover(plain_drivers(cast(Any, Engines()))),
                tracer=Tracer(None, None, root_ratio=0.0),
                watchers=watchers,
                report=reported.append,
            )
        )
        await effects.perform(AdoptEngine(replica=replica(), lease_epoch=7, wake_epoch=0, should_be_parked=False), "")

    assert [EngineLost(replica_id="r", lease_epoch=7, reason="the holder does not know it any more")] == reported


class CalmHolder:
    """Knows the engine until it is told to forget it."""

    def __init__(self) -> None:
        self.is_known = True
        self.is_over = anyio.Event()
        """The end of its life; its next one knows no engine."""

    async def wait_for_exit(self, replica_id: str, *, lease_epoch: int, timeout_s: float) -> EngineView:
        await self.is_over.wait()
        self.is_known = False
        raise HolderProblem("it knows no such engine", status=404)

    async def engine(self, replica_id: str) -> EngineView | None:
        return ENGINE if self.is_known else None

    async def open_route(self, replica_id: str, endpoint: str) -> None:
        return None

    async def close_route(self, replica_id: str) -> None:
        return None

    async def stop(self, replica_id: str, *, lease_epoch: int, grace_s: float) -> None:
        self.is_known = False

    async def forget(self, replica_id: str, *, lease_epoch: int) -> None:
        return None


class SleepingEngines:
    """Says that it holds 1,000 MiB after its park, in all."""

    async def state(self, endpoint: str, kind: EngineKind = EngineKind.SIMULATED) -> EngineState:
        return EngineState(state="asleep", held_bytes=1000 * MiB)

    async def wait_until_idle(self, endpoint: str, *, timeout_s: float, kind: EngineKind) -> bool:
        return True

    async def verify(self, endpoint: str, model: str, kind: WorkloadKind, *, timeout_s: float) -> str:
        raise EngineProblem("it shows nothing")

    async def post(self, url: str, *, timeout_s: float, body: bytes | None = None) -> bytes:
        return b""


class WakingEngines(SleepingEngines):
    async def verify(self, endpoint: str, model: str, kind: WorkloadKind, *, timeout_s: float) -> str:
        return "a token"


class GuardOf:
    """What the driver says is used on each GPU, and the limits that were set there."""

    def __init__(self, used: dict[str, int]) -> None:
        self._used = used
        self.limits: dict[str, int] = {}

    async def used_bytes(self, gpu_uuid: str, namespace: str, pid: int) -> int:
        return self._used[gpu_uuid]

    async def hold(self, replica: ReplicaProposal, engine: EngineView, sizes: Sequence[int]) -> int:
        self.limits = {share.gpu_uuid: size for share, size in zip(replica.shares, sizes, strict=True)}
        return sum(sizes)

    async def drain(self, engine: EngineView) -> None:
        return None

    async def lift(self, replica: ReplicaProposal, engine: EngineView) -> None:
        self.limits = {}


async def parked(used: dict[str, int]) -> tuple[Input | None, GuardOf]:
    """What comes back of a park after which the driver says this."""
    park = ParkEngine(
        replica=replica(*used, request_bytes=4000 * MiB), lease_epoch=7, wake_epoch=1, drain_s=1.0, reason="idle"
    )
    result, guard, _ = await done(park, used)
    return result, guard


async def done(
    effect: EngineEffect, used: dict[str, int], engines: type[SleepingEngines] = SleepingEngines
) -> tuple[Input | None, GuardOf, list[Input]]:
    """The effect's result, the guard, and what is told when the holder loses its engines after that."""
    guard, holder = GuardOf(used), CalmHolder()
    result: Input | None = None
    ended: list[Input] = []
    async with anyio.create_task_group() as watchers:
        effects = NodeEffects(
            Hands(
                settings=NodeAgentSettings(),
                guard=cast(Any, guard),
                holder=cast(Any, holder),
                engines=cast(Any, engines()),
                mover=Mover(plain_drivers(cast(Any, engines()))),
                tracer=Tracer(None, None, root_ratio=0.0),
                watchers=watchers,
                report=ended.append,
            )
        )
        result = await effects.perform(effect, "")
        holder.is_over.set()
    return result, guard, ended


@pytest.mark.parametrize("kind", [ParkEngine, WakeEngine])
async def test_an_agent_that_returned_within_a_park_or_a_wake_hears_of_the_engines_end(
    kind: type[EngineEffect],
) -> None:
    """It goes on with what it had begun, and adopts nothing."""
    more: dict[str, Any] = {"drain_s": 1.0, "reason": "idle"} if kind is ParkEngine else {}
    begun = kind(replica=replica("GPU-0", request_bytes=4000 * MiB), lease_epoch=7, wake_epoch=1, **more)

    result, _, ended = await done(begun, {"GPU-0": 500 * MiB}, WakingEngines)

    assert isinstance(result, EngineParked | EngineWoken), result
    assert [EngineLost(replica_id="r", lease_epoch=7, reason="the holder does not know it any more")] == ended


async def test_a_park_over_several_gpus_tells_what_stays_on_each_and_limits_it_to_that() -> None:
    result, guard = await parked({"GPU-0": 500 * MiB, "GPU-1": 520 * MiB})

    assert isinstance(result, EngineParked)
    assert (500 * MiB, 520 * MiB) == result.residues
    assert {"GPU-0": 500 * MiB, "GPU-1": 520 * MiB} == guard.limits


@pytest.mark.parametrize("stuck", ["GPU-0", "GPU-1"])
async def test_a_park_whose_bytes_stay_on_any_of_its_gpus_is_not_told_as_done(
    stuck: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds in all would still be allowed; on one GPU it is too much, and others count on these bytes."""
    monkeypatch.setattr(parking, "FREED_DEADLINE_S", 0.05)

    result, guard = await parked({"GPU-0": 100 * MiB, "GPU-1": 100 * MiB} | {stuck: 700 * MiB})

    assert isinstance(result, EngineLost)
    assert f"its bytes on {stuck} are not proven free" in result.reason
    assert {} == guard.limits

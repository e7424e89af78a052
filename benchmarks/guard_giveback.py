"""Section ``giveback``: an engine under load has borrowed, and an owner wants its bytes: how soon they are free.

The real effects of the node agent on a real engine over the software GPU: frozen at what it uses, then asked to shrink;
and, as the next step of the ladder, parked. Each counts until the driver says that the bytes are free and its limit is
at the new grant.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import anyio
from msgspec.structs import replace

from benchmarks.guard_stage import Stage, stage
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from kit.outcomes import Input
from kit.telemetry import Tracer
from schemas.deployments import EngineSpec, IsolationGrade, SwapDriver
from schemas.nodes import ResizeReason
from schemas.placement import ReplicaProposal
from schemas.units import MiB
from services.nodeagent.effects.hands import Hands
from services.nodeagent.effects.performing import NodeEffects
from services.nodeagent.engine_client import EngineClient
from services.nodeagent.inputs import (
    EngineParked,
    EngineResized,
    EngineStarted,
    EngineWoken,
    ParkEngine,
    ResizeEngine,
    StartEngine,
    WakeEngine,
)
from services.nodeagent.mover.mover import mover_of
from services.nodeagent.rooms import Rooms

WEIGHTS_BYTES: Final = 256 * MiB
REQUEST_BYTES: Final = 1024 * MiB
GRANT_BYTES: Final = 3072 * MiB
CLIENTS: Final = 4
WARM_S: Final = 1.0
"""Until every client has a request under way."""
DEADLINE_S: Final = 10.0
DRAIN_S: Final = 30.0
BARS: Final = (
    Wanted(figure="give_back_cooperative_p99_s", op="<=", bar=0.25),
    Wanted(figure="give_back_park_beyond_link_p99_s", op="<=", bar=0.4),
    Wanted(figure="give_back_failed_count", op="==", bar=0),
)


async def measure(setting: Setting) -> Measured:
    async with stage(setting.folder, grade=IsolationGrade.DRIVER, cold_start_s=0.0) as made, _engine(made) as engine:
        cooperative = [await engine.give_back() for _ in range(setting.count(100, 3))]
        async with anyio.create_task_group() as tasks:
            for _ in range(CLIENTS):
                tasks.start_soon(engine.ask_for_ever)
            await anyio.sleep(WARM_S)
            under_load = [await engine.give_back() for _ in range(setting.count(100, 3))]
            tasks.cancel_scope.cancel()
        parks = [await engine.park() for _ in range(setting.count(40, 2))]
    link_s = WEIGHTS_BYTES / made.offer.link_bytes_per_s
    figures: dict[str, Value] = {
        "give_back_idle_p99_s": _p99(cooperative),
        "give_back_cooperative_p50_s": _middle(under_load),
        "give_back_cooperative_p99_s": _p99(under_load),
        "give_back_bytes": GRANT_BYTES - REQUEST_BYTES,
        "give_back_park_p99_s": _p99(parks),
        "give_back_park_beyond_link_p99_s": max(0.0, _p99(parks) - link_s),
        "give_back_failed_count": engine.failed_count,
        "give_back_answered_count": engine.answered_count,
    }
    note = (
        f"giveback: freeze and shrink of {(GRANT_BYTES - REQUEST_BYTES) // MiB} MiB under {CLIENTS} clients; "
        "driver calls cost nothing on this host, so that this is what the agent and the engine add to them."
    )
    return Measured(figures=figures, notes=[note])


def _p99(times_s: list[float]) -> float:
    return sorted(times_s)[max(0, -(-99 * len(times_s) // 100) - 1)]


def _middle(times_s: list[float]) -> float:
    return sorted(times_s)[len(times_s) // 2]


@dataclass(slots=True)
class _Engine:
    """One real engine, in the agent's own hands."""

    effects: NodeEffects
    replica: ReplicaProposal
    session: aiohttp.ClientSession
    endpoint: str = ""
    resize_epoch: int = 0
    failed_count: int = 0
    answered_count: int = 0

    def about(self) -> dict[str, Any]:
        driver = SwapDriver.HTTP_SLEEP
        return {"replica": self.replica, "lease_epoch": 1, "wake_epoch": 1, "swap_driver": driver}

    async def do(self, effect: Any, wanted: type[Input]) -> Any:
        result = await self.effects.perform(effect, "")
        self.failed_count += not isinstance(result, wanted)
        return result

    async def resize(self, reason: ResizeReason, granted_bytes: int, before_bytes: int) -> int:
        """The grant that it lives in afterwards."""
        self.resize_epoch += 1
        effect = ResizeEngine(
            **self.about(),
            reason=reason,
            granted_bytes=(granted_bytes,),
            before_bytes=(before_bytes,),
            resize_epoch=self.resize_epoch,
            deadline_s=DEADLINE_S,
        )
        result = await self.do(effect, EngineResized)
        return int(result.granted_bytes[0])

    async def give_back(self) -> float:
        await self.resize(ResizeReason.BURST, GRANT_BYTES, REQUEST_BYTES)
        began_s = time.monotonic()
        granted_bytes = await self.resize(ResizeReason.FREEZE, REQUEST_BYTES, GRANT_BYTES)
        await self.resize(ResizeReason.GIVE_BACK, REQUEST_BYTES, granted_bytes)
        return time.monotonic() - began_s

    async def park(self) -> float:
        await self.resize(ResizeReason.BURST, GRANT_BYTES, REQUEST_BYTES)
        began_s = time.monotonic()
        await self.do(ParkEngine(**self.about(), drain_s=DRAIN_S, reason="did not give back"), EngineParked)
        took_s = time.monotonic() - began_s
        await self.do(WakeEngine(**self.about()), EngineWoken)
        return took_s

    async def ask_for_ever(self) -> None:
        body = {"model": self.replica.deployment.name, "prompt": "a few words to read " * 8, "max_tokens": 64}
        while True:
            async with self.session.post(f"{self.endpoint}/v1/completions", json=body) as response:
                await response.read()
                self.answered_count += response.status == 200


@asynccontextmanager
async def _engine(made: Stage) -> AsyncIterator[_Engine]:
    plain = made.replica("borrower", REQUEST_BYTES)
    spec = replace(plain.deployment, engine=EngineSpec(weights_bytes=WEIGHTS_BYTES))
    shares = tuple(replace(share, limit_bytes=GRANT_BYTES) for share in plain.shares)
    proposal = replace(plain, deployment=spec, shares=shares)
    engines = EngineClient()
    mover = mover_of(made.settings, engines)
    async with aiohttp.ClientSession() as session, anyio.create_task_group() as watchers:
        hands = Hands(
            settings=made.settings,
            guard=made.guard,
            holder=made.holder,
            engines=engines,
            mover=mover,
            tracer=Tracer(None, None, root_ratio=0.0),
            watchers=watchers,
            report=lambda _: None,
            rooms=Rooms(made.guard),
        )
        engine = _Engine(NodeEffects(hands), proposal, session)
        started = await engine.do(StartEngine(**engine.about()), EngineStarted)
        assert isinstance(started, EngineStarted), started
        engine.endpoint = started.endpoint
        view = await made.holder.engine("borrower")
        assert view is not None, "it was started just now"
        made.started["borrower"] = view
        yield engine
        watchers.cancel_scope.cancel()
    await mover.close()
    await engines.close()

"""What every effect works with: one host's hands, and the few grips that most effects need."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup

from devices.api import DeviceError
from kit.outcomes import Input
from kit.telemetry import Tracer
from schemas.holders import EngineView
from schemas.placement import ReplicaProposal
from services.nodeagent.adapters.registry import is_container
from services.nodeagent.effects.lanes import Lanes
from services.nodeagent.engine_client import EngineClient, EngineProblem
from services.nodeagent.guard import Guard, NotEnforced
from services.nodeagent.holder_client import HolderClient
from services.nodeagent.inputs import EngineEffect
from services.nodeagent.mover.driver import SwapTarget
from services.nodeagent.mover.mover import Mover
from services.nodeagent.mover.proof import Proof, shown_again, shown_by
from services.nodeagent.reconciling import Record
from services.nodeagent.rooms import Rooms
from services.nodeagent.runtimes.api import Runtime
from services.nodeagent.runtimes.docker import Containers
from services.nodeagent.settings import NodeAgentSettings

HOLDER_RETRY_S: Final = 0.5
LIMIT_RETRY_S: Final = 0.1
PROOF_S: Final = 5.0
"""For one token of an engine that has nothing else to do."""
log = logging.getLogger("nodeagent")


class Gone(Exception):
    """The engine of this lease does not run any more, or must not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hands:
    """One host's hands."""

    settings: NodeAgentSettings
    guard: Guard
    holder: HolderClient
    engines: EngineClient
    mover: Mover
    tracer: Tracer
    watchers: TaskGroup
    """Where those run who wait for an engine's end."""
    report: Callable[[Input], None]
    """Takes what nobody asked for."""
    record: Callable[[], Record | None] = lambda: None
    """What the agent knows that should be here; None while it does not know."""
    containers: Containers | None = None
    """None where no engine runs in one."""
    rooms: Rooms | None = None
    """What engines see on this host's GPUs; None where none is ever started."""
    proofs: dict[tuple[str, int], Proof] = field(default_factory=dict)
    """{(replica_id, lease_epoch): what its weights showed at its start or before a park}; lost with the agent."""
    lanes: Lanes = field(default_factory=Lanes)
    """Changes of engines' sizes that are under way."""
    watched: set[tuple[str, int]] = field(default_factory=set)
    """{(replica_id, lease_epoch)} of the engines whose end somebody waits for."""

    def runtime(self, replica: ReplicaProposal) -> Runtime:
        """What runs it."""
        if not is_container(replica.deployment):
            return self.holder
        assert self.containers is not None, "a replica in a container came to hands without Docker"
        return self.containers

    def endpoint(self, engine: EngineView) -> str:
        return f"http://{self.settings.engine_host}:{engine.port}"

    def target(self, effect: EngineEffect, engine: EngineView) -> SwapTarget:
        """The engine as swap drivers take it."""
        return SwapTarget(
            replica=effect.replica,
            lease_epoch=effect.lease_epoch,
            engine=engine,
            endpoint=self.endpoint(engine),
            timeout_s=self.settings.wake_deadline_s,
        )

    async def running(self, effect: EngineEffect) -> EngineView:
        """The engine of this lease; raises `Gone` when it does not run."""
        engine = await self.runtime(effect.replica).engine(effect.replica.replica_id)
        if engine is None or engine.lease_epoch != effect.lease_epoch:
            raise Gone("the holder does not know it")
        if not engine.is_alive:
            raise Gone(f"it ended with code {engine.exit_code}: {log_line(engine)}")
        return engine

    async def limit(self, replica: ReplicaProposal, engine: EngineView, sizes: Sequence[int]) -> int:
        """Allow it so much on each of its GPUs, by shard, and give the sum as read back; see `Guard.hold`."""
        return await self.guard.hold(replica, engine, sizes)

    async def limit_in_time(self, replica: ReplicaProposal, engine: EngineView, sizes: Sequence[int]) -> None:
        """The same in the middle of a swap. Raises `NotEnforced`.

        A driver or memory broker that fails now is asked again, for half of a wake's deadline: it may be restarted.
        """
        problem: Exception | None = None
        with anyio.move_on_after(self.settings.wake_deadline_s / 2):
            while True:
                try:
                    await self.limit(replica, engine, sizes)
                    return
                except (NotEnforced, DeviceError) as error:
                    problem = error
                    log.warning("limit not set", extra={"replica": replica.replica_id, "reason": str(error)})
                await anyio.sleep(LIMIT_RETRY_S)
        raise NotEnforced(f"its limit cannot be set: {problem or 'no answer'}")

    async def is_idle(self, effect: EngineEffect, endpoint: str, *, timeout_s: float) -> bool:
        """True when nothing is in flight; a training job yields between two steps by itself."""
        if effect.replica.deployment.kind == "training":
            return True
        try:
            return await self.engines.wait_until_idle(
                endpoint, timeout_s=timeout_s, kind=effect.replica.deployment.engine.kind
            )
        except EngineProblem as error:
            raise Gone(str(error)) from error

    async def verify(self, effect: EngineEffect, endpoint: str) -> None:
        """It gives a token, or `Gone`."""
        try:
            shown = await shown_by(self.engines, effect.replica, endpoint, timeout_s=self.settings.wake_deadline_s)
        except EngineProblem as error:
            raise Gone(f"it does not give a token: {error}") from error
        self.proofs.setdefault((effect.replica.replica_id, effect.lease_epoch), shown)

    async def note_proof(self, effect: EngineEffect, endpoint: str) -> None:
        """What its weights show before a park; an engine that shows nothing now is not compared later."""
        key = (effect.replica.replica_id, effect.lease_epoch)
        known = self.proofs.pop(key, None)
        with contextlib.suppress(EngineProblem):
            self.proofs[key] = await shown_again(self.engines, effect.replica, endpoint, known=known, timeout_s=PROOF_S)

    async def verify_return(self, effect: EngineEffect, endpoint: str) -> None:
        """It gives a token, and shows the weights that went; else `Gone`: it must not serve, and starts anew."""
        try:
            now = await shown_by(self.engines, effect.replica, endpoint, timeout_s=self.settings.wake_deadline_s)
        except EngineProblem as error:
            raise Gone(f"it does not give a token: {error}") from error
        before = self.proofs.get((effect.replica.replica_id, effect.lease_epoch))
        if before is not None and now != before:
            raise Gone(f"its weights are not those that were parked: it shows {now}, and showed {before}")


def requests(replica: ReplicaProposal) -> tuple[int, ...]:
    """What each of its shards is guaranteed, by shard."""
    return tuple(share.request_bytes for share in replica.shares)


def log_line(engine: EngineView) -> str:
    """The last line of its log that says something, for the reason of its end."""
    try:
        lines = Path(engine.log_path).read_text(errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "its log is empty")

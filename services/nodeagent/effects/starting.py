"""Cold starts: gated, limited, read back, let go, loaded, verified, routed."""

import os
import sys
import time
from typing import Final

import anyio
from msgspec import structs

from devices.api import DeviceError
from kit.outcomes import Input
from schemas.holders import EngineView
from services.nodeagent.effects.ending import end_of, end_older, watch
from services.nodeagent.effects.hands import HOLDER_RETRY_S, Gone, Hands, log, requests
from services.nodeagent.engine_client import EngineProblem
from services.nodeagent.grades import is_weaker
from services.nodeagent.guard import NotEnforced
from services.nodeagent.inputs import EngineEffect, EngineStarted, StartEngine
from services.nodeagent.launch import container_job, container_start, engine_start, process_job
from services.nodeagent.mover.driver import Broken, StillResident
from services.nodeagent.runtimes.api import RuntimeProblem, StartRefused
from services.nodeagent.runtimes.secrets import secrets_of

ENGINE_ENVIRONMENT: Final = ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "HOME", "LANG")
ENGINE_ENVIRONMENT_PREFIXES: Final = ("SOFTGPU_", "OTEL_")


async def start(hands: Hands, effect: StartEngine, traceparent: str) -> Input:
    began_s = time.monotonic()
    replica = effect.replica
    await end_older(hands, effect)
    engine = await _gated(hands, effect)
    try:
        enforced_bytes = await hands.limit(replica, engine, requests(replica))
    except (NotEnforced, DeviceError) as error:
        raise Gone(f"its share cannot be enforced: {error}") from error
    grade, minimum = await hands.guard.grade_of(replica, engine), replica.deployment.share.minimum_grade
    if is_weaker(grade, minimum):
        raise Gone(f"its share is held as '{grade}', not '{minimum}': its container has no cgroup v2 leaf to limit")
    if engine.is_gated:
        await hands.runtime(replica).open_gate(replica.replica_id, lease_epoch=effect.lease_epoch)
    endpoint = hands.endpoint(engine)
    with hands.tracer.span("engine load", parent=traceparent):
        await _until_ready(hands, effect, endpoint)
    with hands.tracer.span("engine verify", parent=traceparent):
        try:
            await hands.guard.verify(replica, engine)
        except (NotEnforced, DeviceError) as error:
            raise Gone(f"its share is not enforced: {error}") from error
        await hands.verify(effect, endpoint)
    await hands.holder.open_route(replica.replica_id, endpoint)
    watch(hands, effect)
    hands.watchers.start_soon(_prepare, hands, effect, engine)
    return EngineStarted(
        replica_id=replica.replica_id,
        lease_epoch=effect.lease_epoch,
        endpoint=endpoint,
        start_s=time.monotonic() - began_s,
        enforced_bytes=enforced_bytes,
        swap_driver=effect.swap_driver,
        grade=grade,
    )


async def _gated(hands: Hands, effect: StartEngine) -> EngineView:
    """Its process or its container, behind a gate; `Gone` when it cannot be started as it is wished."""
    replica, settings = effect.replica, hands.settings
    assert hands.rooms is not None
    granted_bytes = {share.gpu_uuid: share.request_bytes for share in replica.shares}
    is_container = hands.runtime(replica) is hands.containers
    rooms = await hands.rooms.of(granted_bytes, is_container=is_container)
    # Over what the deployment sets: nobody chooses another account or another ceiling.
    held = hands.guard.environment(replica, lease_epoch=effect.lease_epoch)
    names, folder = replica.deployment.engine.secrets, settings.secrets_dir
    try:
        held |= await anyio.to_thread.run_sync(lambda: secrets_of(names, folder=folder))
        if hands.containers is not None and is_container:
            job = container_job(replica, rooms=rooms, settings=settings)
            return await hands.containers.start(container_start(job, lease_epoch=effect.lease_epoch, environment=held))
        job = process_job(replica, rooms=rooms, settings=settings, python=settings.engine_python or sys.executable)
        wish = engine_start(job, lease_epoch=effect.lease_epoch, environment=engine_environment())
        return await hands.holder.start(structs.replace(wish, environment=wish.environment | held))
    except StartRefused as refused:
        raise Gone(f"it cannot be started: {refused}") from refused


async def _prepare(hands: Hands, effect: EngineEffect, engine: EngineView) -> None:
    """So that its first park need not take host memory first; when that fails, the park says so."""
    try:
        await hands.mover.by(effect.swap_driver).prepare(hands.target(effect, engine))
    except (StillResident, Broken) as error:
        log.warning("swap not prepared", extra={"reason": str(error), "replica_id": effect.replica.replica_id})


async def _until_ready(hands: Hands, effect: EngineEffect, endpoint: str) -> None:
    """Ready, or `Gone` when it fails, ends, or takes too long."""
    problem = ""
    async with anyio.create_task_group() as tg:

        async def watch_end() -> None:
            nonlocal problem
            while not problem:
                try:
                    reason = await end_of(hands, effect)
                    problem = f"while loading: {reason}" if reason else ""
                except RuntimeProblem as away:
                    log.warning("holder problem", extra={"reason": str(away), "effect": "StartEngine"})
                    await anyio.sleep(HOLDER_RETRY_S)
            tg.cancel_scope.cancel()

        async def watch_ready() -> None:
            nonlocal problem
            with anyio.move_on_after(hands.settings.start_deadline_s) as scope:
                try:
                    await hands.engines.wait_until_ready(endpoint, effect.replica.deployment.engine.kind)
                except EngineProblem as error:
                    problem = str(error)
            if scope.cancelled_caught:
                problem = f"not ready after {hands.settings.start_deadline_s:.0f} s"
            tg.cancel_scope.cancel()

        tg.start_soon(watch_end)
        tg.start_soon(watch_ready)
    if problem:
        raise Gone(problem)


def engine_environment() -> dict[str, str]:
    """What engines inherit: nothing that could be a secret."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in ENGINE_ENVIRONMENT or name.startswith(ENGINE_ENVIRONMENT_PREFIXES)
    }

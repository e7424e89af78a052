"""Section ``watch``: eight processes that nothing but the watchdog holds; one of them keeps to its grant."""

import time
from typing import Final

import anyio
import anyio.to_thread

from benchmarks.guard_stage import LOOK_EVERY_S, PIECE_BYTES, TAKER_BYTES, TAKERS, Stage, stage
from benchmarks.report import Value
from benchmarks.sections import Measured, Setting, Wanted
from kit.outcomes import Input
from schemas.deployments import IsolationGrade
from services.nodeagent.guard.watchdog import Watchdog
from services.nodeagent.state import NodeState, Replica, new_state
from services.nodeagent.transitions import Residency

GRACE_S: Final = 1.0
OVER_WITHIN_S: Final = 30.0
BARS: Final = (
    Wanted(figure="watched_neighbours_stopped_count", op="==", bar=0),
    Wanted(figure="watched_offenders_left_count", op="==", bar=0),
)


async def measure(setting: Setting) -> Measured:
    async with stage(
        setting.folder, grade=IsolationGrade.WATCHED, watch_s=0.1, overuse_grace_s=GRACE_S, stop_grace_s=0.0
    ) as made:
        figures = await _watched(made)
    return Measured(
        figures=figures,
        notes=[f"watched: the grace is {GRACE_S:.0f} s; what was taken meanwhile has no bar, for nothing enforces."],
    )


async def _watched(made: Stage) -> dict[str, Value]:
    offenders = [f"taker-{number}" for number in range(TAKERS - 1)]
    await made.start("modest", "hold", granted_bytes=TAKER_BYTES, piece_bytes=TAKER_BYTES - 2 * PIECE_BYTES)
    for name in offenders:
        await made.start(name, "take", granted_bytes=TAKER_BYTES, piece_bytes=PIECE_BYTES)
    for name in made.started:
        await made.is_up(name)
    told: list[Input] = []
    state = _state(made)
    watchdog = Watchdog(made.settings, guard=made.guard, holder=made.holder, state=lambda: state, report=told.append)
    beyond_bytes, over_s = 0, None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watchdog.run)
        began_s = time.monotonic()
        for name in offenders:
            made.go(name)
        with anyio.move_on_after(OVER_WITHIN_S):
            while over_s is None:
                used = await anyio.to_thread.run_sync(made.direct_bytes)
                beyond_bytes = max(beyond_bytes, sum(max(0, size - TAKER_BYTES) for size in used.values()))
                alive = {engine.replica_id for engine in (await made.holder.view()).engines if engine.is_alive}
                # Whoever got too little to be beyond its grant takes what those leave who are stopped.
                if not alive.intersection(offenders):
                    over_s = time.monotonic() - began_s
                await anyio.sleep(LOOK_EVERY_S)
        alive = {engine.replica_id for engine in (await made.holder.view()).engines if engine.is_alive}
        tasks.cancel_scope.cancel()
    return {
        "watched_beyond_grant_bytes": beyond_bytes,
        "watched_over_s": over_s,
        "watched_offenders_left_count": len(alive.intersection(offenders)),
        "watched_neighbours_stopped_count": int("modest" not in alive),
        "watched_told_count": len(told),
    }


def _state(made: Stage) -> NodeState:
    """As the agent would have it: all resident."""
    state = new_state(made.settings)
    state.gpus[made.gpu_uuid] = made.offer
    for name in made.started:
        state.replicas[name] = Replica(
            proposal=made.replica(name, TAKER_BYTES),
            lease_epoch=1,
            residency=Residency.RESIDENT,
            since_s=0.0,
            share_bytes={made.gpu_uuid: TAKER_BYTES},
            residue_bytes={made.gpu_uuid: 0},
            is_started=True,
        )
    return state
